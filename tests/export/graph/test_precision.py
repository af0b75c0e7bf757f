"""Which types a precision stores, multiplies and adds in."""

from __future__ import annotations

import numpy as np
import pytest

from mae_deploy.errors import ConfigError
from mae_deploy.export.graph.precision import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    Arithmetic,
    Island,
    Precision,
    Typing,
    arithmetic,
)


@pytest.mark.parametrize(
    ("precision", "typing", "stored", "product", "stream"),
    [
        ("fp32", "weak", FLOAT32, FLOAT32, FLOAT32),
        ("fp32", "strong", FLOAT32, FLOAT32, FLOAT32),
        ("fp16", "weak", FLOAT16, FLOAT32, FLOAT32),
        ("fp16", "strong", FLOAT16, FLOAT16, FLOAT16),
        ("bf16", "weak", BFLOAT16, FLOAT32, FLOAT32),
        ("bf16", "strong", BFLOAT16, BFLOAT16, FLOAT32),
        ("int8", "weak", FLOAT32, FLOAT32, FLOAT32),
        ("int8", "strong", FLOAT16, FLOAT16, FLOAT16),
        ("fp8", "strong", FLOAT16, FLOAT16, FLOAT16),
    ],
)
def test_types(precision: Precision, typing: Typing, stored: np.dtype, product: np.dtype, stream: np.dtype) -> None:
    assert arithmetic(precision, typing) == Arithmetic(stored=stored, product=product, stream=stream)


def test_an_island_is_fp32_and_the_rest_as_it_was() -> None:
    types = arithmetic("fp16", "strong", ("softmax", "norm"))
    operators: tuple[Island, ...] = ("softmax", "gelu", "norm", "residual")
    assert {name: types.of(name) for name in operators} == {
        "softmax": FLOAT32,
        "gelu": FLOAT16,
        "norm": FLOAT32,
        "residual": FLOAT16,
    }
    assert (types.stored, types.product, types.stream) == (FLOAT16, FLOAT16, FLOAT16)
    assert all(arithmetic("bf16", "strong").of(name) == FLOAT32 for name in operators)


def test_a_bf16_graph_is_fp32_but_for_its_products_unless_islands_say_what_is() -> None:
    types = arithmetic("bf16", "strong", ("residual", "norm", "gelu"))
    operators: tuple[Island, ...] = ("softmax", "gelu", "norm", "residual")
    assert {name: types.of(name) for name in operators} == {
        "softmax": BFLOAT16,
        "gelu": FLOAT32,
        "norm": FLOAT32,
        "residual": FLOAT32,
    }


def test_fp8_is_a_type_in_the_graph() -> None:
    with pytest.raises(ConfigError, match="--precision fp8 --typing weak: FP8 is a type in the graph"):
        arithmetic("fp8", "weak")


@pytest.mark.parametrize(
    ("precision", "typing"), [("fp32", "strong"), ("fp16", "weak"), ("bf16", "weak"), ("int8", "weak")]
)
def test_an_island_in_a_graph_that_is_fp32_already(precision: Precision, typing: Typing) -> None:
    with pytest.raises(
        ConfigError,
        match=f"--fp32-ops gelu,norm: with --precision {precision} --typing {typing} these are FP32 already",
    ):
        arithmetic(precision, typing, ("gelu", "norm"))
