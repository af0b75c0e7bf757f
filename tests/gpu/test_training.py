"""Training on a GPU: no step waits for the device, numbers are read late, the guard works in fp16 and bf16."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from mae_deploy.data.config import DataConfig  # noqa: E402
from mae_deploy.pretrain.run import run_pretrain  # noqa: E402
from mae_deploy.training.config import LoopConfig  # noqa: E402
from mae_deploy.training.monitor.timing import StepTimer  # noqa: E402
from mae_deploy.training.state.run_folder import read_metrics  # noqa: E402
from mae_deploy.training.step import Stepper  # noqa: E402
from tests.data.image_folders import write_noise  # noqa: E402
from tests.distill.patch_teacher import PatchTeacher, batch_of, dataset_of, mask, opened  # noqa: E402
from tests.training.tiny_runs import losses_of, optim, pretraining  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Eleven images: two batches of five."""
    write_noise(tmp_path / "images", 11)
    return tmp_path / "images"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_and_its_resumption(images: Path, tmp_path: Path, precision: str) -> None:
    loop = LoopConfig(precision=precision)  # type: ignore[arg-type]
    common = {"device": "cuda", "loop": loop, "optim": optim(epochs=4, ema=0.9), "images": DataConfig(num_workers=1)}
    run_pretrain(pretraining(images, tmp_path / "run", **common))
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert lines[-1]["loss"] < 2
    assert lines[-1]["skipped"] < 8
    if precision == "fp32":
        one = losses_of(tmp_path / "run")
        run_pretrain(pretraining(images, tmp_path / "cpu", **{**common, "device": "cpu"}))
        # The masks are drawn on the device, so only the schedule is the same.
        assert [line["lr"] for line in losses_of(tmp_path / "cpu")] == [line["lr"] for line in one]


def test_no_step_waits_for_the_device(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take, steps = Stepper.take, []

    def watched(self: Stepper, *arguments: object) -> object:
        steps.append(1)
        # The first steps may wait: the optimiser's state is made, kernels are chosen.
        torch.cuda.set_sync_debug_mode("error" if len(steps) > 3 else "default")
        try:
            return take(self, *arguments)  # type: ignore[arg-type]
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Stepper, "take", watched)
    run_pretrain(
        pretraining(
            images,
            tmp_path / "run",
            device="cuda",
            loop=LoopConfig(precision="bf16"),
            optim=optim(epochs=4, clip_grad=1.0),
        )
    )
    assert len(steps) == 8


def test_a_cached_teacher_lets_no_step_wait(images: Path, tmp_path: Path) -> None:
    """Neither while answers are computed and written, nor while they are read, nor where some are there."""
    device = torch.device("cuda")
    teacher, dataset = PatchTeacher(), dataset_of(images)
    cached = opened(teacher, dataset, tmp_path / "cache", device=device)
    batches = [batch_of(*items) for items in ((1, 5, 3), (2, 7, 6), (0, 4, 8), (1, 9, 2), (6, 1, 8), (3, 5, 10))]
    expected = [PatchTeacher()(batch, mask(batch), whole=False) for batch in batches]
    found = []
    for step, batch in enumerate(batches):
        moved = replace(batch, images=batch.images.to(device), labels=batch.labels.to(device))
        masking = mask(moved)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if step > 0 else "default")
        try:
            found.append(cached(moved, masking, whole=False))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    cached.close()
    assert teacher.shown == [3, 3, 3, 2, 1, 1]  # an answer is on the disk when the third batch after it is read
    for taps, own in zip(found, expected, strict=True):
        for tap, value in own.items():
            torch.testing.assert_close(
                taps[tap].cpu(), value, rtol=2**-10, atol=1e-6
            )  # FP16, and sums in another order
    again = opened(teacher, dataset, tmp_path / "cache", device=device)
    for batch in batches:
        again(replace(batch, images=batch.images.to(device), labels=batch.labels.to(device)), mask(batch), whole=False)
    assert (teacher.shown, again.read, again.computed) == ([], 18, 0)


def test_the_time_of_a_part_is_the_devices() -> None:
    timer = StepTimer(torch.device("cuda"))
    with timer.part("teacher"):
        torch.cuda._sleep(20_000_000)  # returns at once
    torch.cuda.synchronize()
    assert timer.seconds()["teacher"] > 0.005
