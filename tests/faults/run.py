"""Plant every fault into exported bundles, and count what `verify` and `verify --layers` find.

Run: python -m tests.faults.run [--clean 1000] [--out docs/results/faults.json]
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import onnx

from mae_deploy.errors import MaeDeployError
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.cache import runner
from mae_deploy.runtime.engines.base import Engine, EngineOptions, run_in_chunks
from mae_deploy.runtime.layers import trace_layers
from mae_deploy.runtime.manifest import file_entry
from mae_deploy.runtime.parity.checks import check_manifest, check_preprocessing, verify_engine
from mae_deploy.runtime.registry import load_engine
from tests.faults.corpus import bundles, clean_runs
from tests.faults.devices import ANSWERS, CROPS, ENTRIES, SOMETIMES, SPECS, answering, off, other_caches
from tests.faults.edit import Graph
from tests.faults.graphs import GraphFault, graph_faults

_ONE_THREAD = EngineOptions(threads=1)


@dataclass(frozen=True)
class Row:
    """A fault and what became of it."""

    bundle: str
    kind: str
    place: str
    block: int | None
    """Where it lies, if in a block."""
    effect_db: float
    """The changed outputs' signal over the change, of the output that changes most."""
    noise_db: float
    """The same of what the clean bundle differs from PyTorch by."""
    found_by: str | None
    """The first check that missed; None: the fault got through."""
    named: int | None = None
    """The block that `verify --layers` names."""

    @property
    def matters(self) -> bool:
        """Whether an output changes by more than the precision's own noise."""
        return self.effect_db < self.noise_db


class Judge:
    """One clean bundle, and copies of it with faults."""

    def __init__(self, name: str, path: Path, scratch: Path) -> None:
        self.name, self.path, self.scratch = name, path, scratch
        self.bundle = Bundle.load(path)
        self.engine_name = self.bundle.manifest["engine"]
        golden = self.bundle.golden()
        self.inputs = {key: golden[key] for key in self.bundle.sample_names}
        self.golden = {key: golden[key] for key in self.bundle.output_names}
        with load_engine(self.bundle, self.engine_name, _ONE_THREAD) as engine:
            assert verify_engine(self.bundle, engine).passed, f"{name} is not clean"
            self.clean = self._run(engine)
        self.noise = {key: _decibels(self.golden[key], self.clean[key]) for key in self.clean}

    def all(self) -> Iterator[Row]:
        """Every fault, one after the other."""
        model = onnx.load(self.path / "encoder.onnx")
        return self._rows(model, graph_faults(model))

    def kinds(self) -> set[str]:
        """Of graph faults."""
        return {fault.kind for fault in graph_faults(onnx.load(self.path / "encoder.onnx"))}

    def some(self, kinds: Collection[str]) -> Iterator[Row]:
        """Of each of these kinds of a graph's faults one, in turn in another block, and all others."""
        model = onnx.load(self.path / "encoder.onnx")
        found: dict[str, list[GraphFault]] = defaultdict(list)
        for fault in graph_faults(model):
            if fault.kind in kinds:
                found[fault.kind].append(fault)
        return self._rows(model, [faults[turn % len(faults)] for turn, faults in enumerate(found.values())])

    def _rows(self, model: onnx.ModelProto, faults: Iterable[GraphFault]) -> Iterator[Row]:
        for fault in faults:
            yield self.plant(model, fault)
        yield from self._answers()
        yield from self._prepared()
        yield from self._files()

    def plant(self, model: onnx.ModelProto, fault: GraphFault) -> Row:
        """What becomes of one fault of a graph; the block is asked for of all that are in one, or in a rotary table."""
        graph = Graph(model)
        fault.plant(graph)
        shutil.rmtree(self.scratch, ignore_errors=True)
        shutil.copytree(self.path, self.scratch)
        onnx.save(graph.model, self.scratch / "encoder.onnx")
        manifest = json.loads((self.scratch / "manifest.json").read_text())
        manifest["files"]["encoder.onnx"] = file_entry(self.scratch / "encoder.onnx")
        (self.scratch / "manifest.json").write_text(json.dumps(manifest))
        bundle, named = Bundle.load(self.scratch), None
        try:
            with load_engine(bundle, self.engine_name, _ONE_THREAD) as engine:
                effect = self._effect(self._run(engine))
                verification = verify_engine(bundle, engine)
            found = None if verification.passed else next(c.name for c in verification.checks if c.failures)
            if found is not None and (fault.block is not None or "rotary" in fault.place):
                lost = trace_layers(
                    bundle, self.engine_name, _ONE_THREAD, outputs_pass=verification.outputs_pass
                ).lost_at
                named = None if lost is None else lost.block
        except MaeDeployError as error:
            return self._row(fault.kind, fault.place, fault.block, -np.inf, f"error: {str(error)[-90:]}")
        return self._row(fault.kind, fault.place, fault.block, effect, found, named)

    def _answers(self) -> Iterator[Row]:
        for kind, make in ANSWERS.items():
            with load_engine(self.bundle, self.engine_name, _ONE_THREAD) as engine:
                with answering(engine, make):
                    self._run(engine)
                    effect = self._effect(self._run(engine))
                with answering(engine, make):
                    yield self._row(kind, "engine", None, effect, self._verdict(engine))
        for kind, (wrong_for, can_be) in SOMETIMES.items():
            if not can_be(self.bundle):
                continue
            with load_engine(self.bundle, self.engine_name, _ONE_THREAD) as engine:
                right = engine.run

                def run(
                    inputs: Any, outputs: Any = None, right: Any = right, wrong_for: Any = wrong_for
                ) -> dict[str, Any]:
                    found: dict[str, Any] = right(inputs, outputs)
                    return off(found) if wrong_for(inputs) else found

                with mock.patch.object(engine, "run", run):
                    yield self._row(kind, "engine", None, -np.inf, self._verdict(engine))
        if self.bundle.token_mode == "cached":
            with load_engine(self.bundle, self.engine_name, _ONE_THREAD) as engine:
                right = engine.run
                with mock.patch.object(
                    engine, "run", lambda inputs, outputs=None: right(other_caches(inputs), outputs)
                ):
                    effect = self._effect(self._run(engine))
                    yield self._row("the cache of another stream", "engine", None, effect, self._verdict(engine))

    def _prepared(self) -> Iterator[Row]:
        """Images made ready otherwise, and entries of the manifest that are not those of the export."""
        for kind, make in CROPS.items():
            with mock.patch.object(Preprocess, "crop", make(Preprocess.crop)):
                yield self._row(kind, "preprocessing", None, -np.inf, _first(check_preprocessing(self.bundle)))
        edits = {kind: _updating(fields) for kind, fields in SPECS.items()} | ENTRIES
        for kind, edit in edits.items():
            bundle = Bundle.load(self.path)
            edit(bundle.manifest)
            found = _first([*check_manifest(bundle), *check_preprocessing(bundle)])
            yield self._row(kind, "manifest", None, -np.inf, found)

    def _files(self) -> Iterator[Row]:
        """A bit that flips on the way to the device."""
        for file in ("encoder.onnx", "golden.npz"):
            for place in (0.1, 0.5, 0.9):
                shutil.rmtree(self.scratch, ignore_errors=True)
                shutil.copytree(self.path, self.scratch)
                content = bytearray((self.scratch / file).read_bytes())
                content[int(place * len(content))] ^= 1
                (self.scratch / file).write_bytes(content)
                try:
                    Bundle.load(self.scratch).check_files()
                    found = None
                except MaeDeployError:
                    found = "hash"
                yield self._row("a bit flipped in a file", f"{file} at {place:.0%}", None, -np.inf, found)

    def _verdict(self, engine: Engine) -> str | None:
        return _first(verify_engine(self.bundle, engine).checks)

    def _run(self, engine: Engine) -> dict[str, Any]:
        return run_in_chunks(
            runner(engine, self.bundle.manifest),
            self.inputs,
            batch=self.bundle.fixed_batch,
            outputs=self.bundle.output_names,
        )

    def _effect(self, outputs: Mapping[str, Any]) -> tuple[float, float]:
        """Of the output that changes most beside its own noise: how much it changes, and that noise."""
        pairs = [(_decibels(self.clean[key], array), self.noise[key]) for key, array in outputs.items()]
        return min(pairs, key=lambda pair: pair[0] - pair[1])

    def _row(
        self,
        kind: str,
        place: str,
        block: int | None,
        effect: Any,
        found: str | None,
        named: int | None = None,
    ) -> Row:
        changed, noise = effect if isinstance(effect, tuple) else (effect, min(self.noise.values()))
        return Row(self.name, kind, place, block, float(changed), float(noise), found, named)


def _updating(fields: Mapping[str, object]) -> Callable[[Any], Any]:
    return lambda manifest: manifest["preprocess"].update(fields)


def _first(checks: Any) -> str | None:
    return next((check.name for check in checks if check.failures), None)


def _decibels(reference: Any, found: Any) -> float:
    reference, found = np.float64(reference), np.float64(found)
    if not np.isfinite(found).all() or reference.shape != found.shape:
        return -np.inf
    error = np.square(reference - found).sum()
    return float(np.inf) if error == 0 else float(10 * np.log10(np.square(reference).sum() / error))


def report(rows: list[Row]) -> dict[str, Any]:
    """The counts, and every fault that got through."""
    matter = [row for row in rows if row.matters]
    placed = [row for row in matter if row.block is not None and row.found_by and not row.found_by.startswith("error")]
    missed = [row for row in matter if row.found_by is None]
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        kinds[row.kind]["planted"] += 1
        kinds[row.kind]["above the noise"] += row.matters
        kinds[row.kind]["found"] += row.found_by is not None
        kinds[row.kind]["found of those above"] += row.matters and row.found_by is not None
    return {
        "planted": len(rows),
        "kinds": len(kinds),
        "bundles": len({row.bundle for row in rows}),
        "above the noise": len(matter),
        "found": len(matter) - len(missed),
        "found by": dict(Counter((row.found_by or "").split(":")[0] for row in matter if row.found_by).most_common()),
        "below the noise": len(rows) - len(matter),
        "in a block": len(placed),
        "right block named": sum(row.named == row.block for row in placed),
        "by kind": {kind: dict(counts) for kind, counts in kinds.items()},
        "missed": [asdict(row) for row in missed],
        "wrong block": [asdict(row) for row in placed if row.named != row.block],
    }


def main() -> int:
    """Print the report as JSON; 1 where a fault above the noise got through or a clean bundle was refused."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="bundles whose name contains this")
    parser.add_argument("--clean", type=int, default=0, help="runs of clean bundles, none of which may be refused")
    parser.add_argument("--first-seed", type=int, default=1, help="of the clean bundles, to go on from")
    parser.add_argument("--out", type=Path, help="write the report here, too")
    given = parser.parse_args()
    with TemporaryDirectory() as folder:
        rows: list[Row] = []
        for name, path in bundles(Path(folder), only=given.only):
            made = list(Judge(name, path, Path(folder) / "scratch").all())
            through = sum(row.matters and row.found_by is None for row in made)
            print(f"{name}: {len(made)} planted, {through} above the noise not found", file=sys.stderr, flush=True)
            rows += made
        found = report(rows)
        alarms = clean_runs(Path(folder) / "clean", given.clean, given.first_seed)
        found["clean runs"], found["false alarms"] = given.clean, alarms
    text = json.dumps(found, indent=1, default=str)
    print(text)
    if given.out is not None:
        given.out.write_text(text + "\n")
    return int(bool(found["missed"] or alarms))


if __name__ == "__main__":
    sys.exit(main())
