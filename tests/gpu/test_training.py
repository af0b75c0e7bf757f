"""Training on a GPU: no step waits for the device, numbers are read late, the guard works in fp16 and bf16."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from mae_deploy.data.config import DataConfig  # noqa: E402
from mae_deploy.pretrain.run import run as pretrain  # noqa: E402
from mae_deploy.training.config import LoopConfig  # noqa: E402
from mae_deploy.training.run_folder import read_metrics  # noqa: E402
from mae_deploy.training.step import Stepper  # noqa: E402
from tests.data.image_folders import write_noise  # noqa: E402
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
    pretrain(pretraining(images, tmp_path / "run", **common))
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert lines[-1]["loss"] < 2
    assert lines[-1]["skipped"] < 8
    if precision == "fp32":
        one = losses_of(tmp_path / "run")
        pretrain(pretraining(images, tmp_path / "cpu", **{**common, "device": "cpu"}))
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
    pretrain(pretraining(images, tmp_path / "run", device="cuda", loop=LoopConfig(precision="bf16"), optim=optim(epochs=4, clip_grad=1.0)))
    assert len(steps) == 8
