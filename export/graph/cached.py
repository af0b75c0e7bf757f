"""Keys and values that a stream keeps, as inputs and outputs of a graph.

The new rows are put behind the old ones, and attention is told by a mask which of the old ones count: those that are
recomputed do not. So a graph never writes to a cache; whoever runs it puts the new rows in their places
(docs/results/streams.md has what was measured against scattering inside the graph).
Shapes: B streams, R rows of the cache, P tokens before the patches, T = P + K tokens, H heads, d = D / H.
"""

from __future__ import annotations

from mae_deploy.export.graph.builder import Dim, GraphBuilder
from mae_deploy.export.graph.precision import FLOAT32, DType
from mae_deploy.runtime.manifest import CACHE_MASK, NEW_ROWS, OLD_TOKENS, REST


class CacheWriter:
    """Declares what a graph takes of the cache and gives back.

    Args:
        batch, rows: B and R.
        places: int64 `(B, T)`, whose values do not matter: what says how many new rows there are.
        dtype: of the cache, FP32 or FP16.
        masked: what is added to the scores of rows that do not count.
        prefix: P.
    """

    def __init__(
        self, builder: GraphBuilder, *, batch: Dim, rows: Dim, places: str, dtype: DType, masked: float, prefix: int
    ) -> None:
        b = self.builder = builder
        self._prefix = prefix
        self.batch, self.rows, self.dtype = batch, rows, dtype
        self._new: list[str] = []
        mask = b.input(CACHE_MASK, FLOAT32, [batch, rows])
        none = b.node("Mul", [b.cast(places, FLOAT32), b.scalar(0.0)], "cache/none")
        self._masked = masked
        self._new_seen = b.node("Add", [none, b.scalar(1.0)], "cache/new")
        self._seen = b.node("Concat", [mask, self._new_seen], "cache/seen", axis=1)
        self.mask = self._scores(self._seen, "cache")
        """What is added to the scores of attention: FP32 `(B, 1, 1, R + T)`."""

    def beside(self, part: str, index: str, new: str, heads: int, head_dim: int) -> str:
        """The old rows of a block and the new ones behind them: `(B, H, T, d) -> (B, H, R + T, d)`.

        Args:
            part: keys or values.
            index: of the block.
            new: in the type in which attention computes.
        """
        b, name = self.builder, f"{part}_{index}"
        old = b.input(name, self.dtype, [self.batch, heads, self.rows, head_dim])
        self._new.append(new)
        return b.node("Concat", [b.cast(old, b.types[new]), new], f"cache/{name}", axis=2)

    def mean(self, patch_tokens: str, width: int) -> str:
        """Mean over the patches that are recomputed and those that the cache has: `(B, K, D) -> (B, D)`."""
        b = self.builder
        rest = b.input(REST, FLOAT32, [self.batch, width])
        total = b.node("ReduceSum", [patch_tokens, b.integers(1)], "cache/sum", keepdims=0)
        total = b.node("Add", [rest, total], "cache/total")
        tokens = b.node("ReduceSum", [self._seen, b.integers(1)], "cache/tokens", keepdims=1)
        return b.node(
            "Div", [total, b.node("Sub", [tokens, b.scalar(float(self._prefix))], "cache/patches")], "outputs/mean"
        )

    def behind_tokens(self, tokens: str, width: int) -> tuple[str, str]:
        """The final tokens of the cache behind the new ones, FP32 `(B, T, D) -> (B, T + R, D)`, and what is added to
        the scores of attention that pools them.
        """
        b = self.builder
        old = b.input(OLD_TOKENS, FLOAT32, [self.batch, self.rows, width])
        seen = b.node("Concat", [self._new_seen, CACHE_MASK], "cache/pool_seen", axis=1)
        return b.node("Concat", [tokens, old], "cache/all_tokens", axis=1), self._scores(seen, "cache/pool")

    def _scores(self, seen: str, name: str) -> str:
        """Of rows that are seen, `(B, R + T)` of 1 and 0, what is added to scores: FP32 `(B, 1, 1, R + T)`."""
        b = self.builder
        unseen = b.node("Sub", [b.scalar(1.0), seen], f"{name}/unseen")
        bias = b.node("Mul", [unseen, b.scalar(self._masked)], f"{name}/bias")
        return b.node("Unsqueeze", [bias, b.integers(1, 2)], f"{name}/scores")

    def output(self, num_tokens: Dim, heads: int, head_dim: int) -> None:
        """Declare the new rows of all blocks as one output, in the cache's type: each output costs a call time."""
        rows = self.builder.node("Concat", self._new, "cache/new_rows", axis=1)
        shape = [self.batch, len(self._new) * heads, num_tokens, head_dim]
        self.builder.output(NEW_ROWS, rows, shape, dtype=self.dtype)
