"""What NVIDIA's builder makes of attention to tokens of images of different lengths: padded with lengths it builds;
packed one after the other, with cumulative lengths, the bindings take it and no kernel is there, so that ragged graphs
stay padded (docs/tensorrt.md). Where this fails, a later version builds it.
"""

from __future__ import annotations

from typing import Any

import pytest

from mae_deploy.errors import MaeDeployError
from mae_deploy.runtime.tensorrt.api import Api

HEADS, DIM, MOST = 3, 64, 7


def attention(api: Api, *, packed: bool, target: str | None) -> Any:
    """The plan of self-attention over up to 3 images of up to 7 tokens in FP16."""
    trt = api.module
    builder = trt.Builder(api.logger)
    network, config = builder.create_network(0), builder.create_builder_config()
    profile = builder.create_optimization_profile()
    if target is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, target), 0)
    shapes: list[tuple[int, ...]] = [
        (tokens, HEADS, DIM) if packed else (images, HEADS, tokens, DIM)
        for images, tokens in (((1, 1), (3, 10), (3, 3 * MOST)) if packed else ((1, 1), (2, 3), (3, MOST)))
    ]
    open_shape = (-1, HEADS, DIM) if packed else (-1, HEADS, -1, DIM)
    values = [network.add_input(name, trt.float16, open_shape) for name in "qkv"]
    for name in "qkv":
        profile.set_shape(name, *shapes)
    lengths = network.add_input("lengths", trt.int32, (-1,))
    profile.set_shape("lengths", *([(2,), (4,), (4,)] if packed else [(1,), (2,), (3,)]))
    layer = network.add_attention_v2(*values, trt.AttentionNormalizationOp.SOFTMAX, trt.CausalMaskKind.NONE)
    if packed:
        layer.query_form = layer.key_value_form = trt.AttentionIOForm.PACKED_NHD
        layer.query_lengths = lengths
    layer.key_value_lengths = lengths
    layer.decomposable = True
    network.mark_output(layer.get_output(0))
    config.add_optimization_profile(profile)
    with api.explained("build it"):
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise api.refuse("build it")
    return plan


@pytest.mark.parametrize("target", [None, "SM89", "SM120"])
def test_padded_with_lengths(api: Api, target: str | None) -> None:
    assert attention(api, packed=False, target=target).nbytes > 1000


@pytest.mark.parametrize("target", [None, "SM80", "SM86", "SM89", "SM120", "SM121"])
def test_packed_has_no_kernel_yet(api: Api, target: str | None) -> None:
    with pytest.raises(MaeDeployError, match="no fused kernel is available on this target and no decomposition exists"):
        attention(api, packed=True, target=target)
