"""Graphs of streams: ten updates are those of PyTorch, whole frames those of the full graph, in every precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from mae_deploy.errors import ConfigError
from mae_deploy.export.graph.spec import GraphSpec, available_outputs
from mae_deploy.export.reference import Reference
from mae_deploy.images.preprocess import default_preprocess
from mae_deploy.images.read import Array
from mae_deploy.models.vit import Classifier
from mae_deploy.runtime.cache import CacheShape, TokenCache, take_patches, update_cache
from mae_deploy.runtime.engines.base import Engine
from mae_deploy.runtime.manifest import IDS_KEEP, PATCHES, UPDATES
from mae_deploy.runtime.registry import open_graph
from tests.export.tiny_exports import (
    graph_of,
    input_scales,
    normalised,
    permutations,
    pytorch_outputs,
    random_pixels,
    sqnr,
)
from tests.models.tiny_models import ENCODER, metadata_of, tiny_classifier, tiny_encoder

N, B, K = ENCODER.num_patches, 3, 4
MODEL = tiny_classifier("cls")
AVERAGED = tiny_classifier("avg")
PIXELS = random_pixels(ENCODER, 4 * B).reshape(4, B, *ENCODER.image_size, 3)
SCALES = input_scales(MODEL, normalised(MODEL, PIXELS.reshape(-1, *PIXELS.shape[2:])))
UPDATED = [N, *[K] * 9]
"""How many patches each of ten updates takes."""

PRECISIONS: dict[str, tuple[float, dict[str, Any]]] = {
    "fp32": (105, {}),
    "fp16 weak": (55, {"precision": "fp16"}),
    "fp16 strong": (
        55,
        {"precision": "fp16", "typing": "strong", "fp32_ops": ("softmax",), "cache": "float16", "images": "float16"},
    ),
    "fp16 strong, softmax too": (50, {"precision": "fp16", "typing": "strong", "cache": "float16"}),
    "bf16 weak": (40, {"precision": "bf16", "cache": "float16"}),
    "int8 dynamic": (28, {"precision": "int8", "quantized": dict.fromkeys(SCALES)}),
    "int8 static": (28, {"precision": "int8", "quantized": SCALES, "cache": "float16"}),
    "int8 static strong": (
        28,
        {"precision": "int8", "typing": "strong", "fp32_ops": ("softmax",), "quantized": SCALES, "cache": "float16"},
    ),
}
"""Least SQNR of each output in dB, a few below what was measured, and the spec."""


def shape_of(**changes: Any) -> CacheShape:
    numbers: dict[str, Any] = {
        "num_patches": N,
        "depth": ENCODER.blocks,
        "num_heads": ENCODER.heads,
        "embed_dim": ENCODER.width,
        "dtype": "float32",
    }
    return CacheShape(**numbers | changes)


def patches_of(frame: int, ids: Array, dtype: str = "float32") -> Array:
    """Of the frame with this number, normalised: `(B, K, P * P * C)`."""
    pixels = normalised(MODEL, PIXELS[frame % 4]).transpose(0, 2, 3, 1)
    return take_patches(pixels, ids, ENCODER.patch).reshape(*ids.shape, -1).astype(dtype)


@dataclass(frozen=True)
class Sequence:
    """Ten updates, and what PyTorch gives after each."""

    ids: list[Array]
    expected: list[dict[str, Array]]


def sequence(model: Classifier = MODEL, lengths: list[int] = UPDATED) -> Sequence:
    """Frames in turn, other patches each time."""
    ids = [permutations(N, B, keep, seed=index) for index, keep in enumerate(lengths)]
    reference = Reference(model=model, preprocess=default_preprocess(ENCODER.image_size))
    names = tuple(name for name in available_outputs(metadata_of(model), "cached") if name != "block_0")
    expected = []
    for last in range(1, len(ids) + 1):
        inputs = {
            PATCHES: np.concatenate([patches_of(frame, kept) for frame, kept in enumerate(ids[:last])], axis=1),
            IDS_KEEP: np.concatenate(ids[:last], axis=1),
            UPDATES: np.tile(lengths[:last], (B, 1)),
        }
        expected.append(reference.outputs(inputs, names))
    return Sequence(ids, expected)


def opened(folder: Any, model: Any = MODEL, engine: str = "onnxruntime", **spec: Any) -> Engine:
    arithmetic = {"int8": "int8", "bf16": "fp32"}.get(spec.get("precision", ""), "fp32")
    return open_graph(graph_of(model, folder, "cached", **spec).path, engine, precision=arithmetic)


@pytest.mark.parametrize("case", PRECISIONS)
def test_ten_updates_are_those_of_pytorch(case: str, tmp_path: Any) -> None:
    floor, spec = PRECISIONS[case]
    given = sequence()
    dtype = spec.get("images", "float32")
    with opened(tmp_path, **spec) as engine:
        cache = TokenCache.empty(shape_of(dtype=spec.get("cache", "float32")), B)
        for frame, (ids, expected) in enumerate(zip(given.ids, given.expected, strict=True)):
            found = update_cache(engine, cache, patches_of(frame, ids, dtype), ids)
            assert set(found) == {"logits", "cls", "tokens", "pooled"}
            for name, values in found.items():
                assert sqnr(expected[name], values) > floor, (case, frame, name)


def test_ten_updates_on_openvino(tmp_path: Any) -> None:
    pytest.importorskip("openvino")
    given = sequence()
    with opened(tmp_path, engine="openvino") as engine:
        cache = TokenCache.empty(shape_of(), B)
        for frame, (ids, expected) in enumerate(zip(given.ids, given.expected, strict=True)):
            found = update_cache(engine, cache, patches_of(frame, ids), ids)
            for name, values in found.items():
                assert sqnr(expected[name], values) > 105, (frame, name)


def test_a_fixed_number_of_patches_begins_with_nothing(tmp_path: Any) -> None:
    """The first updates see those patches alone that were computed before them."""
    given = sequence(AVERAGED, [K] * 5)
    with opened(tmp_path, AVERAGED, keep=K, outputs=("logits", "pooled", "block_1")) as engine:
        cache = TokenCache.empty(shape_of(fixed_rows=True), B)
        for frame, (ids, expected) in enumerate(zip(given.ids, given.expected, strict=True)):
            found = update_cache(engine, cache, patches_of(frame, ids), ids)
            for name, values in found.items():
                assert sqnr(expected[name], values) > 105, (frame, name)


def test_a_whole_frame_is_that_of_the_full_graph_whatever_the_cache_holds(tmp_path: Any) -> None:
    images = normalised(MODEL, PIXELS[1])
    for name in ("full", "cached"):
        (tmp_path / name).mkdir()
    full = graph_of(MODEL, tmp_path / "full", "full", outputs=("logits", "cls", "tokens", "pooled"))(images=images)
    with opened(tmp_path / "cached") as engine:
        cache = TokenCache.empty(shape_of(), B)
        for seed in range(3):  # into an empty cache, then over another frame
            ids = permutations(N, B, N, seed)
            update_cache(engine, cache, patches_of(2, ids), ids)
            found = update_cache(engine, cache, patches_of(1, ids), ids)
            tokens = np.take_along_axis(full["tokens"], ids[..., None], axis=1)
            for name, expected in {**full, "tokens": tokens}.items():
                assert sqnr(expected, found[name]) > 110, name
            np.testing.assert_array_equal(np.take_along_axis(cache.tokens, ids[..., None], axis=1), found["tokens"])


@pytest.mark.parametrize("spec", [{}, {"precision": "int8", "quantized": dict.fromkeys(SCALES)}, {"keep": K}])
def test_nothing_changed_gives_the_cached_result_to_the_bit(spec: dict[str, Any], tmp_path: Any) -> None:
    ids = permutations(N, B, K)
    with opened(tmp_path, **spec) as engine:
        cache = TokenCache.empty(shape_of(fixed_rows="keep" in spec), B)
        for seed in range(3):
            others = permutations(N, B, K, seed=3 + seed)
            update_cache(engine, cache, patches_of(0, others), others)
        first = update_cache(engine, cache, patches_of(1, ids), ids)
        rows = {name: array.copy() for name, array in cache.rows.items()}
        again = update_cache(engine, cache, patches_of(1, ids), ids)
        for name, values in first.items():
            np.testing.assert_array_equal(again[name], values)
        for name, array in rows.items():
            np.testing.assert_array_equal(cache.rows[name], array)


def test_order_of_the_patches_is_order_of_the_tokens_alone(tmp_path: Any) -> None:
    ids, shuffle = permutations(N, B, K), permutations(K, B, K, seed=9)
    other = np.take_along_axis(ids, shuffle, axis=1)
    with opened(tmp_path) as engine:
        caches = [TokenCache.empty(shape_of(), B) for _ in range(2)]
        for cache in caches:
            update_cache(engine, cache, patches_of(0, permutations(N, B, N)), permutations(N, B, N))
        one = update_cache(engine, caches[0], patches_of(1, ids), ids)
        two = update_cache(engine, caches[1], patches_of(1, other), other)
        assert sqnr(np.take_along_axis(one["tokens"], shuffle[..., None], axis=1), two["tokens"]) > 110
        for name in ("cls", "pooled", "logits"):
            assert sqnr(one[name], two[name]) > 110
        for name, array in caches[0].rows.items():
            assert sqnr(array, caches[1].rows[name]) > 110


def test_what_is_not_kept_is_not_read_and_not_written(tmp_path: Any) -> None:
    """Rows of the cache that are recomputed may hold anything; all others stay to the bit."""
    ids = permutations(N, B, K)
    streams = np.arange(B)[:, None]
    with opened(tmp_path) as engine:
        caches = [TokenCache.empty(shape_of(), B) for _ in range(2)]
        for cache in caches:
            everything = permutations(N, B, N)
            update_cache(engine, cache, patches_of(0, everything), everything)
        before = {name: array.copy() for name, array in caches[0].rows.items()}
        for array in caches[1].rows.values():
            array[:, :, 0] = 1e3
            array[streams, :, 1 + ids] = -1e3
        caches[1].tokens[streams, ids] = 1e3
        one, two = (update_cache(engine, cache, patches_of(1, ids), ids) for cache in caches)
        for name, values in one.items():
            np.testing.assert_array_equal(two[name], values)
        others = np.ones((B, 1 + N), bool)
        others[:, 0] = False
        others[streams, 1 + ids] = False
        for name, array in caches[0].rows.items():
            unchanged = (array == before[name]).all(axis=(1, 3))
            assert unchanged[others].all(), name
            recomputed = ~others
            recomputed[:, 0] = False  # the first block gives CLS the same keys each time
            assert not unchanged[recomputed].any(), name


def test_pixels_are_normalised_in_the_graph(tmp_path: Any) -> None:
    ids = permutations(N, B, N)
    pixels = take_patches(PIXELS[0], ids, ENCODER.patch).reshape(B, N, -1)
    with opened(tmp_path, images="uint8") as engine:
        found = update_cache(engine, TokenCache.empty(shape_of(), B), pixels, ids)
    expected = pytorch_outputs(MODEL, normalised(MODEL, PIXELS[0]), {"ids_keep": ids})
    for name in ("cls", "tokens", "pooled", "logits"):
        assert sqnr(expected[name], found[name]) > 100, name


def test_graphs_of_streams_have_no_maps(tmp_path: Any) -> None:
    assert available_outputs(metadata_of(tiny_encoder()), "cached", pyramid=True) == (
        "cls",
        "tokens",
        "pooled",
        "block_0",
        "block_1",
    )
    with pytest.raises(ConfigError, match="this model has no output 'feature_map'"):
        graph_of(MODEL, tmp_path, "cached", outputs=("feature_map",))


def test_groups_of_bands_are_refused(tmp_path: Any) -> None:
    from dataclasses import replace

    from mae_deploy.export.graph.encoder import build_graph

    config = replace(ENCODER, band_groups=((0, 1), (2,)))
    model = tiny_encoder(config)
    with pytest.raises(ConfigError, match="--tokens cached: a model with --band-groups"):
        build_graph(metadata_of(model), model.state_dict(), GraphSpec(token_mode="cached"))


def test_the_cache_is_declared_block_by_block(tmp_path: Any) -> None:
    graph = graph_of(MODEL, tmp_path, "cached", keep=K, batch=B)
    inputs = {entry.name: entry.shape for entry in graph.session.get_inputs()}
    d = ENCODER.width // ENCODER.heads
    assert inputs["keys_1"] == inputs["values_0"] == [B, ENCODER.heads, 1 + N, d]
    assert inputs["patches"] == [B, K, ENCODER.patch_dim]
    outputs = {entry.name: entry.shape for entry in graph.session.get_outputs()}
    assert outputs["new_rows"] == [B, 2 * ENCODER.blocks * ENCODER.heads, 1 + K, d]
    assert torch.tensor(outputs["tokens"]).tolist() == [B, K, ENCODER.width]
