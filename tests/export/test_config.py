"""What `export` accepts on its command line, and what it makes of it."""

from __future__ import annotations

import math
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from mae_deploy.errors import ConfigError
from mae_deploy.export import config as config_module
from mae_deploy.export.config import ExportConfig
from mae_deploy.export.int8_config import Int8Config
from mae_deploy.runtime.profiles import Range
from mae_deploy.runtime.tensorrt.options import BuildOptions, tensorrt_major


def settings(**more: Any) -> ExportConfig:
    return ExportConfig(checkpoint=Path("checkpoint"), out=Path("bundle"), **more)


def int8(**more: Any) -> dict[str, Any]:
    """Settings of an INT8 export."""
    return {"precision": "int8", "int8": Int8Config(**more)}


DATA = Path("images")


# --- tokens and sizes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "mode", "keep"),
    [
        ("full", "full", None),
        ("visible", "visible", None),
        ("visible:1", "visible", 1),
        ("visible:49", "visible", 49),
        ("visible:049", "visible", 49),
        ("ragged", "ragged", None),
        ("ragged:120", "ragged", 120),
        ("reconstruct", "reconstruct", None),
        ("reconstruct:49", "reconstruct", 49),
    ],
)
def test_tokens(tokens: str, mode: str, keep: int | None) -> None:
    config = settings(tokens=tokens)
    assert (config.token_mode, config.keep) == (mode, keep)


@pytest.mark.parametrize(
    "tokens",
    [
        *("", "bogus", "Full", ":3", "pixels", "full:", "full:49", "ragged:", "reconstruct:0", "cached:"),
        *(
            "visible:",
            "visible:0",
            "visible:-3",
            "visible:3.0",
            "visible:x",
            "visible:²",
            "visible:4:9",
            f"visible:{'9' * 5000}",
        ),
    ],
)
def test_tokens_that_mean_nothing(tokens: str) -> None:
    with pytest.raises(
        ConfigError, match=f"^--tokens '{re.escape(tokens)}' is not full, visible, ragged, reconstruct or cached$"
    ) as caught:
        settings(tokens=tokens)
    assert "visible:49" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"cache": "float16"}, "--cache float16 needs --tokens cached, not full"),
        ({"cache": "float16", "tokens": "cached"}, "--cache float16 with --precision fp32"),
        ({"triton": Path("models"), "tokens": "cached"}, "--triton models with --tokens cached"),
        (
            {"tokens": "cached", **int8(calib_data=DATA, int8_attention=True, quantization="static")},
            "--int8-attention with --tokens cached",
        ),
    ],
)
def test_what_streams_cannot_have(more: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}"):
        settings(**more)


@pytest.mark.parametrize(
    ("more", "dtype"),
    [
        ({"tokens": "cached"}, "float32"),
        ({"tokens": "cached", "precision": "fp16"}, "float16"),
        ({"tokens": "cached", "precision": "fp16", "cache": "float32"}, "float32"),
        ({"tokens": "cached", "precision": "bf16", "cache": "float16"}, "float16"),
    ],
)
def test_the_type_of_keys_and_values(more: dict[str, Any], dtype: str) -> None:
    assert settings(**more).cache_type == dtype


@pytest.mark.parametrize(("batch", "fixed"), [("dynamic", None), ("1", 1), ("17", 17)])
def test_batch(batch: str, fixed: int | None) -> None:
    assert settings(batch=batch).fixed_batch == fixed


@pytest.mark.parametrize("batch", ["0", "-1", "1.5", "many", "", "²", "1" * 10, "9" * 5000])
def test_batches_that_mean_nothing(batch: str) -> None:
    with pytest.raises(ConfigError, match=f"--batch '{batch}' is not a whole number of at least 1, or dynamic"):
        settings(batch=batch)


@pytest.mark.parametrize(
    ("more", "num_patches", "ranges"),
    [
        ({}, 196, {"B": (1, 8, 32)}),
        ({"batch": "3"}, 196, {"B": (3, 3, 3)}),
        ({"tokens": "visible"}, 196, {"B": (1, 8, 32), "K": (1, 49, 196)}),
        ({"tokens": "ragged"}, 3, {"B": (1, 8, 32), "K": (1, 1, 3)}),
        ({"tokens": "reconstruct:49", "batch": "5"}, 196, {"B": (5, 5, 5), "K": (49, 49, 49)}),
        ({"tokens": "visible", "profile": "K:20,49,100"}, 196, {"B": (1, 8, 32), "K": (20, 49, 100)}),
        ({"tokens": "visible", "profile": "K:20,49,196 B:2,2,7"}, 196, {"B": (2, 2, 7), "K": (20, 49, 196)}),
        ({"tokens": "visible", "batch": "4", "profile": "K:5,5,5"}, 15, {"B": (4, 4, 4), "K": (5, 5, 5)}),
        ({"tokens": "visible:7", "profile": " B:1,1,2 "}, 15, {"B": (1, 1, 2), "K": (7, 7, 7)}),
    ],
)
def test_ranges(more: dict[str, Any], num_patches: int, ranges: dict[str, Range]) -> None:
    assert settings(**more).ranges(num_patches) == ranges


@pytest.mark.parametrize("more", [{"tokens": "visible:16"}, {"tokens": "ragged", "profile": "K:1,2,16"}])
def test_more_patches_than_the_image_has(more: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="K 16 is more than the 15 patches of this model"):
        settings(**more).ranges(15)


@pytest.mark.parametrize(
    "profile",
    [
        "K",
        "K:1,2",
        "K:1,2,3,4",
        "K:3,2,1",
        "K:2,1,3",
        "K:0,1,2",
        "K:1, 2,3",
        "N:1,2,3",
        "K:1,2,3 K:1,2,3",
        "K:1,2,x",
        "K:-1,2,3",
        "K:1,2,3;",
    ],
)
def test_profiles_that_mean_nothing(profile: str) -> None:
    with pytest.raises(ConfigError, match=f"^--profile '{re.escape(profile)}' is not min,opt,max$") as caught:
        settings(tokens="visible", profile=profile)
    assert (
        caught.value.hint
        == "write min,opt,max for B, K or both, such as 'B:1,8,32 K:20,49,196'; several are separated by ';'"
    )


@pytest.mark.parametrize(
    ("more", "name"),
    [({"batch": "3", "profile": "B:1,2,3"}, "B"), ({"tokens": "visible:4", "profile": "K:1,2,3 B:1,2,3"}, "K")],
)
def test_a_range_for_what_is_fixed(more: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=f"gives a range for {name}, which is fixed"):
        settings(**{"tokens": "visible", **more})


def test_a_range_of_k_where_all_patches_are_seen() -> None:
    with pytest.raises(ConfigError, match="a graph of all patches has no K"):
        settings(profile="K:1,2,3")


# --- TensorRT --------------------------------------------------------------------------------------------------------


def trt(**more: Any) -> ExportConfig:
    return settings(engine="trt", **more)


@pytest.mark.parametrize(
    ("more", "profiles"),
    [
        ({}, [{"B": (1, 1, 1)}]),
        ({"batch": "8"}, [{"B": (8, 8, 8)}]),
        ({"batch": "dynamic"}, [{"B": (1, 8, 32)}]),
        ({"profile": "B:1,2,4"}, [{"B": (1, 2, 4)}]),
        ({"tokens": "visible:5"}, [{"B": (1, 1, 1), "K": (5, 5, 5)}]),
        ({"tokens": "visible", "profile": "K:3,5,9"}, [{"B": (1, 1, 1), "K": (3, 5, 9)}]),
        (
            {"tokens": "visible", "profile": "B:1,1,1 K:5,5,5; B:8,32,64 K:3,4,9"},
            [{"B": (1, 1, 1), "K": (5, 5, 5)}, {"B": (8, 32, 64), "K": (3, 4, 9)}],
        ),
    ],
)
def test_an_engine_is_static_unless_a_size_is_left_open(more: dict[str, Any], profiles: list[dict[str, Range]]) -> None:
    assert trt(**more).profiles(15) == profiles
    assert trt(**more).fixed_batch == (
        profiles[0]["B"][0] if len({size for profile in profiles for size in profile["B"]}) == 1 else None
    )


def test_a_manifest_has_the_sizes_of_all_profiles() -> None:
    config = trt(tokens="visible", profile="B:2,4,4 K:5,5,5; B:8,32,64 K:3,4,9")
    assert config.ranges(15) == {"B": (2, 4, 64), "K": (3, 5, 9)}


def test_other_engines_have_one_profile() -> None:
    with pytest.raises(ConfigError, match="only engines of TensorRT have several profiles"):
        settings(profile="B:1,1,1; B:8,8,8")


@pytest.mark.parametrize(
    ("installed", "more", "typing", "islands", "stored"),
    [
        (None, {}, "strong", (), "fp32"),
        (None, {"precision": "fp16"}, "strong", (), "fp16"),
        (10, {"precision": "fp16", "fp32_ops": ("softmax",)}, "strong", ("softmax",), "fp16"),
        (11, {"precision": "bf16"}, "strong", ("gelu", "norm", "residual"), "bf16"),
        (11, int8(calib_data=DATA), "strong", (), "int8"),
        (8, {"precision": "fp16"}, "weak", (), "fp32"),
        (8, {"precision": "fp16", "typing": "strong"}, "strong", (), "fp16"),
        (10, {"precision": "bf16", "typing": "weak"}, "weak", (), "fp32"),
        (8, int8(calib_data=DATA), "weak", (), "int8"),
        (8, {**int8(calib_data=DATA), "precision": "fp8"}, "strong", (), "fp8"),
    ],
)
def test_what_a_version_of_tensorrt_reads(
    installed: int | None,
    more: dict[str, Any],
    typing: str,
    islands: tuple[str, ...],
    stored: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(config_module, "tensorrt_major", lambda: installed)
    config = trt(**more)
    assert (config.resolved_typing, config.islands, config.stored_precision) == (typing, islands, stored)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"build": False}, "--no-build with --engine onnx"),
        ({"engine": "openvino", **int8(calib_data=DATA, prefer="fp16")}, "--prefer fp16 with --engine openvino"),
        ({"tensorrt": BuildOptions(workspace=1)}, "--workspace 1 with --engine onnx"),
        (
            {"precision": "fp8", "int8": Int8Config(calib_data=DATA)},
            "--precision fp8 with --engine onnx: only TensorRT computes in FP8",
        ),
        (
            {"engine": "trt", **int8(quantization="dynamic", calib_data=DATA), "typing": "weak"},
            "--quantization dynamic: TensorRT takes INT8 with calibrated ranges only",
        ),
        ({"engine": "trt", **int8()}, "--precision int8 with static ranges needs --calib-data"),
        ({"engine": "trt", "precision": "fp8"}, "--precision fp8 with static ranges needs --calib-data"),
        (
            {"engine": "trt", "precision": "fp8", "int8": Int8Config(calib_data=DATA, calib_method="entropy")},
            "--calib-method entropy with --precision fp8, whose ranges are the largest magnitudes",
        ),
        ({"engine": "trt", "int8": Int8Config(prefer="fp16")}, "--prefer fp16 with --precision fp32"),
        (
            {"engine": "trt-rtx", "typing": "weak"},
            "--engine trt-rtx with --typing weak: TensorRT for RTX computes in what the graph's types say",
        ),
        (
            {"engine": "trt-rtx", "tensorrt": BuildOptions(strip=True)},
            "--strip: TensorRT for RTX builds no such engines",
        ),
        (
            {"engine": "trt-rtx", "triton": Path("models")},
            "--triton models: Triton runs engines of TensorRT, not of TensorRT for RTX",
        ),
    ],
)
def test_what_tensorrt_alone_has_and_what_it_has_not(more: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}$"):
        settings(**more)


def test_tensorrt_for_rtx_is_strongly_typed_whatever_tensorrt_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module, "tensorrt_major", lambda: 8)
    for precision, islands in (("fp32", ()), ("fp16", ()), ("bf16", ("gelu", "norm", "residual"))):
        config = settings(engine="trt-rtx", precision=precision)
        assert (config.resolved_typing, config.islands, config.stored_precision) == ("strong", islands, precision)
        assert (config.fixed_batch, config.is_planned) == (1, True)


def test_the_same_export_without_eight_bits() -> None:
    config = trt(
        **int8(calib_data=DATA, prefer="fp16", max_latency=0.9), fp32_ops=("softmax",), typing="strong", batch="3"
    )
    assert config.in_precision("fp16") == trt(precision="fp16", fp32_ops=("softmax",), typing="strong", batch="3")
    assert config.in_precision("fp32") == trt(typing="strong", batch="3")


def test_the_installed_tensorrt_is_found_without_importing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package != "tensorrt-cu12-bindings":
            raise metadata.PackageNotFoundError(package)
        return "10.3.0"

    monkeypatch.setattr(metadata, "version", version)
    assert tensorrt_major() == 10


# --- outputs and types -----------------------------------------------------------------------------------------------


def test_an_output_named_twice() -> None:
    with pytest.raises(ConfigError, match="--outputs cls,pooled,cls must name each once"):
        settings(outputs=("cls", "pooled", "cls"))


@pytest.mark.parametrize("layers", [(3, 5, 3), (-1,), (0, -2)])
def test_blocks_that_there_are_not(layers: tuple[int, ...]) -> None:
    given = ",".join(map(str, layers))
    with pytest.raises(
        ConfigError, match=rf"--layers {given} must name each once|each of --layers must be at least 0, got {given}"
    ):
        settings(layers=layers)


@pytest.mark.parametrize("layers", [None, (), (0,), (11, 3)])
def test_blocks(layers: tuple[int, ...] | None) -> None:
    assert settings(layers=layers).layers == layers


def test_no_samples_at_all() -> None:
    with pytest.raises(ConfigError, match="--num-samples must be at least 1, got 0"):
        settings(num_samples=0)


@pytest.mark.parametrize("threads", [0, -2])
def test_no_threads_at_all(threads: int) -> None:
    """Said before PyTorch has worked for minutes."""
    with pytest.raises(ConfigError, match=f"--threads must be at least 1 and at most 4096, got {threads}"):
        settings(threads=threads)
    assert settings(threads=1).threads == 1


def test_a_seed_that_numpy_does_not_take() -> None:
    with pytest.raises(ConfigError, match="--seed must be at least 0, got -1"):
        settings(seed=-1)


@pytest.mark.parametrize(
    ("more", "count"), [({}, 32), (int8(), 128), ({"num_samples": 5}, 5), ({**int8(), "num_samples": 5}, 5)]
)
def test_how_many_samples(more: dict[str, Any], count: int) -> None:
    assert settings(**more).sample_count == count


@pytest.mark.parametrize("field", ["images", "features"])
@pytest.mark.parametrize("more", [{}, {"precision": "bf16"}, int8()])
def test_halves_in_or_out_of_another_precision(field: str, more: dict[str, Any]) -> None:
    precision = more.get("precision", "fp32")
    with pytest.raises(ConfigError, match=f"--{field} float16 needs --precision fp16, not {precision}"):
        settings(**{field: "float16"}, **more)
    assert getattr(settings(**{field: "float16"}, precision="fp16"), field) == "float16"


@pytest.mark.parametrize("pixels", ["normalised", "image"])
def test_pixels_without_a_decoder(pixels: str) -> None:
    with pytest.raises(ConfigError, match=f"--pixels {pixels} needs --tokens reconstruct"):
        settings(tokens="visible", pixels=pixels)
    assert settings(tokens="reconstruct:3", pixels=pixels).pixels == pixels


# --- arithmetic ------------------------------------------------------------------------------------------------------

STATIC = {"quantization": "static", "calib_data": DATA}


@pytest.mark.parametrize(
    ("more", "typing", "islands"),
    [
        ({}, "weak", ()),
        ({"precision": "fp16"}, "strong", ("softmax",)),
        ({"precision": "fp16", "typing": "weak"}, "weak", ()),
        ({"precision": "fp16", "fp32_ops": ()}, "strong", ()),
        ({"precision": "fp16", "fp32_ops": ("gelu", "norm")}, "strong", ("gelu", "norm")),
        ({"precision": "bf16"}, "weak", ()),
        ({"precision": "bf16", "typing": "strong", "engine": "openvino"}, "strong", ()),
        (int8(), "weak", ()),
        ({**int8(**STATIC), "typing": "strong"}, "strong", ("softmax",)),
    ],
)
def test_typing_and_islands(more: dict[str, Any], typing: str, islands: tuple[str, ...]) -> None:
    config = settings(**more)
    assert (config.resolved_typing, config.islands) == (typing, islands)


def test_bf16_arithmetic_where_there_is_none() -> None:
    with pytest.raises(ConfigError, match="ONNX Runtime has no BF16 arithmetic on the CPU") as caught:
        settings(precision="bf16", typing="strong")
    assert caught.value.hint is not None
    assert "--engine openvino" in caught.value.hint


@pytest.mark.parametrize(
    ("more", "policy"),
    [
        (int8(), "dynamic"),
        (int8(calib_data=DATA), "dynamic"),
        (int8(**STATIC), "static"),
        ({**int8(calib_data=DATA), "engine": "openvino"}, "static"),
        ({**int8(calib_data=DATA), "typing": "strong"}, "static"),
        ({**int8(quantization="dynamic"), "engine": "openvino"}, "dynamic"),
    ],
)
def test_the_faster_int8_of_an_engine(more: dict[str, Any], policy: str) -> None:
    assert settings(**more).policy == policy


@pytest.mark.parametrize(
    "more", [int8(quantization="static"), {**int8(), "engine": "openvino"}, {**int8(), "typing": "strong"}]
)
def test_static_int8_needs_images(more: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--precision int8 with static ranges needs --calib-data") as caught:
        settings(**more)
    assert caught.value.hint == "a folder of at least 128 images like those that the model will see"


@pytest.mark.parametrize(
    "more",
    [
        {**int8(quantization="dynamic", calib_data=DATA), "typing": "strong"},
        int8(quantization="dynamic", int8_attention=True),
        int8(int8_attention=True),
    ],
)
def test_what_dynamic_int8_has_not(more: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match=r"--(typing strong|int8-attention) with dynamic INT8, which does not have it"
    ):
        settings(**more)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("more", [{"calib_data": DATA}, {"max_drop": 1.0}, {"search": False}])
def test_settings_of_int8_in_another_precision(precision: str, more: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match=f"^--(calib-data {DATA}|max-drop 1.0|no-search) with --precision {precision}$"
    ):
        settings(precision=precision, int8=Int8Config(**more))


def test_what_is_learned_from_images_needs_some() -> None:
    with pytest.raises(ConfigError, match=r"^--bias-correction needs --calib-data$"):
        settings(**int8(bias_correction=True))
    assert settings(**int8(bias_correction=True, calib_data=DATA)).int8.bias_correction


@pytest.mark.parametrize(
    ("name", "value", "limits"),
    [
        ("calib_images", 127, "at least 128"),
        ("calib_percentile", 49, "at least 50 and at most 100"),
        ("calib_percentile", 100.1, "at least 50 and at most 100"),
        ("smooth_alpha", -0.1, "at least 0 and at most 1"),
        ("smooth_alpha", 1.1, "at least 0 and at most 1"),
        ("max_drop", -0.5, "at least 0 and below 100"),
        ("max_drop", 100, "at least 0 and below 100"),
        ("min_cosine", 1.1, "above 0 and at most 1"),
        ("min_cosine", 0, "above 0 and at most 1"),
        ("min_cosine", math.nan, "above 0 and at most 1"),
        ("min_sqnr", -1, "at least 0"),
        ("max_latency", 0, "above 0"),
        ("max_latency", math.nan, "above 0"),
    ],
)
def test_numbers_out_of_range(name: str, value: float, limits: str) -> None:
    with pytest.raises(ConfigError, match=rf"^--{name.replace('_', '-')} must be {limits}, got {value:g}$"):
        Int8Config(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            ("calib_images", 128),
            ("calib_percentile", 50),
            ("calib_percentile", 100),
            ("smooth_alpha", 0),
            ("smooth_alpha", 1),
        ),
        *(("max_drop", 0), ("max_drop", 99.9), ("min_cosine", 1), ("min_sqnr", 0), ("max_latency", 0.01)),
    ],
)
def test_numbers_at_the_end_of_their_range(name: str, value: float) -> None:
    assert getattr(Int8Config(**{name: value}), name) == value  # type: ignore[arg-type]
