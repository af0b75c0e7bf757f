"""The shapes of what operators make of what they take, each a function of the same two arguments.

All raise ValueError, or what Python raises of wrong shapes, where the operator cannot take what it is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mae_deploy.runtime.graph.nodes import Node, Tensor

Shape = tuple[int, ...]
Given = Sequence[Tensor]
"""What an operator takes; an input that is left out is `LEFT_OUT`."""

Rule = Callable[[Node, Given], "list[Shape]"]
"""The shapes of an operator's results; behind them, those of what it needs beside them while it runs."""

LEFT_OUT = Tensor(())


def broadcast(*shapes: Shape) -> Shape:
    rank = max(map(len, shapes))
    found: list[int] = []
    for sides in zip(*(((1,) * (rank - len(shape)) + shape) for shape in shapes), strict=True):
        other = {side for side in sides if side != 1}
        if len(other) > 1:
            raise ValueError(f"shapes {' and '.join(map(str, shapes))} do not go together")
        found.append(other.pop() if other else 1)
    return tuple(found)


def numbers_of(tensor: Tensor, what: str) -> list[int]:
    """The numbers of a tensor of sizes.

    Raises:
        ValueError: they depend on what is computed.
    """
    if tensor.values is None:
        raise ValueError(f"its {what} shows only when it runs")
    return [int(value) for value in tensor.values.reshape(-1).tolist()]


def place_of(axis: Any, rank: int) -> int:
    if not -rank <= axis < max(rank, 1):
        raise ValueError(f"axis {axis} of {rank}")
    return int(axis) % max(rank, 1)


def axes_of(node: Node, given: Given, at: int = 1) -> list[int] | None:
    """Of an attribute, as before opset 13, or an input."""
    if "axes" in node.attributes:
        return list(node.attributes["axes"])
    return numbers_of(given[at], "axes") if len(given) > at and given[at] is not LEFT_OUT else None


def elementwise(node: Node, given: Given) -> list[Shape]:
    return [broadcast(*(tensor.shape for tensor in given))]


def divided(node: Node, given: Given) -> list[Shape]:
    """The smallest integer by -1 ends a process on x86."""
    left, right = (tensor.values for tensor in given)
    by_minus_1 = right is not None and right.dtype.kind == "i" and bool((right == -1).any())
    if by_minus_1 and (left is None or (left == np.iinfo(left.dtype).min).any()):
        raise ValueError("its integers may overflow")
    return elementwise(node, given)


def as_first(node: Node, given: Given) -> list[Shape]:
    return [given[0].shape] * len(node.outputs)


def quantized(node: Node, given: Given) -> list[Shape]:
    return [given[0].shape, (), ()]


def product(left: Shape, right: Shape) -> Shape:
    if not left or not right or left[-1] != right[-2 if len(right) > 1 else 0]:
        raise ValueError(f"shapes {left} and {right} do not go together")
    rows, columns = left[-2:-1], right[-1:] if len(right) > 1 else ()
    return (*broadcast(left[:-2], right[:-2]), *rows, *columns)


def matmul(node: Node, given: Given) -> list[Shape]:
    return [product(given[0].shape, given[3 if node.operator == "QLinearMatMul" else 1].shape)]


def summed_axis(node: Node) -> int:
    """Of the first factor of a product."""
    if not node.attributes.get("transA"):
        return -1
    return 0 if node.attributes.get("transBatchA") else -2


def gemm(node: Node, given: Given) -> list[Shape]:
    left, right = (tensor.shape for tensor in given[:2])
    left = left[::-1] if node.attributes.get("transA") else left
    right = right[::-1] if node.attributes.get("transB") else right
    return [product(left, right)]


def windows(node: Node, size: Shape, kernel: Shape) -> Shape:
    """How often a window fits along each side."""
    attributes = node.attributes
    n = len(size)
    strides, dilations = (attributes.get(name) or [1] * n for name in ("strides", "dilations"))
    pads = attributes.get("pads") or [0] * 2 * n
    if attributes.get("auto_pad", "NOTSET") in ("SAME_UPPER", "SAME_LOWER"):
        return tuple(-(-side // stride) for side, stride in zip(size, strides, strict=True))
    if len(kernel) != n or len(pads) != 2 * n or min((*strides, *dilations, *kernel), default=1) < 1:
        raise ValueError(f"a window of {kernel} on {size}")
    reach = [side + pads[i] + pads[n + i] - dilations[i] * (kernel[i] - 1) - 1 for i, side in enumerate(size)]
    return tuple(
        (-(-r // s) if attributes.get("ceil_mode") else r // s) + 1 for r, s in zip(reach, strides, strict=True)
    )


def conv(node: Node, given: Given) -> list[Shape]:
    images, weight = given[0].shape, given[3 if node.operator == "QLinearConv" else 1].shape
    sides = windows(node, images[2:], weight[2:])
    # Kernels of integers write out what every window sees; those of floats, a row at a time.
    seen = [(math.prod(weight[1:]), math.prod(sides))] if node.operator != "Conv" else []
    return [(images[0], weight[0], *sides), *seen]


def conv_transpose(node: Node, given: Given) -> list[Shape]:
    images, weight, attributes = given[0].shape, given[1].shape, node.attributes
    n = len(images) - 2
    strides, dilations = (attributes.get(name) or [1] * n for name in ("strides", "dilations"))
    pads, more = attributes.get("pads") or [0] * 2 * n, attributes.get("output_padding") or [0] * n
    sides = attributes.get("output_shape") or [
        strides[i] * (images[2 + i] - 1) + more[i] + dilations[i] * (weight[2 + i] - 1) + 1 - pads[i] - pads[n + i]
        for i in range(n)
    ]
    return [(images[0], weight[1] * attributes.get("group", 1), *sides), (math.prod(weight[1:]), *images[2:])]


def pool(node: Node, given: Given) -> list[Shape]:
    images = given[0].shape
    kernel = tuple(node.attributes["kernel_shape"])
    return [(*images[:2], *windows(node, images[2:], kernel))] * len(node.outputs)


def global_pool(node: Node, given: Given) -> list[Shape]:
    return [(*given[0].shape[:2], *[1] * (len(given[0].shape) - 2))]


def reshape(node: Node, given: Given) -> list[Shape]:
    old = given[0].shape
    sides = numbers_of(given[1], "shape")
    if not node.attributes.get("allowzero"):
        sides = [old[index] if side == 0 else side for index, side in enumerate(sides)]
    rest = math.prod(side for side in sides if side != -1)
    new = tuple(math.prod(old) // max(rest, 1) if side == -1 else side for side in sides)
    if sides.count(-1) > 1 or math.prod(new) != math.prod(old):
        raise ValueError(f"{old} as {tuple(sides)}")
    return [new]


def flatten(node: Node, given: Given) -> list[Shape]:
    shape, axis = given[0].shape, node.attributes.get("axis", 1)
    axis += len(shape) if axis < 0 else 0
    return [(math.prod(shape[:axis]), math.prod(shape[axis:]))]


def transpose(node: Node, given: Given) -> list[Shape]:
    shape = given[0].shape
    order = node.attributes.get("perm") or list(range(len(shape)))[::-1]
    if sorted(order) != list(range(len(shape))):
        raise ValueError(f"axes {order} of {shape}")
    return [tuple(shape[axis] for axis in order)]


def concat(node: Node, given: Given) -> list[Shape]:
    shapes = [tensor.shape for tensor in given]
    axis = place_of(node.attributes["axis"], len(shapes[0]))
    if len({(*shape[:axis], *shape[axis + 1 :]) for shape in shapes}) > 1:
        raise ValueError(f"shapes {' and '.join(map(str, shapes))} do not go together")
    return [(*shapes[0][:axis], sum(shape[axis] for shape in shapes), *shapes[0][axis + 1 :])]


def split(node: Node, given: Given) -> list[Shape]:
    shape = given[0].shape
    axis = place_of(node.attributes.get("axis", 0), len(shape))
    parts = node.attributes.get("split") or (numbers_of(given[1], "parts") if len(given) > 1 else None)
    if parts is None:
        n = len(node.outputs)
        each = -(-shape[axis] // n)
        parts = [each] * (n - 1) + [shape[axis] - each * (n - 1)]
    if sum(parts) != shape[axis]:
        raise ValueError(f"{shape[axis]} in {parts}")
    return [(*shape[:axis], part, *shape[axis + 1 :]) for part in parts]


def slices(node: Node, given: Given) -> tuple[slice, ...]:
    rank, attributes = len(given[0].shape), node.attributes
    if "starts" in attributes:
        starts, ends, axes, steps = attributes["starts"], attributes["ends"], attributes.get("axes"), None
    else:
        starts, ends = numbers_of(given[1], "start"), numbers_of(given[2], "end")
        axes, steps = (numbers_of(given[at], "axes") if len(given) > at and given[at].shape else None for at in (3, 4))
    found = [slice(None)] * rank
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        step = steps[number] if steps else 1
        axis = place_of(axes[number] if axes else number, rank)
        size = given[0].shape[axis]
        found[axis] = slice(start, None if step < 0 and end < -size else end, step)
    return tuple(found)


def slice_(node: Node, given: Given) -> list[Shape]:
    parts = zip(slices(node, given), given[0].shape, strict=True)
    return [tuple(len(range(*part.indices(side))) for part, side in parts)]


def gather(node: Node, given: Given) -> list[Shape]:
    shape, indices = given[0].shape, given[1].shape
    axis = place_of(node.attributes.get("axis", 0), len(shape))
    return [(*shape[:axis], *indices, *shape[axis + 1 :])]


def gather_elements(node: Node, given: Given) -> list[Shape]:
    return [given[1].shape]


def gather_nd(node: Node, given: Given) -> list[Shape]:
    shape, indices, batch = given[0].shape, given[1].shape, node.attributes.get("batch_dims", 0)
    return [(*indices[:-1], *shape[batch + indices[-1] :])]


def squeeze(node: Node, given: Given) -> list[Shape]:
    shape, axes = given[0].shape, axes_of(node, given)
    gone = [axis for axis, side in enumerate(shape) if side == 1] if axes is None else axes
    gone = [place_of(axis, len(shape)) for axis in gone]
    if any(shape[axis] != 1 for axis in gone):
        raise ValueError(f"{shape} without the axes {gone}")
    return [tuple(side for axis, side in enumerate(shape) if axis not in gone)]


def unsqueeze(node: Node, given: Given) -> list[Shape]:
    shape, axes = given[0].shape, axes_of(node, given) or []
    rank = len(shape) + len(axes)
    places = {place_of(axis, rank) for axis in axes}
    sides = iter(shape)
    return [tuple(1 if axis in places else next(sides) for axis in range(rank))]


def expand(node: Node, given: Given) -> list[Shape]:
    return [broadcast(given[0].shape, tuple(numbers_of(given[1], "shape")))]


def tile(node: Node, given: Given) -> list[Shape]:
    return [tuple(side * n for side, n in zip(given[0].shape, numbers_of(given[1], "repeats"), strict=True))]


def constant(node: Node, given: Given) -> list[Shape]:
    (value,) = node.attributes.values()
    return [value.shape if isinstance(value, Tensor) else (len(value),) if isinstance(value, list) else ()]


def filled(node: Node, given: Given) -> list[Shape]:
    return [tuple(numbers_of(given[0], "shape"))]


def range_(node: Node, given: Given) -> list[Shape]:
    start, end, step = (float(tensor.values) if tensor.values is not None else math.nan for tensor in given)
    if math.isnan(start + end + step) or math.isinf(start + end) or step == 0:
        raise ValueError("its length shows only when it runs")
    return [(max(0, math.ceil((end - start) / step)),)]


def resize(node: Node, given: Given) -> list[Shape]:
    shape = given[0].shape
    sizes = given[3] if len(given) > 3 else LEFT_OUT
    if sizes.shape and sizes.size:
        sides = numbers_of(sizes, "size")
    else:
        scales = given[1 if node.operator == "Upsample" or len(given) == 2 else 2]
        if scales.values is None:
            raise ValueError("its size shows only when it runs")
        factors = [float(scale) for scale in scales.values.reshape(-1).tolist()]
        if not all(math.isfinite(factor) for factor in factors):
            raise ValueError(f"scales {factors}")
        axes = node.attributes.get("axes") or range(len(shape))
        sides = [math.floor(shape[axis] * factor) for axis, factor in zip(axes, factors, strict=True)]
    found = list(shape)
    for axis, side in zip(node.attributes.get("axes") or range(len(shape)), sides, strict=True):
        found[axis] = side
    return [tuple(found)]


def pad(node: Node, given: Given) -> list[Shape]:
    shape = given[0].shape
    pads = node.attributes.get("pads") or numbers_of(given[1], "padding")
    axes = [place_of(axis, len(shape)) for axis in (axes_of(node, given, 3) or range(len(shape)))]
    found = list(shape)
    for number, axis in enumerate(axes):
        found[axis] += pads[number] + pads[len(axes) + number]
    return [tuple(found)]


def shape(node: Node, given: Given) -> list[Shape]:
    return [(len(of_shape(node, given)),)]


def of_shape(node: Node, given: Given) -> Shape:
    return given[0].shape[node.attributes.get("start", 0) : node.attributes.get("end")]


def scalar(node: Node, given: Given) -> list[Shape]:
    return [()]


def reduced(node: Node, given: Given) -> list[Shape]:
    shape, attributes = given[0].shape, node.attributes
    axes = [attributes.get("axis", 0)] if node.operator.startswith("Arg") else axes_of(node, given)
    if axes is None or (not axes and node.operator.startswith("Reduce")):
        axes = [] if attributes.get("noop_with_empty_axes") else list(range(len(shape)))
    gone = {place_of(axis, len(shape)) for axis in axes}
    if attributes.get("keepdims", 1):
        return [tuple(1 if axis in gone else side for axis, side in enumerate(shape))]
    return [tuple(side for axis, side in enumerate(shape) if axis not in gone)]


def top(node: Node, given: Given) -> list[Shape]:
    shape = list(given[0].shape)
    axis = place_of(node.attributes.get("axis", -1), len(shape))
    shape[axis] = min(shape[axis], *(numbers_of(given[1], "number")))
    return [tuple(shape)] * 2


def letters(node: Node, given: Given) -> dict[str, int]:
    """The size of each letter of an Einsum."""
    sizes: dict[str, int] = {}
    for word, tensor in zip(
        str(node.attributes["equation"]).replace(" ", "").split("->")[0].split(","), given, strict=True
    ):
        for letter, side in zip(word, tensor.shape, strict=True):
            if not letter.isalpha() or sizes.setdefault(letter, side) not in (side, 1):
                raise ValueError(f"equation {node.attributes['equation']} on {[tensor.shape for tensor in given]}")
            sizes[letter] = max(side, sizes[letter])
    return sizes


def einsum(node: Node, given: Given) -> list[Shape]:
    left, arrow, right = str(node.attributes["equation"]).replace(" ", "").partition("->")
    sizes = letters(node, given)
    words = right if arrow else "".join(sorted(letter for letter in sizes if left.count(letter) == 1))
    return [tuple(sizes[letter] for letter in words)]


def depth_to_space(node: Node, given: Given) -> list[Shape]:
    (B, C, H, W), n = given[0].shape, node.attributes["blocksize"]
    if node.operator == "SpaceToDepth":
        return [(B, C * n * n, H // n, W // n)]
    return [(B, C // (n * n), H * n, W * n)]


def one_hot(node: Node, given: Given) -> list[Shape]:
    shape = list(given[0].shape)
    axis = place_of(node.attributes.get("axis", -1), len(shape) + 1)
    return [(*shape[:axis], *numbers_of(given[1], "depth"), *shape[axis:])]


def attention(node: Node, given: Given) -> list[Shape]:
    """Of opset 23: with the heads as an axis, or in the width."""
    queries, keys, values = (tensor.shape for tensor in given[:3])
    if len(given) > 4 and any(tensor is not LEFT_OUT for tensor in given[4:]):
        raise ValueError("keys and values of earlier tokens")
    if len(queries) == 4:
        made, scores = (*queries[:3], values[3]), (*queries[:3], keys[2])
    else:
        heads = node.attributes["q_num_heads"]
        width = values[2] // node.attributes["kv_num_heads"] * heads
        made, scores = (*queries[:2], width), (queries[0], heads, queries[1], keys[1])
    return [made, *[scores] * len(node.outputs)]
