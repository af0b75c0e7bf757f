"""Bundles as teachers: the checkpoint that they were exported from is the reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from mae_deploy.config import from_dict
from mae_deploy.distill.config import TeacherConfig
from mae_deploy.distill.teachers.base import check_view
from mae_deploy.distill.teachers.bundle_teacher import BundleTeacher, output_of, write_prefix
from mae_deploy.distill.teachers.open import open_teacher
from mae_deploy.errors import ConfigError, MissingDependency
from mae_deploy.export.config import ExportConfig
from mae_deploy.export.run import run_export
from mae_deploy.models.taps import Tap
from mae_deploy.runtime.engines import openvino as openvino_engine
from mae_deploy.runtime.engines.base import EngineOptions
from mae_deploy.runtime.engines.onnxruntime import OnnxRuntimeEngine
from mae_deploy.runtime.tensorrt import build as tensorrt_build
from mae_deploy.runtime.tensorrt import engine as tensorrt_engine
from tests.data.image_folders import write_noise
from tests.distill.teachers.tiny_teachers import DEEP, FP32, batch_of, masking_of, ready
from tests.export.tiny_exports import write_checkpoint
from tests.models.families import family
from tests.models.tiny_models import ENCODER, random_tensor, tiny_classifier, tiny_encoder

WANTED = (Tap("tokens", 2), Tap("latent"), Tap("cls"), Tap("pooled"))
AUTO = TeacherConfig()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "encoder", tiny_encoder(DEEP))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_noise(folder, 8)
    return folder


def bundle(checkpoint: Path, samples: Path, out: Path, **settings: Any) -> Path:
    run_export(
        from_dict(
            ExportConfig,
            {"checkpoint": str(checkpoint), "out": str(out), "samples": str(samples), "num_samples": 8, **settings},
        )
    )
    return out


@pytest.fixture(scope="module")
def visible(checkpoint: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle(checkpoint, images, tmp_path_factory.mktemp("bundles") / "visible", tokens="visible", threads=1)


@pytest.fixture(scope="module")
def full(checkpoint: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle(checkpoint, images, tmp_path_factory.mktemp("bundles") / "full", images="uint8", batch="2", threads=1)


def assert_same(found: dict[Tap, torch.Tensor], expected: dict[Tap, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for tap, value in expected.items():
        torch.testing.assert_close(
            found[tap], value, rtol=0, atol=1e-4
        )  # two libraries' float32, on values of a few units


@pytest.mark.parametrize("wanted", [WANTED, (Tap("tokens", 2),), (Tap("latent"), Tap("pooled"))])
def test_answers_are_the_checkpoints(wanted: tuple[Tap, ...], visible: Path, checkpoint: Path) -> None:
    """Blocks and outputs together, blocks alone (the graph ends there), outputs alone (the graph as it is)."""
    teacher, reference = (
        ready(open_teacher(path, FP32 if path == checkpoint else AUTO), wanted) for path in (visible, checkpoint)
    )
    assert isinstance(teacher, BundleTeacher)
    assert (teacher.depth, teacher.width, teacher.num_heads, teacher.num_classes) == (3, 20, 5, None)
    assert teacher.reason_against_subset is None
    batch, masking = batch_of(), masking_of()
    for mask, whole in ((None, False), (masking, True), (masking, False)):
        assert_same(teacher(batch, mask, whole=whole), reference(batch, mask, whole=whole))


@pytest.mark.parametrize("kind", ["DINOv3 S+", "Perception Encoder", "register alone"])
def test_registers_are_no_rows_of_a_teacher(kind: str, images: Path, tmp_path: Path) -> None:
    """A bundle of today's families answers as its checkpoint: CLS, or the mean that stands for it, and patches."""
    config = family(kind)
    source = write_checkpoint(tmp_path / "encoder", tiny_encoder(config))
    exported = bundle(source, images, tmp_path / "bundle", tokens="visible", threads=1)
    wanted = (Tap("tokens", 1), Tap("tokens", 2), Tap("pooled"))
    teacher, reference = (
        ready(open_teacher(path, settings), wanted, student=config)
        for path, settings in ((exported, AUTO), (source, FP32))
    )
    batch, masking = batch_of(config), masking_of(config)
    assert teacher(batch, masking, whole=False)[wanted[0]].shape == (3, 1 + masking.ids_keep.shape[1], 24)
    for mask, whole in ((None, False), (masking, True), (masking, False)):
        assert_same(teacher(batch, mask, whole=whole), reference(batch, mask, whole=whole))


def test_pixels_go_into_a_graph_that_normalises_and_takes_two_at_a_time(full: Path, checkpoint: Path) -> None:
    wanted = {Tap("tokens", 2), Tap("pooled")}
    teacher, reference = ready(open_teacher(full, AUTO), wanted), ready(open_teacher(checkpoint, FP32), wanted)
    pixels = (255 * random_tensor(3, 3, 6, 10).sigmoid()).round()
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (teacher.preprocess.mean, teacher.preprocess.std))
    batch = replace(batch_of(), images=(pixels / 255 - mean) / std)
    assert_same(teacher(batch, masking_of(), whole=True), reference(batch, masking_of(), whole=True))
    with pytest.raises(ConfigError, match="takes every patch"):
        check_view(teacher, masked=True, whole=False)


def test_the_graph_ends_at_the_tap(visible: Path, tmp_path: Path) -> None:
    teacher = open_teacher(visible, AUTO)
    assert isinstance(teacher, BundleTeacher)
    path = write_prefix(teacher.bundle.graph(), [teacher.bundle.blocks[1]], tmp_path)
    whole, part = onnx.load(teacher.bundle.graph()), onnx.load(path)
    assert [entry.name for entry in part.graph.output] == [output_of(teacher.bundle.blocks[1])]
    blocks = {
        name.split(".")[1] for name in (entry.name for entry in part.graph.initializer) if name.startswith("blocks.")
    }
    assert blocks == {"0", "1"}
    assert len(part.graph.node) < len(whole.graph.node)
    assert not any(entry.name.startswith("norm") for entry in part.graph.initializer)


def test_classifiers_teach_logits(images: Path, tmp_path: Path) -> None:
    names = tuple(f"class-{index}" for index in range(11))
    checkpoint = write_checkpoint(tmp_path / "classifier", tiny_classifier("avg"), class_names=names)
    exported = bundle(checkpoint, images, tmp_path / "bundle", threads=1)
    teacher = open_teacher(exported, AUTO)
    assert (teacher.kind, teacher.num_classes, teacher.class_names) == ("classifier", 11, names)
    wanted = {Tap("logits"), Tap("pooled"), Tap("tokens", 1)}
    assert_same(
        ready(teacher, wanted)(batch_of(), None, whole=True),
        ready(open_teacher(checkpoint, FP32), wanted)(batch_of(), None, whole=True),
    )
    with pytest.raises(ConfigError, match="gives no latent") as error:
        ready(open_teacher(exported, AUTO), {Tap("latent")})
    assert "mean-pooled classifier" in str(error.value.hint)


def test_a_graph_has_one_size(visible: Path) -> None:
    other = replace(ENCODER, name="other", image_size=(8, 14))
    with pytest.raises(ConfigError, match="sees 3x5 patches, the student 4x7") as error:
        ready(open_teacher(visible, AUTO), {Tap("tokens", 1)}, student=other)
    assert "--image-size 8,14" in str(error.value.hint)
    teacher = ready(open_teacher(visible, TeacherConfig(teacher_grid="interpolate")), {Tap("tokens", 1)}, student=other)
    assert teacher(batch_of(other), masking_of(other), whole=True)[Tap("tokens", 1)].shape == (3, 9, 20)
    with pytest.raises(ConfigError, match="can only be shown whole"):
        check_view(teacher, masked=True, whole=False)


def test_the_key_knows_the_engine_and_the_taps(visible: Path, full: Path) -> None:
    def key(path: Path, *wanted: Tap) -> str:
        return ready(open_teacher(path, AUTO), wanted).key

    keys = {
        key(visible, Tap("latent")),
        key(visible, Tap("tokens", 2)),
        key(visible, Tap("tokens", 1)),
        key(full, Tap("latent")),
    }
    assert len(keys) == 4
    assert key(visible, Tap("latent")) in keys


def test_engines_by_name(visible: Path, checkpoint: Path) -> None:
    teacher = ready(open_teacher(visible, TeacherConfig(teacher_engine="openvino")), {Tap("tokens", 2)})
    assert isinstance(teacher, BundleTeacher)
    assert teacher.engine.name == "openvino"
    expected = ready(open_teacher(checkpoint, FP32), {Tap("tokens", 2)})(batch_of(), masking_of(), whole=False)
    # Two libraries' float32; OpenVINO sums in another order again.
    assert_same(teacher(batch_of(), masking_of(), whole=False), expected)


def test_auto_where_the_engine_is_installed_and_does_not_load(
    visible: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise MissingDependency("libopenvino.so is missing")

    monkeypatch.setattr(openvino_engine, "import_openvino", fail)
    teacher = open_teacher(visible, AUTO)
    assert isinstance(teacher, BundleTeacher)
    teacher.bundle.manifest["engine"] = "openvino"
    ready(teacher, {Tap("tokens", 2)})
    assert teacher.engine.name == "onnxruntime"
    assert "instead of OpenVINO: libopenvino.so is missing" in caplog.text
    named = open_teacher(visible, TeacherConfig(teacher_engine="openvino"))
    with pytest.raises(MissingDependency):
        ready(named, {Tap("tokens", 2)})


@pytest.mark.parametrize(("asked_for", "kind"), [("trt", "TensorRtEngine"), ("trt-rtx", "TensorRtRtxEngine")])
def test_tensorrt_builds_the_cut_graph(
    asked_for: Any, kind: str, visible: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as it can be seen without a GPU: ONNX Runtime stands for the engine; tests/gpu builds real ones."""
    asked: list[dict[str, Any]] = []

    def build_plan(graph: Path, file: Path, **settings: Any) -> None:
        asked.append({"graph": graph, **settings})
        file.write_bytes(b"plan")

    class Opened(OnnxRuntimeEngine):
        def __init__(self, plan: Path, options: EngineOptions, *, precision: str, profiles: Any) -> None:
            assert (plan.read_bytes(), options.device) == (b"plan", "cuda")
            super().__init__(asked[0]["graph"], EngineOptions(threads=1), precision=precision, profiles=profiles)

    monkeypatch.setattr(tensorrt_build, "build_plan", build_plan)
    monkeypatch.setattr(tensorrt_engine, kind, Opened)
    teacher = ready(open_teacher(visible, TeacherConfig(teacher_engine=asked_for)), {Tap("tokens", 2)})
    assert isinstance(teacher, BundleTeacher)
    (settings,) = asked
    assert (settings["index"], settings["rtx"]) == (0, asked_for == "trt-rtx")
    sizes = {name: tuple(numbers) for name, numbers in teacher.bundle.manifest["profile"].items()}
    assert (settings["precision"], settings["typing"], settings["profiles"]) == ("fp32", "weak", [sizes])
    assert teacher.engine.profiles == [sizes]
    expected = ready(open_teacher(checkpoint, FP32), {Tap("tokens", 2)})
    many = batch_of(batch=37), masking_of(batch=37)  # more than the profile's 32
    assert_same(teacher(*many, whole=False), expected(*many, whole=False))
