"""Somebody else's ONNX of the same weights: torch's own exporter's is right, and whatever computes something else is a
miss that is named.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from mae_deploy.cli import main
from mae_deploy.models.config import EncoderConfig
from mae_deploy.models.vit import Classifier, Encoder
from tests.data.image_folders import write_noise
from tests.export.tiny_exports import write_checkpoint
from tests.models.families import family
from tests.models.tiny_models import ENCODER, tiny_classifier


class Others(nn.Module):
    """A classifier as others export it: the last hidden state, and scores."""

    def __init__(self, model: Classifier, flaw: str | None) -> None:
        super().__init__()
        self.model, self.flaw = model, flaw

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        images = images.flip(1) if self.flaw == "channels" else images
        images = images.permute(0, 3, 1, 2) if self.flaw == "last" else images
        images = (images - 0.5) / 0.5 if self.flaw == "normalises" else images
        tokens = Encoder.forward(self.model, images)
        scores = self.model.head(tokens[:, 0])
        if self.flaw == "tokens":
            tokens = tokens.flip(1)
        return tokens, scores.softmax(dim=-1) if self.flaw == "probs" else scores


def exported(path: Path, flaw: str | None = None, batch: int = 2, config: EncoderConfig = ENCODER) -> Path:
    model = tiny_classifier("cls", config).eval()
    images = torch.zeros(batch, model.config.in_chans, *model.config.image_size)
    images = images.permute(0, 2, 3, 1) if flaw == "last" else images
    names = {"input_names": ["pixel_values"], "output_names": ["last_hidden_state", "scores"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(Others(model, flaw), (images,), str(path), dynamo=False, **names)  # type: ignore[arg-type]
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_noise(tmp_path / "photos", 4)
    return write_checkpoint(tmp_path / "checkpoint", tiny_classifier("cls"))


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    return onnx.load(exported(tmp_path_factory.mktemp("right") / "other.onnx"))


def verified(checkpoint: Path, graph: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, Any, str]:
    photos = str(checkpoint.parent / "photos")
    code = main(["verify", str(checkpoint), "--graph", str(graph), "--samples", photos, "--json", *more])
    captured = capsys.readouterr()
    return code, json.loads(captured.out) if captured.out else None, captured.err


def test_torchs_own_export_is_right(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found, said = verified(checkpoint, exported(tmp_path / "other.onnx"), capsys)
    assert (code, found["failures"]) == (0, [])
    assert [check["name"] for check in found["outputs"]] == ["cls and tokens", "logits"]
    assert {check["check"] for check in found["invariances"]} == {"run again", "other neighbours"}
    assert "output 'last_hidden_state': taken for cls and tokens" in said


@pytest.mark.parametrize(("flaw", "failing"), [(None, set()), ("tokens", {"cls and tokens"})])
def test_registers_are_among_the_last_hidden_state(
    flaw: str | None, failing: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = family("DINOv3")
    write_noise(tmp_path / "photos", 4)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tiny_classifier("cls", config))
    code, found, said = verified(checkpoint, exported(tmp_path / "other.onnx", flaw, config=config), capsys)
    assert code == int(bool(failing))
    assert {check["name"] for check in found["outputs"] if not check["passed"]} == failing
    assert "taken for cls and tokens, 40 x 24" in said


def test_probabilities_are_told_from_logits(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found, _ = verified(checkpoint, exported(tmp_path / "other.onnx", "probs"), capsys)
    assert (code, found["outputs"][1]["name"]) == (0, "probs")


@pytest.mark.parametrize(
    ("flaw", "missed"), [("channels", {"cls and tokens", "logits"}), ("tokens", {"cls and tokens"})]
)
def test_what_computes_something_else_is_a_miss(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flaw: str, missed: set[str]
) -> None:
    code, found, said = verified(checkpoint, exported(tmp_path / "other.onnx", flaw), capsys)
    assert code == 1
    assert {check["name"] for check in found["outputs"] if not check["passed"]} == missed
    assert "other.onnx is not" in said


@pytest.mark.parametrize(
    ("flaw", "fits"), [("channels", "their channels in the other order"), ("normalises", "pixels from 0 to 1")]
)
def test_what_is_done_to_the_images_is_named(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flaw: str, fits: str
) -> None:
    metadata = json.loads((checkpoint / "metadata.json").read_text())
    metadata["preprocess"].update(mean=[0.5] * 3, std=[0.5] * 3)
    (checkpoint / "metadata.json").write_text(json.dumps(metadata))
    code, _, said = verified(checkpoint, exported(tmp_path / "other.onnx", flaw), capsys)
    assert code == 1
    assert f"other.onnx is right for images {'with' if flaw == 'channels' else 'as'} {fits}" in said


def test_channels_may_come_last(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, said = verified(checkpoint, exported(tmp_path / "other.onnx", "last"), capsys)
    assert code == 0
    assert "input 'pixel_values': images with channels last" in said


def _sequence(graph: onnx.GraphProto) -> None:
    graph.node.append(onnx.helper.make_node("SplitToSequence", ["scores"], ["parts"], axis=1))
    graph.output.append(onnx.helper.make_tensor_sequence_value_info("parts", onnx.TensorProto.FLOAT, None))


def _text(graph: onnx.GraphProto) -> None:
    graph.node.append(onnx.helper.make_node("Cast", ["scores"], ["text"], to=onnx.TensorProto.STRING))
    graph.output.append(onnx.helper.make_tensor_value_info("text", onnx.TensorProto.STRING, None))


def _side(axis: int, size: int) -> Callable[[onnx.GraphProto], None]:
    def edit(graph: onnx.GraphProto) -> None:
        graph.input[0].type.tensor_type.shape.dim[axis].dim_value = size

    return edit


def _no_shape(graph: onnx.GraphProto) -> None:
    graph.input[0].type.tensor_type.ClearField("shape")


@pytest.mark.parametrize(
    ("edit", "code", "words"),
    [
        (_sequence, 1, "the output 'parts' is no tensor, but a list"),
        (_text, 2, "output 'text' of"),
        (_side(0, 1 << 40), 2, "takes 1,099,511,627,776 images at once; at most 1,024 can be checked"),
        (_side(0, -1), 2, "cannot be followed for 1 image"),  # open, as others write it, and it is not
        (_side(3, 99), 2, "takes float32 (2, 3, 6, 99); images of this checkpoint are float32 (?, 3, 6, 10)"),
        (_no_shape, 2, "'pixel_values' has no shape"),
    ],
)
def test_graphs_of_other_kinds_are_named(
    edit: Callable[[onnx.GraphProto], None],
    code: int,
    words: str,
    checkpoint: Path,
    right: onnx.ModelProto,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(right)
    edit(model.graph)
    onnx.save(model, tmp_path / "other.onnx")
    found, _, said = verified(checkpoint, tmp_path / "other.onnx", capsys)
    assert found == code
    assert words in said.replace("\n", " ")
    assert "Error:" not in said.replace("error:", "")


def test_a_graph_of_ours_by_names_of_ours(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = str(tmp_path / "photos")
    out = tmp_path / "bundle"
    assert main(["export", str(checkpoint), "--tokens", "visible", "--samples", photos, "--out", str(out)]) == 0
    capsys.readouterr()
    code, found, _ = verified(checkpoint, out / "encoder.onnx", capsys)
    assert (code, [check["name"] for check in found["outputs"]]) == (0, ["logits", "cls", "tokens", "pooled"])
    assert "sample alone" in {check["check"] for check in found["invariances"]}
    assert [check["check"] for check in found["trials"]][::4] == ["K=1", "K=15", "black, white, noise"]


def test_a_graph_of_a_fixed_number_of_patches_is_given_every_patch(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, options = tmp_path / "bundle", ("--samples", str(tmp_path / "photos"), "--outputs", "tokens")
    assert main(["export", str(checkpoint), "--tokens", "visible:2", *options, "--out", str(out)]) == 0
    capsys.readouterr()
    graph = onnx.load(out / "encoder.onnx")
    (positions,) = (tensor for tensor in graph.graph.initializer if "position" in tensor.name)
    values = numpy_helper.to_array(positions).copy()
    values[-1] = values[-2]
    positions.CopyFrom(numpy_helper.from_array(values, positions.name))
    onnx.save(graph, out / "stale.onnx")
    for name, failing in (("encoder.onnx", set()), ("stale.onnx", {"every patch"})):
        _, found, _ = verified(checkpoint, out / name, capsys)
        missed = {check["check"] for kind in ("outputs", "trials") for check in found[kind] if not check["passed"]}
        assert failing <= missed
        assert bool(failing) == bool(missed)


def test_outputs_that_the_checkpoint_has_not_got(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = onnx.load(exported(tmp_path / "other.onnx"))
    model.graph.node.append(onnx.helper.make_node("Concat", ["scores", "scores"], ["twice"], axis=1))
    model.graph.output.append(onnx.helper.make_tensor_value_info("twice", onnx.TensorProto.FLOAT, None))
    onnx.save(model, tmp_path / "other.onnx")
    code, _, said = verified(checkpoint, tmp_path / "other.onnx", capsys)
    assert code == 2
    assert "output 'twice'" in said
    assert "this checkpoint gives logits" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--layers",), "--layers needs a bundle"),
        (("--graph", "absent.onnx"), "no ONNX file at absent.onnx"),
    ],
)
def test_what_cannot_be_asked(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    (tmp_path / "text.onnx").write_text("no graph")
    code, _, found = verified(checkpoint, tmp_path / "text.onnx", capsys, *arguments)
    assert code == 2
    assert said in found


def test_a_file_that_is_no_graph(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.onnx").write_text("no graph")
    code, _, said = verified(checkpoint, tmp_path / "text.onnx", capsys)
    assert code == 2
    assert "is not an ONNX model" in said


def test_a_bundle_has_its_own_tolerance(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(checkpoint), "--precision", "fp16"]) == 2
    assert "--precision is about --graph" in capsys.readouterr().err
