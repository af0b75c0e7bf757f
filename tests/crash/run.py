"""Do every command that writes harm while it works, and look at what is left.

Run: python -m tests.crash.run [--fault kill] [--times 50] [--only NAME] [--out crash.json]

It is killed at random times and before random changes of files, asked to stop once and twice, the disk is full, fails
once or cannot be written, outputs and inputs have odd names, outputs are somewhere else, two processes have one output.
What is there afterwards must be whole or refused, a command that ends by itself must say why in a line, the same
command must then end as it does without, to the byte, and nothing half written may stay.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from mae_deploy.interrupts import interruptible
from mae_deploy.packages import QUIET
from tests.crash.cases import CASES, write_inputs
from tests.crash.disk import Disk
from tests.crash.faults import FAULTS, ONCE
from tests.crash.trial import Trial
from tests.fake_hub import serving
from tests.training.tiny_runs import preload, start_process


@dataclass(frozen=True, slots=True)
class Fault:
    """What was wrong."""

    case: str
    fault: str
    when: str
    what: str


@contextmanager
def prepared(scratch: Path, names: list[str]) -> Iterator[tuple[Path, Disk]]:
    """The inputs of these cases, and the disk they write to."""
    for variables in QUIET.values():  # for libraries that are imported by others than our code
        os.environ |= variables
    with ExitStack() as stack:
        disk = Disk(scratch / "disk")
        stack.callback(disk.close)
        if any(name.startswith("push") for name in names):
            stack.enter_context(serving(stack.enter_context(pytest.MonkeyPatch.context())))
        yield write_inputs(scratch / "inputs", names, _make), disk


def _make(arguments: list[str]) -> None:
    process = start_process(_command, arguments)
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"{process.exitcode}: {' '.join(arguments)}")


def _command(arguments: list[str]) -> None:
    from mae_deploy.cli import main

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(main(arguments))


def do_harm(trial: Trial, fault: str, times: int, seed: int) -> tuple[int, list[Fault]]:
    """So many times, or fewer where the command had often ended before; how often, and what was wrong."""
    moment, count, found = random.Random(f"{seed} {trial.name} {fault}"), 0, list[Fault]()
    wanted = 1 if fault in ONCE else times
    for _ in range(3 * wanted):
        if count == wanted:
            break
        happened = list(FAULTS[fault](trial, moment))
        count += bool(happened)
        found += [Fault(trial.name, fault, happened[0], what) for what in happened[1:]]
    return count, found


def harm(names: list[str], times: Mapping[str, int], scratch: Path, *, seed: int = 0) -> dict[str, Any]:
    """Do these commands each of these faults so often; the counts and what was wrong."""
    counts: dict[str, Counter[str]] = {fault: Counter() for fault in times}
    found: list[Fault] = []
    with prepared(scratch, names) as (root, disk):
        for name in names:
            try:
                trial = Trial(name, root, disk)
            except RuntimeError as error:  # the others are tried all the same
                found.append(Fault(name, "none", "before anything happened to it", str(error)))
                print(error, file=sys.stderr, flush=True)
                continue
            for fault, wanted in times.items():
                counts[fault][name], wrong = do_harm(trial, fault, wanted, seed)
                found += wrong
                print(f"{name}: {fault} {counts[fault][name]} times, {len(wrong)} wrong", file=sys.stderr, flush=True)
                for one in wrong:
                    print(f"  {one.when}: {one.what}", file=sys.stderr, flush=True)
    return {"times": {fault: dict(count) for fault, count in counts.items()}, "wrong": [asdict(one) for one in found]}


def main() -> int:
    """Print the report as JSON; 1 where something was wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", help="this command; may be repeated")
    parser.add_argument("--fault", action="append", choices=FAULTS, help="this one; may be repeated")
    parser.add_argument("--times", type=int, default=50, help="that each command is killed; others a tenth of it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the report here, too")
    given = parser.parse_args()
    preload("tests.crash.prepared")
    times = {fault: given.times if fault == "kill" else -(-given.times // 10) for fault in given.fault or FAULTS}
    with interruptible(), TemporaryDirectory() as folder:
        found = harm(given.only or list(CASES), times, Path(folder), seed=given.seed)
    text = json.dumps(found, indent=1)
    print(text)
    if given.out is not None:
        given.out.write_text(text + "\n")
    return int(bool(found["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
