"""The report of `gpu_check.py`: what was found, from the records of its finished steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

from scripts.gpu_check_speed import BARE

Record = dict[str, Any]
Row = dict[str, Any]

_SOURCES = ("pytorch+tensorrt", "tensorrt", "pytorch")
"""Parts of a speed step; what was timed in turns comes first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """A figure that is asked for, and whether it is met."""

    model: str
    what: str
    value: float
    target: float | None
    """None: no figure is asked for."""
    unit: str = "×"
    in_turns: bool = True
    """Whether both were timed in turns, in one process."""

    @property
    def met(self) -> bool | None:
        """Whether the target is reached: microseconds from above, else from below."""
        if self.target is None:
            return None
        return self.value < self.target if self.unit == "µs" else self.value >= self.target

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "met": self.met}


def ratios(model: str, rows: Sequence[Row]) -> list[Ratio]:
    """What can be said of one model from its rows, each of which has the `source` that it was timed in."""
    found: list[Ratio | None] = [
        _ratio(
            model,
            "visible patches over all, FP16, batch 32",
            rows,
            _tensorrt("visible"),
            _tensorrt("full"),
            32,
            3.0 if model in ("base", "large") else None,
        ),
        _ratio(
            model, "TensorRT FP16 over PyTorch eager FP16, batch 1", rows, _tensorrt("full"), _torch("pytorch"), 1, 1.5
        ),
        _ratio(
            model,
            "TensorRT FP16 over torch.compile FP16, batch 32",
            rows,
            _tensorrt("full"),
            _torch("torch.compile"),
            32,
            1.0,
        ),
        _ratio(
            model, "TensorRT INT8 over FP16, batch 32", rows, _tensorrt("full", "int8"), _tensorrt("full"), 32, None
        ),
        _overhead(model, rows),
    ]
    return [ratio for ratio in found if ratio is not None]


def _ratio(
    model: str, what: str, rows: Sequence[Row], mine: Record, other: Record, batch: int, target: float | None
) -> Ratio | None:
    """How many times the images a second of another one; of rows timed in turns where there are such."""
    for source in _SOURCES:
        here = [row for row in rows if row["source"] == source]
        if (pair := _pair(here, mine, other, batch)) is not None:
            return Ratio(model=model, what=what, value=pair[1]["p50_ms"] / pair[0]["p50_ms"], target=target)
    pair = _pair(rows, mine, other, batch)
    return (
        None
        if pair is None
        else Ratio(model=model, what=what, value=pair[1]["p50_ms"] / pair[0]["p50_ms"], target=target, in_turns=False)
    )


def _overhead(model: str, rows: Sequence[Row]) -> Ratio | None:
    """Microseconds of a call of ours above TensorRT's bare call."""
    for source in _SOURCES:
        here = [row for row in rows if row["source"] == source]
        pair = _pair(here, _tensorrt("full"), {**_tensorrt("full"), "engine": BARE}, 1)
        if pair is not None:
            value = 1000 * (pair[0]["p50_ms"] - pair[1]["p50_ms"])
            return Ratio(
                model=model,
                what="a call above TensorRT's bare enqueue, FP16, batch 1",
                value=value,
                target=50.0,
                unit="µs",
            )
    return None


def _tensorrt(tokens: str, precision: str = "fp16") -> Record:
    return {"engine": "tensorrt", "precision": precision, "tokens": tokens, "arrays": "gpu"}


def _torch(engine: str) -> Record:
    return {"engine": engine, "precision": "fp16", "tokens": "full", "arrays": "gpu"}


def _pair(rows: Sequence[Row], first: Record, second: Record, batch: int) -> tuple[Row, Row] | None:
    found = [
        next(
            (row for row in rows if row["batch"] == batch and all(row[key] == value for key, value in wanted.items())),
            None,
        )
        for wanted in (first, second)
    ]
    return None if found[0] is None or found[1] is None else (found[0], found[1])


# --- the whole -------------------------------------------------------------------------------------------------------


def report(
    records: Mapping[str, Record],
    missing: Mapping[str, str],
    machine: Mapping[str, str],
    *,
    random_weights: Sequence[str],
) -> dict[str, Any]:
    """Everything, as JSON values.

    Args:
        records: of the steps that have run, by name.
        missing: steps that have not, and why.
        random_weights: models that had no checkpoint.
    """
    rows: dict[str, list[Row]] = {}
    for name, record in records.items():
        kind, _, rest = name.partition("/")
        if kind == "speed" and record["status"] == "done":
            model, _, source = rest.partition("/")
            rows.setdefault(model, []).extend({**row, "source": source} for row in record["result"])
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": dict(machine),
        "random_weights": list(random_weights),
        "ratios": [ratio.to_dict() for model, found in rows.items() for ratio in ratios(model, found)],
        "engines": [_engine(name, records) for name in records if name.startswith("build/")],
        "tests": records.get("tests", {}).get("result"),
        "speed": rows,
        "failed": {name: record["message"] for name, record in records.items() if record["status"] == "failed"},
        "missing": dict(missing),
    }


def _engine(name: str, records: Mapping[str, Record]) -> dict[str, Any]:
    """One engine: how it was built, and the worst of its outputs against PyTorch."""
    bundle, record = name.partition("/")[2], records[name]
    verified = records.get(f"verify/{bundle}", {})
    entry = record["result"] if record["status"] == "done" else {}
    checked = verified.get("result") if verified.get("status") == "done" else None
    cosines = [output["cosine"] for output in checked["outputs"] if output["cosine"] is not None] if checked else []
    build = entry.get("build", {})
    return {
        "bundle": bundle,
        "status": record["status"],
        "why": record["message"],
        "seconds": build.get("seconds"),
        "size_bytes": build.get("size"),
        "fused_attention": build.get("kernels", {}).get("fused_attention"),
        "worst_cosine": min(cosines, default=None),
        "verified": checked["passed"] if checked else None,
    }


# --- as a page -------------------------------------------------------------------------------------------------------


def markdown(found: Mapping[str, Any]) -> str:
    """The report as a page."""
    machine = "\n".join(f"| {name} | {value} |" for name, value in found["machine"].items())
    parts = [
        f"# {found['machine']['GPU']}\n\n| machine | |\n|---|---|\n{machine}\n| date | {found['created']} |\n",
        _NOTES,
    ]
    if found["random_weights"]:
        parts.append(
            f"Random weights: {', '.join(found['random_weights'])}. Speed does not depend on them; INT8's accuracy was"
            " not checked.\n"
        )
    if found["tests"]:
        parts.append(f"GPU tests: {found['tests']}.\n")
    parts.append(
        "## Ratios\n\n" + _table(("model", "what", "figure", "asked for", "met"), map(_ratio_cells, found["ratios"]))
    )
    parts.append(
        "## Engines\n\n"
        + _table(
            ("bundle", "built", "build s", "MB", "fused attention", "worst cosine", "verified"),
            map(_engine_cells, found["engines"]),
        )
    )
    for model, rows in found["speed"].items():
        titles = ("engine", "precision", "tokens", "arrays", "batch", "p50 ms", "p95 ms", "images/s", "timed with")
        parts.append(f"## Speed: {model}\n\n" + _table(titles, map(_speed_cells, rows)))
    for title in ("failed", "missing"):
        if found[title]:
            parts.append(
                f"## {title.capitalize()}\n\n"
                + "\n".join(f"- {name}: {why}" for name, why in found[title].items())
                + "\n"
            )
    return "\n".join(parts)


_NOTES = """Candidates of a batch size took turns, round by round; figures are medians (p50) of wall time from call to finished outputs. `arrays` says where
inputs and outputs are: on the GPU, or on the host and copied. "tensorrt, bare" is one enqueue and one wait with everything in place. PyTorch computes
the whole encoder; its outputs stay on the GPU. A figure marked * is of two processes that did not take turns.
"""


def _ratio_cells(ratio: Mapping[str, Any]) -> list[str]:
    sign = "" if ratio["in_turns"] else " *"
    target = (
        "-"
        if ratio["target"] is None
        else f"{'below ' if ratio['unit'] == 'µs' else ''}{ratio['target']:g} {ratio['unit']}"
    )
    return [ratio["model"], ratio["what"], f"{ratio['value']:.2f} {ratio['unit']}{sign}", target, _yes(ratio["met"])]


def _engine_cells(engine: Mapping[str, Any]) -> list[str]:
    size = None if engine["size_bytes"] is None else engine["size_bytes"] / 1e6
    figures = [
        _number(engine["seconds"], "{:.0f}"),
        _number(size, "{:.1f}"),
        _number(engine["fused_attention"], "{}"),
        _number(engine["worst_cosine"], "{:.6f}"),
    ]
    status = engine["status"] if not engine["why"] else f"{engine['status']}: {engine['why']}"
    return [engine["bundle"], status, *figures, _yes(engine["verified"])]


def _speed_cells(row: Mapping[str, Any]) -> list[str]:
    figures = [f"{row['p50_ms']:.3f}", f"{row['p95_ms']:.3f}", f"{row['images_per_second']:.0f}"]
    return [row["engine"], row["precision"], row["tokens"], row["arrays"], str(row["batch"]), *figures, row["source"]]


def _table(titles: Sequence[str], rows: Any) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |" for cells in lines) + "\n"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _yes(value: bool | None) -> str:
    return "-" if value is None else "yes" if value else "**no**"
