"""Whether a graph ends, and how much memory and work it takes: known before an engine sees it."""

from __future__ import annotations

import math
from collections import ChainMap, Counter
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mae_deploy.errors import ConfigError
from mae_deploy.runtime.graph.nodes import Graph, Node, Tensor, read_graph
from mae_deploy.runtime.graph.operators import is_known, products, results
from mae_deploy.runtime.graph.shapes import LEFT_OUT

_NUMBERS = 1 << 26
"""That an image may need at once whatever the network: 256 MiB in FP32."""
_PRODUCTS = 10**11
"""Multiply-adds of an image whatever the network: seconds on a core."""
_MARGIN = 4
"""Times what a plain network of these sizes needs."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What an image may cost."""

    numbers: int = 16 * _NUMBERS
    """That exist at the same time."""
    products: int = 100 * _PRODUCTS


@dataclass(frozen=True, slots=True)
class Network:
    """The numbers that a network's cost follows from."""

    tokens: int
    dim: int
    heads: int

    def limits(self, num_weights: int) -> Limits:
        """What a graph of this network may cost. Sizes that its weights are too few for are not believed."""
        T, D = min(self.tokens, num_weights), min(self.dim, math.isqrt(num_weights))
        H = min(self.heads, D)
        numbers = 2 * H * T * T + 16 * T * D
        work = num_weights * T + 256 * T * T * D
        return Limits(max(_NUMBERS, _MARGIN * numbers), max(_PRODUCTS, _MARGIN * work))


def check_graph(path: Path, trials: Mapping[int, Mapping[str, Sequence[int]]], network: Network | None = None) -> None:
    """Refuse what no engine should run: operators that are not known, memory or work beyond every such network's.

    Args:
        trials: by a number of images, the shapes of inputs by name: each a run that is thought through. An input that
            is left out has the file's shape, its open sizes 1.
        network: None: one that nothing is known of.

    Raises:
        ConfigError: the graph is refused; the message names the node.
    """
    graph = read_graph(path)
    limits = Limits() if network is None else network.limits(graph.num_weights)
    for batch, shapes in trials.items():
        _Run(path, limits, batch).through(graph, _inputs(graph, shapes))


def follow(path: Path, shapes: Mapping[str, Sequence[int]]) -> Mapping[str, Tensor]:
    """What is known of every value of a graph whose inputs have these shapes.

    Raises:
        ConfigError: as `check_graph`.
    """
    graph = read_graph(path)
    return _Run(path, Limits(), 1).through(graph, _inputs(graph, shapes))


def _inputs(graph: Graph, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    return {
        name: Tensor(tuple(shapes.get(name, [side if isinstance(side, int) else 1 for side in own])))
        for name, own in graph.inputs.items()
    }


class _Run:
    """Goes through a graph as an engine would, with sizes instead of numbers."""

    def __init__(self, path: Path, limits: Limits, batch: int) -> None:
        self._path, self._limits, self._batch = path, limits, batch
        self._products = self._live = 0

    def through(self, graph: Graph, outer: MutableMapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Every node; returns all that is known at its end.

        Args:
            outer: inputs, and in a branch what is known around it.
        """
        known: MutableMapping[str, Tensor] = ChainMap({**graph.constants}, outer)
        made_here: set[str] = set()
        uses = Counter(name for node in graph.nodes for name in node.inputs)
        uses.update(graph.outputs)
        for node in graph.nodes:
            made = self._results(node, known)
            self._count(node, [known[name] for name in node.inputs if name], made)
            for name, tensor in zip(node.outputs, made, strict=False):
                if not name:
                    continue
                if name in known:
                    raise self._refusal(node, f"makes '{name[:100]}', which is there already")
                known[name] = tensor
                made_here.add(name)
                self._live += tensor.size if uses[name] else 0
            for name, times in Counter(node.inputs).items():
                uses[name] -= times
                if name in made_here and not uses[name]:
                    self._live -= known[name].size
        return known

    def _results(self, node: Node, known: MutableMapping[str, Tensor]) -> list[Tensor]:
        for name in node.inputs:
            if name and name not in known:
                raise self._refusal(node, f"takes '{name[:100]}', which nothing before it makes")
        given = [known[name] if name else LEFT_OUT for name in node.inputs]
        if node.title == "If":
            return self._branches(node, given, known)
        if any(isinstance(value, Graph) for value in node.attributes.values()):
            raise self._refusal(node, "runs a graph of its own again and again")
        try:
            return results(node, given)
        except KeyError as error:
            if not is_known(node):
                raise self._refusal(node, "is of an operator that networks of our kind do not have") from None
            raise self._refusal(node, f"lacks the attribute {error}") from error
        except (ValueError, IndexError, TypeError, ZeroDivisionError, OverflowError) as error:
            raise self._refusal(node, f"cannot be followed: {str(error)[:300]}") from error

    def _branches(self, node: Node, given: Sequence[Tensor], known: MutableMapping[str, Tensor]) -> list[Tensor]:
        """Of both branches; of a result whose sizes differ, the larger one."""
        found: list[list[Tensor]] = []
        condition = given[0].values if given else None
        for name in ("then_branch", "else_branch"):
            branch = node.attributes.get(name)
            if not isinstance(branch, Graph):
                raise self._refusal(node, f"has no {name}")
            if condition is None or bool(np.all(condition)) == (name == "then_branch"):
                ends = self.through(branch, known)
                found.append([ends[output] for output in branch.outputs if output in ends])
        if len({len(branch) for branch in found}) > 1:
            raise self._refusal(node, "has branches of different results")
        return [max(pair, key=lambda tensor: tensor.size) for pair in zip(*found, strict=True)]

    def _count(self, node: Node, given: Sequence[Tensor], made: Sequence[Tensor]) -> None:
        needed = self._live + sum(tensor.size for tensor in made)
        if needed > self._limits.numbers * self._batch:
            raise self._refusal(
                node,
                f"would need {needed:,} numbers at once for {self._images}, of"
                f" {self._limits.numbers * self._batch:,} that such a network may",
            )
        self._products += products(node, given, made) if made and node.operator != "If" else 0
        if self._products > self._limits.products * self._batch:
            raise self._refusal(
                node,
                f"would be reached after {self._products:,} products for {self._images}, of"
                f" {self._limits.products * self._batch:,} that such a network may take",
            )

    @property
    def _images(self) -> str:
        return f"{self._batch} image{'s' if self._batch > 1 else ''}"

    def _refusal(self, node: Node, why: str) -> ConfigError:
        return ConfigError(f"{self._path}: {node} {why}", hint="the graph is not run; export it again, or simplify it")
