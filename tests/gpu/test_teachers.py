"""Teachers on a GPU: PyTorch in every precision, and a bundle's graph cut at the tap on TensorRT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

from mae_deploy.distill.config import TeacherConfig  # noqa: E402
from mae_deploy.distill.teachers.base import Teacher  # noqa: E402
from mae_deploy.distill.teachers.open import open_teacher  # noqa: E402
from mae_deploy.models.config import EncoderConfig  # noqa: E402
from mae_deploy.models.taps import Tap, Taps  # noqa: E402
from mae_deploy.models.vit import Encoder  # noqa: E402
from mae_deploy.runtime.tensorrt.api import Api  # noqa: E402

pytestmark = pytest.mark.gpu

ENCODER = EncoderConfig(name="small", image_size=(64, 96), patch_size=16, embed_dim=128, depth=3, num_heads=2)
WANTED = {Tap("tokens", 2), Tap("latent")}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    from tests.export.tiny_exports import write_checkpoint

    torch.manual_seed(0)
    return write_checkpoint(tmp_path / "checkpoint", Encoder(ENCODER))


def answers(teacher: Teacher, device: str, wanted: set[Tap] = WANTED, *, whole: bool = False) -> Taps:
    from tests.distill.teachers.tiny_teachers import batch_of, masking_of

    teacher.watch(wanted, student=ENCODER, spec=teacher.preprocess)
    teacher.to(torch.device(device))
    batch, masking = batch_of(ENCODER), masking_of(ENCODER)
    on_device = replace(batch, images=batch.images.to(device))
    return {
        tap: value.cpu()
        for tap, value in teacher(
            on_device, masking.__class__(*(part.to(device) for part in masking)), whole=whole
        ).items()
    }


def assert_close(found: Taps, expected: Taps, error: float) -> None:
    for tap, value in expected.items():
        assert found[tap].dtype == torch.float32
        assert (found[tap] - value).norm() < error * value.norm(), tap


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("precision", "error"), [("fp32", 5e-3), ("bf16", 2e-2), ("fp16", 5e-3)]
)  # TF32 has ten bits, bf16 seven, fp16 ten
def test_precisions(checkpoint: Path, gpu: object, precision: str, error: float, compiled: bool) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    expected = answers(open_teacher(checkpoint, TeacherConfig(teacher_precision="fp32")), "cpu")
    settings = TeacherConfig(teacher_precision=precision, teacher_compile=compiled)  # type: ignore[arg-type]
    assert_close(answers(open_teacher(checkpoint, settings), "cuda"), expected, error)


def test_a_bundle_on_tensorrt(checkpoint: Path, tmp_path: Path, api: Api) -> None:
    """The part of the graph up to the tap is built when the teacher moves to the GPU."""
    from PIL import Image

    from mae_deploy.export.config import ExportConfig
    from mae_deploy.export.run import run_export

    samples = tmp_path / "samples"
    samples.mkdir()
    for index in range(4):
        Image.fromarray(np.random.default_rng(index).integers(0, 255, (70, 100, 3), np.uint8)).save(
            samples / f"{index}.png"
        )
    profile = "B:1,3,8 K:1,12,24"
    config = ExportConfig(
        checkpoint=checkpoint,
        out=tmp_path / "bundle",
        engine="trt",
        build=False,
        tokens="visible",
        profile=profile,
        samples=samples,
        num_samples=4,
    )
    run_export(config)
    teacher = open_teacher(tmp_path / "bundle", TeacherConfig(teacher_engine="trt"))
    expected = answers(open_teacher(checkpoint, TeacherConfig(teacher_precision="fp32")), "cpu", {Tap("tokens", 2)})
    assert_close(
        answers(teacher, "cuda" if torch.cuda.is_available() else "cpu", {Tap("tokens", 2)}), expected, 5e-3
    )  # TF32
