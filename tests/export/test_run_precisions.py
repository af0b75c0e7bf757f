"""Every token mode in every precision, for both engines: `export` proves it, `verify` repeats that on either engine,
and `Backbone` runs it on any images.

Through the command line, as users do.
"""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mae_deploy.cli import main
from mae_deploy.errors import ConfigError
from mae_deploy.export.reference import Reference
from mae_deploy.images.find import find_images
from mae_deploy.images.read import Array, read_image
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.position import interpolate_position_embedding
from mae_deploy.models.pyramid import SimpleFeaturePyramid
from mae_deploy.runtime import Backbone, Bundle
from tests.export.robust_exports import CONFIG, DECODER, Exports, robust_mae, write_blots
from tests.export.tiny_exports import pytorch_outputs, read_graph, sqnr, write_checkpoint
from tests.models.tiny_models import fill

SHALLOW = replace(CONFIG, depth=1)

PRECISIONS: dict[str, tuple[str, ...]] = {
    "fp32": ("--precision", "fp32"),
    "fp16": ("--precision", "fp16"),
    "bf16": ("--precision", "bf16"),
    "dynamic": ("--precision", "int8", "--quantization", "dynamic"),
    "static": ("--precision", "int8", "--quantization", "static"),
}
FLOORS = {"fp32": 100, "fp16": 45, "bf16": 35, "dynamic": 30, "static": 30}
"""dB for images that the export has not seen. Its own limits, but FP32's, which has none: 1e-5 of the largest
number."""

MODES: dict[str, tuple[str, ...]] = {
    "full": ("--tokens", "full"),
    "visible": ("--tokens", "visible"),
    "ragged": ("--tokens", "ragged"),
    # One patch tells a decoder too little of an image to bear the noise of INT8.
    "reconstruct": ("--tokens", "reconstruct", "--profile", "K:4,6,15"),
}
KEEP: dict[str, Any] = {
    "full": None,
    "visible": [3, 1, 14, 0, 9],
    "ragged": [[3, 1, 14, 0, 9], [7], list(range(15))],
    "reconstruct": [3, 1, 14, 0, 9],
}


def quantized(precision: str, root: Path) -> list[object]:
    """All Linears in INT8 at any speed: graphs of this size gain nothing."""
    if precision not in ("dynamic", "static"):
        return []
    return [
        "--max-latency",
        1000,
        "--no-search",
        *(["--calib-data", root / "calibration"] if precision == "static" else []),
    ]


def unseen() -> list[Array]:
    """Images of three sizes, uint8 `(H, W, 3)`."""
    return [
        np.kron(
            np.random.default_rng(size).integers(0, 256, (2, 2, 3), dtype=np.uint8),
            np.ones((size, size + 2, 1), np.uint8),
        )
        for size in (4, 7, 23)
    ]


def unseen_image(number: int) -> Image.Image:
    return Image.fromarray(unseen()[number])


def given(keep: Any) -> dict[str, Array] | None:
    """The rows as a graph takes them."""
    if keep is None:
        return None
    if isinstance(keep[0], int):
        return {"ids_keep": np.array([keep] * 3)}
    ids = np.zeros((len(keep), max(map(len, keep))), np.int64)
    for row, real in zip(ids, keep, strict=True):
        row[: len(real)] = real
    return {"ids_keep": ids, "num_keep": np.array([len(row) for row in keep])}


def installed() -> list[str]:
    """The engines that are there."""
    return [engine for engine in ("onnxruntime", "openvino") if util.find_spec(engine) is not None]


def runs_as_pytorch(out: Path, model: MaskedAutoencoder, keep: Any, floor: float, engine: str = "auto") -> None:
    """Whether images that the export has not seen give what PyTorch gives, on the engine that the bundle is proven
    on.
    """
    with Backbone.load(out, engine, threads=1) as backbone:
        found = backbone(unseen(), keep)
        expected = pytorch_outputs(model, backbone.preprocess([*unseen()]), given(keep))
    for name in backbone.output_names:
        assert found[name].shape == expected[name].shape
        assert sqnr(found[name], expected[name]) > floor, name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_for_onnx_runtime(exports: Exports, robust: Path, mode: str, precision: str) -> None:
    result = exports.passed(*MODES[mode], *PRECISIONS[precision], *quantized(precision, robust))
    manifest = exports.manifest
    name = PRECISIONS[precision][1]
    assert (
        (result["precision"], result["engine"]) == (manifest["precision"], manifest["engine"]) == (name, "onnxruntime")
    )
    assert list(manifest["parity"]) == [f"onnx-{name}"]
    assert manifest["parity"][f"onnx-{name}"]["passed"] is True
    if name == "int8":
        assert (result["quantization"]["policy"], len(result["quantization"]["quantized"])) == (
            precision,
            12 if mode == "reconstruct" else 8,
        )
    verified = exports.verified("--layers")
    assert (verified["engine"], verified["layers"]["lost_at"], len(verified["layers"]["blocks"])) == (
        "onnxruntime",
        None,
        2,
    )
    runs_as_pytorch(exports.out, robust_mae(), KEEP[mode], FLOORS[precision])
    pytest.importorskip("openvino")
    verified = exports.verified("--engine", "openvino", *(["--layers"] if mode == "ragged" else []))
    assert verified["engine"] == "openvino"
    assert mode != "ragged" or verified["layers"]["lost_at"] is None


@pytest.fixture
def shallow(exports: Exports, robust: Path) -> Exports:
    """Exports of a model of one block: OpenVINO compiles a graph for a tenth of a second."""
    model = robust_mae(SHALLOW)
    exports.checkpoint = robust / "shallow"
    if not exports.checkpoint.is_dir():
        write_checkpoint(exports.checkpoint, model)
    return exports


# A dynamic graph for OpenVINO is the one for ONNX Runtime, which is verified on both above.
@pytest.mark.parametrize(
    ("precision", "mode"),
    [
        *((precision, mode) for precision in ("fp32", "fp16", "bf16", "static") for mode in MODES),
        ("dynamic", "visible"),
    ],
)
def test_for_openvino(shallow: Exports, robust: Path, mode: str, precision: str) -> None:
    pytest.importorskip("openvino")
    result = shallow.passed("--engine", "openvino", *MODES[mode], *PRECISIONS[precision], *quantized(precision, robust))
    assert (result["engine"], shallow.manifest["parity"][f"onnx-{PRECISIONS[precision][1]}"]["engine"]) == (
        "openvino",
        "openvino",
    )
    if precision != "bf16":  # strongly typed, see below
        assert shallow.verified("--engine", "onnxruntime")["failures"] == []
    runs_as_pytorch(shallow.out, robust_mae(SHALLOW), KEEP[mode], FLOORS[precision])


def test_a_cached_graph_of_static_int8_for_openvino(shallow: Exports, robust: Path) -> None:
    pytest.importorskip("openvino")
    budget = ("--min-cosine", "0.98")  # the first update of so small a network sees one patch
    given = (*PRECISIONS["static"], *quantized("static", robust), *budget)
    shallow.passed("--engine", "openvino", "--tokens", "cached", *given)
    assert shallow.verified()["failures"] == []


# --- what else goes into and comes out of a graph --------------------------------------------------------------------


def test_uint8_images(exports: Exports) -> None:
    exports.passed("--images", "uint8", "--tokens", "visible")
    bundle = Bundle.load(exports.out)
    golden = bundle.golden()
    assert (golden["images"].dtype.name, golden["images"].shape) == ("uint8", (8, 6, 10, 3))
    np.testing.assert_array_equal(
        golden["images"],
        np.stack([bundle.preprocess.crop(read_image(path)) for path in find_images(exports.photos)[:8]]),
    )
    for engine in installed():
        exports.verified("--engine", engine)
    runs_as_pytorch(exports.out, robust_mae(), KEEP["visible"], FLOORS["fp32"])
    with Backbone.load(exports.out, threads=1) as backbone, pytest.raises(ConfigError, match="float32"):
        backbone(np.zeros((1, 3, 6, 10), np.float32), [0])


def test_uint8_images_and_int8_linears(exports: Exports, robust: Path) -> None:
    exports.passed("--images", "uint8", "--precision", "int8", "--max-latency", 1000)
    assert exports.verified()["failures"] == []
    runs_as_pytorch(exports.out, robust_mae(), None, FLOORS["dynamic"])


def test_float16_in_and_out(exports: Exports) -> None:
    exports.passed("--precision", "fp16", "--images", "float16", "--features", "float16", "--tokens", "ragged")
    assert {entry["dtype"] for entry in exports.manifest["graph"]["outputs"]} == {"float16"}
    assert exports.manifest["typing"] == "strong"
    for engine in installed():
        exports.verified("--engine", engine, "--layers")
        with Backbone.load(exports.out, engine, threads=1) as backbone:
            assert {array.dtype for array in backbone(unseen(), KEEP["ragged"]).values()} == {np.dtype(np.float16)}
    runs_as_pytorch(exports.out, robust_mae(), KEEP["ragged"], FLOORS["fp16"])


def test_weak_fp16_is_stored_in_half_the_size(exports: Exports) -> None:
    exports.passed("--precision", "fp16", "--typing", "weak")
    stored = {tensor.name: tensor.data_type for tensor in read_graph(exports.out / "encoder.onnx").graph.initializer}
    assert stored["blocks.0.mlp.fc1.weight"] == onnx.TensorProto.FLOAT16
    assert stored["patch_embed.proj.weight"] == onnx.TensorProto.FLOAT
    assert exports.manifest["typing"] == "weak"
    for engine in installed():
        exports.verified("--engine", engine)


def casts(exports: Exports) -> int:
    return sum(node.op_type == "Cast" for node in read_graph(exports.out / "encoder.onnx").graph.node)


def test_what_stays_fp32_in_an_fp16_graph(exports: Exports) -> None:
    counts = []
    for number, islands in enumerate(("softmax", "softmax,gelu,norm,residual")):
        exports.out = exports.out.with_name(f"bundle-{number}")
        exports.passed("--precision", "fp16", "--fp32-ops", islands)
        assert exports.manifest["provenance"]["export"]["fp32_ops"] == islands.split(",")
        counts.append(casts(exports))
    assert counts[0] < counts[1]


def overflowing(exports: Exports, tmp_path: Path, largest: float) -> None:
    """The second block adds values beyond FP16's 65,504, from weights of this size; FP32 bears them."""
    model = robust_mae()
    with torch.no_grad():
        weight = model.state_dict()["blocks.1.mlp.fc2.weight"]
        weight.mul_(largest / weight.abs().max())
    exports.checkpoint = write_checkpoint(tmp_path / "overflowing", model, licence="own")


def test_fp16_that_overflows_is_said_with_its_cause_first_and_a_line_an_output(
    exports: Exports, tmp_path: Path
) -> None:
    overflowing(exports, tmp_path, 6e4)
    code, said = exports("--precision", "fp16")
    *errors, hint = said.splitlines()
    assert code == 1
    assert re.fullmatch(
        r"error: the exported fp16 graph misses parity with PyTorch: block 1 is the first with NaN or infinite values,"
        r" after a largest value of [\d.]+",
        errors[0],
    )
    assert [line.split(":")[1] for line in errors[1:]] == [" cls", " tokens", " pooled"]
    assert all(re.search(r": the output has \d+ NaN or infinite values$", line) for line in errors[1:])
    assert hint == (
        "hint: nothing was written; FP16 ends at 65,504; keep more in FP32, with --fp32-ops softmax,residual,norm,gelu,"
        " or export fp32 or bf16"
    )
    assert exports.left == set()


def test_weights_beyond_fp16_are_named(exports: Exports, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    overflowing(exports, tmp_path, 7e4)
    code, said = exports("--precision", "fp16")
    assert (code, len(recwarn)) == (1, 0)
    assert said.splitlines() == [
        "error: the weight blocks.1.mlp.fc2.weight reaches 7e+04, and FP16 ends at 65,504",
        "hint: export fp32 or bf16",
    ]
    assert exports.left == set()


def test_pytorch_s_own_nan_is_said_before_any_graph(exports: Exports, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(reference: Reference, *arguments: Any) -> dict[str, Array]:
        found = outputs(reference, *arguments)
        found["pooled"][1, 2] = np.nan
        return found

    outputs = Reference.outputs
    monkeypatch.setattr(Reference, "outputs", broken)
    code, said = exports()
    assert code == 1
    assert said.startswith("error: PyTorch itself gives NaN or infinite values: pooled\n")


def test_blocks_as_outputs(exports: Exports) -> None:
    assert [row["name"] for row in exports.passed("--layers", "0,1", "--tokens", "ragged")["parity"]] == [
        "cls",
        "tokens",
        "pooled",
        "block_0",
        "block_1",
    ]
    for engine in installed():
        exports.verified("--engine", engine, "--layers")
    runs_as_pytorch(exports.out, robust_mae(), KEEP["ragged"], FLOORS["fp32"])
    with Backbone.load(exports.out, threads=1) as backbone:
        assert not backbone(unseen(), KEEP["ragged"])["block_0"][1, 1:].any(), "padding"


def test_a_feature_map_has_zeros_where_no_patch_is_seen(exports: Exports) -> None:
    exports.passed("--outputs", "feature_map", "--tokens", "visible")
    runs_as_pytorch(exports.out, robust_mae(), KEEP["visible"], FLOORS["fp32"])


def test_a_random_pyramid_is_that_of_the_seed(exports: Exports) -> None:
    found = []
    for number, seed in enumerate((0, 0, 1)):
        exports.out = exports.out.with_name(f"bundle-{number}")
        exports.passed("--pyramid", "random", "--outputs", "p4,p5", "--num-samples", 2, seed=seed)
        with Backbone.load(exports.out, threads=1) as backbone:
            found.append(backbone(unseen()))
    assert {name: array.shape for name, array in found[0].items()} == {"p4": (3, 256, 3, 5), "p5": (3, 256, 1, 2)}
    np.testing.assert_array_equal(found[0]["p4"], found[1]["p4"])
    assert (found[0]["p4"] != found[2]["p4"]).any()
    assert exports.manifest["provenance"]["pyramid"] == {"source": "random", "seed": 1}
    assert exports.manifest["licence"] == "own"


def test_a_trained_pyramid(exports: Exports, tmp_path: Path) -> None:
    pyramid = fill(SimpleFeaturePyramid(CONFIG.width, 7))
    save_file(
        {f"backbone.{name}": tensor for name, tensor in pyramid.state_dict().items()}, tmp_path / "detector.safetensors"
    )
    exports.passed("--pyramid", tmp_path / "detector.safetensors", "--layers", "1")
    assert [entry["name"] for entry in exports.manifest["graph"]["outputs"]] == [
        "cls",
        "tokens",
        "pooled",
        "block_1",
        "p2",
        "p3",
        "p4",
        "p5",
    ]
    assert exports.manifest["provenance"]["pyramid"]["source"] == "detector.safetensors"
    assert exports.manifest["licence"] == "unspecified"
    for engine in installed():
        exports.verified("--engine", engine)
    with Backbone.load(exports.out, threads=1) as backbone:
        found = backbone(unseen())
        expected = pytorch_outputs(robust_mae(), backbone.preprocess([*unseen()]), pyramid=pyramid)
    for level in ("p2", "p3", "p4", "p5"):
        assert sqnr(found[level], expected[level]) > FLOORS["fp32"]


def test_pixels_in_each_space(exports: Exports) -> None:
    """The decoder predicts patches of mean 0 and variance 1 (norm_pix_loss); `normalised` undoes that with the input's
    own, `image` the normalisation too.
    """
    found: dict[str, Array] = {}
    for space in ("target", "normalised", "image"):
        exports.out = exports.out.with_name(space)
        exports.passed("--tokens", "reconstruct:6", "--pixels", space, "--images", "uint8")
        exports.verified()
        with Backbone.load(exports.out, threads=1) as backbone:
            pixels = backbone.preprocess.crop(unseen_image(2))[None]
            found[space] = backbone.run_cropped(pixels, list(range(6)))["pixels"]
            mean, std = (np.tile(values, 4) for values in (backbone.preprocess.mean, backbone.preprocess.std))
            normalised = backbone.preprocess.normalise(pixels)
    patches = normalised.reshape(1, 3, 3, 2, 5, 2).transpose(0, 2, 4, 3, 5, 1).reshape(1, 15, 12)
    spread = np.sqrt(patches.var(axis=2, keepdims=True, ddof=1) + 1e-6)
    np.testing.assert_allclose(
        found["normalised"], found["target"] * spread + patches.mean(axis=2, keepdims=True), atol=1e-4
    )
    np.testing.assert_allclose(found["image"], found["normalised"] * std + mean, atol=1e-4)


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", ["visible", "ragged"])
def test_a_profile_holds_at_run_time(exports: Exports, tokens: str) -> None:
    exports.passed("--tokens", tokens, "--profile", "B:1,2,4 K:3,5,9")
    assert exports.manifest["profile"] == {"B": [1, 2, 4], "K": [3, 5, 9]}
    with Backbone.load(exports.out, threads=1) as backbone:
        for count in (3, 9):
            assert backbone(unseen(), list(range(count)))["tokens"].shape == (3, count, 40)
        for count in (2, 10):
            with pytest.raises(
                ConfigError, match=f"keep has {count} patches an image, the graph was checked for 3 to 9"
            ):
                backbone(unseen(), list(range(count)))
        with pytest.raises(ConfigError, match="graph takes 3 to 9 of 15 patches"):
            backbone(unseen())
    assert main(["predict", str(exports.out), str(exports.photos), "--num-keep", "10", "--threads", "1"]) == 2


@pytest.mark.parametrize(
    ("tokens", "precision"),
    [
        ("full", "dynamic"),
        ("visible:5", "fp16"),
        ("visible:5", "dynamic"),
        ("ragged:5", "dynamic"),
        ("reconstruct:5", "dynamic"),
    ],
)
def test_a_batch_fixed_to_more_than_the_samples(exports: Exports, robust: Path, tokens: str, precision: str) -> None:
    exports.passed("--tokens", tokens, "--batch", 13, *PRECISIONS[precision], *quantized(precision, robust))
    manifest = exports.manifest
    assert (manifest["batch"], manifest["profile"]["B"], manifest["golden"]["num_samples"]) == (13, [13, 13, 13], 8)
    assert all(entry["shape"][0] == 13 for entry in [*manifest["graph"]["inputs"], *manifest["graph"]["outputs"]])
    exports.verified("--layers")
    keep = {"full": None, "ragged:5": [[3, 1, 14, 0, 9], [7], [2, 4]]}.get(tokens, [3, 1, 14, 0, 9])
    runs_as_pytorch(exports.out, robust_mae(), keep, FLOORS[precision])


def test_another_image_size_interpolates_the_positions_of_the_decoder_too(exports: Exports) -> None:
    exports.passed("--tokens", "reconstruct", "--image-size", "14,8")
    exports.verified("--layers")
    bundle = Bundle.load(exports.out)
    model = robust_mae()
    larger = MaskedAutoencoder(replace(CONFIG, image_size=(14, 8)), DECODER).eval()
    tensors = dict(model.state_dict())
    for name in ("pos_embed", "decoder_pos_embed"):
        tensors[name] = interpolate_position_embedding(tensors[name], (3, 5), (7, 4))
    larger.load_state_dict(tensors)
    golden = {name: values.copy() for name, values in bundle.golden().items()}  # torch warns of read-only arrays
    expected = pytorch_outputs(larger, golden["images"], {"ids_keep": golden["ids_keep"]})
    assert (bundle.num_patches, golden["pixels"].shape) == (28, (8, 28, 12))
    np.testing.assert_allclose(golden["pixels"], expected["pixels"], atol=1e-4)


@pytest.mark.parametrize(
    ("channels", "mode", "images"), [(1, "L", "uint8"), (4, "RGBA", "float32"), (4, "RGBA", "uint8")]
)
def test_other_channels(exports: Exports, tmp_path: Path, channels: int, mode: str, images: str) -> None:
    config = replace(CONFIG, in_chans=channels)
    exports.checkpoint = write_checkpoint(tmp_path / "checkpoint", robust_mae(config))
    exports.photos = write_blots(tmp_path / "photos", 9, channels=channels)
    with Image.open(exports.photos / "000.png") as image:
        assert image.mode == mode
    exports.passed("--images", images, "--tokens", "reconstruct:5", "--pixels", "image")
    exports.verified()
    exports.out = exports.out.with_name("ragged")
    exports.passed("--images", images, "--tokens", "ragged")
    golden = Bundle.load(exports.out).golden()
    assert golden["images"].shape == ((8, 6, 10, channels) if images == "uint8" else (8, channels, 6, 10))
    with Backbone.load(exports.out, threads=1) as backbone:
        pixels = np.stack([np.resize(image, (6, 10, channels)) for image in unseen()])
        found = backbone(pixels, KEEP["ragged"])
        expected = pytorch_outputs(robust_mae(config), backbone.preprocess(list(pixels)), given(KEEP["ragged"]))
    assert sqnr(found["tokens"], expected["tokens"]) > FLOORS["fp32"]


# --- types in the graph ----------------------------------------------------------------------------------------------


def test_strongly_typed_int8(exports: Exports, robust: Path) -> None:
    exports.passed("--precision", "int8", "--typing", "strong", *quantized("static", robust), "--tokens", "visible")
    manifest = exports.manifest
    assert (manifest["typing"], manifest["graph"]["opset"], manifest["quantization"]["policy"]) == (
        "strong",
        19,
        "static",
    )
    for engine in installed():
        exports.verified("--engine", engine, "--layers")
    runs_as_pytorch(exports.out, robust_mae(), KEEP["visible"], FLOORS["static"])


def test_strongly_typed_bf16_is_for_openvino_alone(exports: Exports, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = exports("--precision", "bf16", "--typing", "strong")
    assert (code, said) == (
        2,
        (
            "error: --precision bf16 --typing strong: ONNX Runtime has no BF16 arithmetic on the CPU\n"
            "hint: pass --engine openvino, or leave --typing out: weights stored in BF16, computed in FP32"
        ),
    )
    pytest.importorskip("openvino")
    exports.passed("--precision", "bf16", "--engine", "openvino", "--tokens", "visible")
    assert exports.manifest["typing"] == "strong"
    assert exports.verified("--layers")["engine"] == "openvino"
    runs_as_pytorch(exports.out, robust_mae(), KEEP["visible"], FLOORS["bf16"])
    assert main(["verify", str(exports.out), "--engine", "onnxruntime"]) == 1
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ONNX Runtime cannot load ")
    assert (
        hint
        == "hint: this ONNX Runtime cannot compute in the graph's types: use engine openvino, or export the graph for"
        " ONNX Runtime"
    )


def test_weakly_typed_bf16_runs_on_both(exports: Exports) -> None:
    pytest.importorskip("openvino")
    exports.passed("--precision", "bf16", "--typing", "weak", "--engine", "openvino", "--tokens", "visible")
    for engine in installed():
        exports.verified("--engine", engine, "--layers")
    runs_as_pytorch(exports.out, robust_mae(), KEEP["visible"], FLOORS["bf16"])


def test_int8_attention_on_demand(exports: Exports, robust: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, embed_dim=48, num_heads=3)
    exports.checkpoint = write_checkpoint(tmp_path / "checkpoint", robust_mae(config))
    arguments = (
        "--precision",
        "int8",
        "--int8-attention",
        "--quantization",
        "static",
        "--min-sqnr",
        15,
        "--min-cosine",
        0.8,
    )
    exports.passed(*arguments, *quantized("static", robust))
    products = [node for node in read_graph(exports.out / "encoder.onnx").graph.node if node.name.endswith("/qk")]
    assert len(products) == 2
    assert exports.manifest["quantization"]["attention"] == ["blocks.0.attn", "blocks.1.attn"]
    exports.verified("--layers")


@pytest.mark.parametrize("engine", ["openvino"])
def test_an_engine_that_is_not_installed_is_said_first(
    exports: Exports, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, engine, None)
    code, said = exports("--engine", engine)
    assert code == 3
    assert said.endswith("hint: pip install 'mae-deploy[openvino]'")
    assert exports.left == set()
