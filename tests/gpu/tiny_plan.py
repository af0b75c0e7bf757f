"""A small plan that TensorRT itself builds, without onnx: a matrix product and a softmax over a dynamic number of
tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mae_deploy.images.read import Array
from mae_deploy.runtime.cuda.open_memory import open_memory
from mae_deploy.runtime.tensorrt.api import Api, network_flags, set_kernel_sources, share_profiles

C, H, W, D = 3, 5, 7, 11
"""Unequal and odd."""

Sizes = Mapping[str, tuple[int, int, int]]
DYNAMIC: tuple[Sizes, ...] = ({"B": (1, 2, 4), "K": (2, 3, 13)},)


def weights() -> Array:
    """`(C, D)`."""
    return np.random.default_rng(3).normal(size=(C, D)).astype(np.float32)


def inputs(batch: int, keep: int, seed: int = 0) -> dict[str, Array]:
    """`images (B, C, H, W)` and `ids_keep (B, K)`."""
    rng = np.random.default_rng(seed)
    return {
        "images": rng.normal(size=(batch, C, H, W)).astype(np.float32),
        "ids_keep": rng.integers(0, H * W, (batch, keep)).astype(np.int32),
    }


def reference(images: Array, ids_keep: Array) -> dict[str, Array]:
    """`pooled (B, D)`: the mean pixel times the weights; `tokens (B, K, D)`: softmax of that times each index."""
    pooled = images.astype(np.float64).mean(axis=(2, 3)) @ weights()
    scores = pooled[:, None, :] * (ids_keep[..., None] / (H * W))
    shifted = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return {
        "pooled": pooled.astype(np.float32),
        "tokens": (shifted / shifted.sum(axis=-1, keepdims=True)).astype(np.float32),
    }


def build(api: Api, *profiles: Sizes) -> bytes:
    """A plan of the network for these ranges of B and K; where each is one size, of fixed shapes."""
    trt = api.module
    ranges = profiles or DYNAMIC
    fixed = len(ranges) == 1 and all(len(set(sizes)) == 1 for sizes in ranges[0].values())
    B, K = (ranges[0]["B"][0], ranges[0]["K"][0]) if fixed else (-1, -1)
    with open_memory() as memory, memory.active():
        builder = trt.Builder(api.logger)
        network = builder.create_network(network_flags(trt, strong=False))
        kept = _add_layers(trt, network, B, K)
        config = builder.create_builder_config()
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 256 << 20)
        config.clear_flag(trt.BuilderFlag.TF32)
        set_kernel_sources(trt, config, lambda name: False)
        share_profiles(trt, config)
        for sizes in () if fixed else ranges:
            profile = builder.create_optimization_profile()
            profile.set_shape("images", *((batch, C, H, W) for batch in sizes["B"]))
            profile.set_shape("ids_keep", *zip(sizes["B"], sizes["K"], strict=True))
            assert config.add_optimization_profile(profile) >= 0
        plan = builder.build_serialized_network(network, config)
        assert plan is not None, api.messages()
        del kept  # TensorRT does not copy weights: they live until here
        return bytes(plan)


def _add_layers(trt: Any, network: Any, B: int, K: int) -> list[Array]:
    """Add the network, and return what must live until the plan is built."""
    kept: list[Array] = []

    def constant(array: Array) -> Any:
        kept.append(np.ascontiguousarray(array))
        return network.add_constant(array.shape, trt.Weights(kept[-1])).get_output(0)

    def product(left: Any, right: Any) -> Any:
        return network.add_matrix_multiply(left, trt.MatrixOperation.NONE, right, trt.MatrixOperation.NONE).get_output(
            0
        )

    images = network.add_input("images", trt.float32, (B, C, H, W))
    ids_keep = network.add_input("ids_keep", trt.int32, (B, K))
    mean = network.add_reduce(images, trt.ReduceOperation.AVG, (1 << 2) | (1 << 3), False).get_output(0)
    pooled = product(mean, constant(weights()))
    numbers = network.add_cast(ids_keep, trt.float32).get_output(0)
    share = constant(np.full((1, 1), 1 / (H * W), np.float32))
    scaled = network.add_elementwise(numbers, share, trt.ElementWiseOperation.PROD).get_output(0)
    column, row = network.add_shuffle(scaled), network.add_shuffle(pooled)
    column.reshape_dims, row.reshape_dims = (0, 0, 1), (0, 1, -1)
    tokens = product(column.get_output(0), row.get_output(0))
    softmax = network.add_softmax(tokens)
    softmax.axes = 1 << 2
    for name, tensor in (("pooled", pooled), ("tokens", softmax.get_output(0))):
        tensor.name = name
        network.mark_output(tensor)
    return kept
