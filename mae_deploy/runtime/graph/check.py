"""Whether a graph ends, and how much memory and work it takes: known before an engine sees it."""

from __future__ import annotations

import math
from collections import ChainMap, Counter
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mae_deploy.errors import ConfigError
from mae_deploy.runtime.graph.nodes import Graph, Node, Tensor, read_graph
from mae_deploy.runtime.graph.operators import is_known, products, results
from mae_deploy.runtime.graph.shapes import LEFT_OUT

_NUMBERS = 1 << 26
"""That an image may need at once whatever the network: 256 MiB in FP32."""
_PRODUCTS = 10**10
"""Multiply-adds of an image whatever the network: seconds on a core."""
_MARGIN = 4
"""Times what a plain network of these sizes needs."""
_COPIES = 8
"""Of the weights, as other types and shapes, that an engine may compute when it loads: dequantised, transposed."""
_OF_SIZES = ("Shape", "Size")
"""Operators whose results are constants where the sizes are."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What an image may cost."""

    numbers: int = 16 * _NUMBERS
    """That exist at the same time."""
    products: int = 1000 * _PRODUCTS


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


Shapes = Mapping[str, Sequence[int]]
"""Of inputs, by name; one that is left out has the file's, its open sizes 1."""


_Key = tuple[tuple[str, tuple[int, ...]], ...]


class GraphCheck:
    """Refuses what no engine should run, for each of the sizes that it is asked about: operators that are not known,
    memory or work beyond every such network's.
    """

    def __init__(self, path: Path, network: Network | None = None) -> None:
        """Read a graph.

        Args:
            network: None: one that nothing is known of.

        Raises:
            ConfigError: as `read_graph`.
        """
        self._path, self._graph = path, read_graph(path)
        self._limits = Limits() if network is None else network.limits(self._graph.num_weights)
        self._passed: set[_Key] = set()

    def check(self, shapes: Shapes) -> None:
        """Follow the graph as an engine would run it with these inputs, if that was not done before. Inputs that are
        not of the graph's own rank and fixed sizes are left to the engine, which refuses them.

        Raises:
            ConfigError: the graph is refused; the message names the node.
        """
        sizes = _key(shapes)
        if sizes not in self._passed and all(_fits(shape, self._graph.inputs.get(name)) for name, shape in sizes):
            self.follow(shapes)

    def follow(self, shapes: Shapes) -> Mapping[str, Tensor]:
        """What is known of every value.

        Raises:
            ConfigError: as `check`.
        """
        inputs = {
            name: Tensor(tuple(shapes.get(name, [side if isinstance(side, int) else 1 for side in own])))
            for name, own in self._graph.inputs.items()
        }
        batch = max((shape[0] for shape in shapes.values() if len(shape)), default=1)
        found = _Run(self._path, self._limits, self._graph.num_weights, batch).through(self._graph, inputs)
        self._passed.add(_key(shapes))
        return found


def _key(shapes: Shapes) -> _Key:
    return tuple((name, tuple(shape)) for name, shape in shapes.items())


def _fits(shape: Sequence[int], own: Sequence[int | str] | None) -> bool:
    return own is None or (
        len(shape) == len(own)
        and all(side == fixed for side, fixed in zip(shape, own, strict=True) if isinstance(fixed, int))
    )


def check_graph(path: Path, trials: Iterable[Shapes], network: Network | None = None) -> GraphCheck:
    """Refuse a graph with inputs of any of these sizes; returns what checks it for those that it meets later.

    Raises:
        ConfigError: as `GraphCheck.check`.
    """
    found = GraphCheck(path, network)
    for shapes in trials:
        found.follow(shapes)
    return found


class _Run:
    """Goes through a graph as an engine would, with sizes instead of numbers."""

    def __init__(self, path: Path, limits: Limits, num_weights: int, batch: int) -> None:
        self._path, self._batch = path, batch
        self._numbers, self._most_products = limits.numbers * batch, limits.products * batch
        self._most_constants = self._numbers + _COPIES * num_weights
        self._products = self._live = self._constants = 0

    def through(
        self, graph: Graph, outer: MutableMapping[str, Tensor], *, idle: bool = False
    ) -> MutableMapping[str, Tensor]:
        """Every node; returns all that is known at its end.

        Args:
            outer: inputs, and in a branch what is known around it.
            idle: a branch that is not taken: only what engines compute of constants when they load.
        """
        known: MutableMapping[str, Tensor] = ChainMap(
            {name: tensor._replace(constant=True) for name, tensor in graph.constants.items()}, outer
        )
        made_here: set[str] = set()
        uses = Counter((*graph.reads, *graph.outputs))
        before = self._live
        for node in graph.nodes:
            made = self._results(node, known, idle)
            self._count(node, [known[name] for name in node.inputs if name in known], made)
            for name, tensor in zip(node.outputs, made, strict=False):
                if not name:
                    continue
                if name in known:
                    raise self._refusal(node, f"makes '{name[:100]}', which is there already")
                known[name] = tensor
                made_here.add(name)
                if tensor.constant:
                    self._constants += tensor.size
                elif uses[name]:
                    self._live += tensor.size
            for name, times in Counter(node.reads).items():
                uses[name] -= times
                if name in made_here and not uses[name] and not known[name].constant:
                    self._live -= known[name].size
        self._live = before
        return known

    def _results(self, node: Node, known: MutableMapping[str, Tensor], idle: bool) -> list[Tensor]:
        if not (is_known(node) or node.title == "If"):
            raise ConfigError(
                f"{self._path}: {node} is of an operator that networks of our kind do not have",
                hint="give the graph from before an optimiser or quantiser wrote it, or export it again",
            )
        given = [known.get(name) if name else LEFT_OUT for name in node.inputs]
        if idle and not all(tensor is not None and (tensor.constant or tensor is LEFT_OUT) for tensor in given):
            for graph in node.graphs:
                self.through(graph, known, idle=True)
            return []
        whole = [tensor for tensor in given if tensor is not None]
        if len(whole) < len(given):
            missing = next(name for name in node.inputs if name and name not in known)
            raise self._refusal(node, f"takes '{missing[:100]}', which nothing before it makes")
        if node.title == "If":
            return self._branches(node, whole, known)
        if node.graphs:
            raise self._refusal(node, "runs a graph of its own again and again")
        try:
            made = results(node, whole)
        except KeyError as error:
            raise self._refusal(node, f"lacks the attribute {error}") from error
        except (ValueError, IndexError, TypeError, ZeroDivisionError, OverflowError) as error:
            raise ConfigError(
                f"{self._path}: {node} cannot be followed for {self._images}: {str(error)[:300]}",
                hint="export it again: with an open batch, or with its fixed one declared",
            ) from error
        constant = node.operator in _OF_SIZES or all(tensor.constant or tensor is LEFT_OUT for tensor in whole)
        return [tensor._replace(constant=constant) for tensor in made]

    def _branches(self, node: Node, given: Sequence[Tensor], known: MutableMapping[str, Tensor]) -> list[Tensor]:
        """Of both branches, where sizes alone do not tell which is taken."""
        found: list[list[Tensor]] = []
        condition = given[0].values if given else None
        for name in ("then_branch", "else_branch"):
            branch = node.attributes.get(name)
            if not isinstance(branch, Graph):
                raise self._refusal(node, f"has no {name}")
            idle = condition is not None and bool(np.all(condition)) != (name == "then_branch")
            ends = self.through(branch, known, idle=idle)
            if not idle:
                found.append([ends[output] for output in branch.outputs if output in ends])
        if len({tuple(tensor.shape for tensor in branch) for branch in found}) > 1:
            raise self._refusal(node, "has branches of different sizes, and which is taken shows only when it runs")
        return [tensor if len(found) == 1 else Tensor(tensor.shape) for tensor in found[0]]

    def _count(self, node: Node, given: Sequence[Tensor], made: Sequence[Tensor]) -> None:
        constants = self._constants + sum(tensor.size for tensor in made if tensor.constant)
        needed = self._live + sum(tensor.size for tensor in made if not tensor.constant)
        for count, most in ((needed, self._numbers), (constants, self._most_constants)):
            if count > most:
                raise self._refusal(
                    node,
                    f"would need {count:,} numbers at once for {self._images}, of {most:,} that such a network may",
                )
        self._products += products(node, given, made) if made and node.operator != "If" else 0
        if self._products > self._most_products:
            raise self._refusal(
                node,
                f"would be reached after {self._products:,} products for {self._images}, of"
                f" {self._most_products:,} that such a network may take",
            )

    @property
    def _images(self) -> str:
        return f"{self._batch} image{'s' if self._batch > 1 else ''}"

    def _refusal(self, node: Node, why: str) -> ConfigError:
        return ConfigError(f"{self._path}: {node} {why}", hint="the graph is not run; export it again, or simplify it")
