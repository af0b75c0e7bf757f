"""Kill every command that writes at random moments, and look at what is left.

Run: python -m tests.crash.run [--kills 50] [--only NAME] [--out crash.json]

Half of the kills come at a random time, half before a random change of a file. What is there afterwards must be whole
or refused, the same command must end as it does without a kill, to the byte, and nothing half written may stay.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mae_deploy.cli import main as command
from mae_deploy.training.state.progress import damage
from tests.crash.cases import CASES, lay_out, write_inputs
from tests.training.tiny_runs import start_process

_CHANGES = ("os.rename", "os.symlink", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link")
_WAIT = 600


@dataclass(frozen=True, slots=True)
class Fault:
    """What was wrong after a kill."""

    case: str
    when: str
    what: str


class Trial:
    """A command, what it writes without a kill, and how long that takes."""

    def __init__(self, name: str, root: Path, scratch: Path) -> None:
        self.name, self.case, self.root = name, CASES[name], root
        self.out = scratch / "place" / f"out{self.case.suffix}"
        self.log = scratch / "log.txt"
        lay_out(self.case, root, self.out)
        began = time.monotonic()
        code = self.run(self.arguments())
        self.seconds = time.monotonic() - began
        if code != 0:
            raise RuntimeError(f"{name} without a kill: {code}\n{self.said()}")
        self.killed = False
        self.changes = int((scratch / "changes").read_text())
        self.whole = self.case.digest(self.out)

    def arguments(self, *more: str) -> list[str]:
        """Of the command."""
        return [str(argument) for argument in (*self.case.arguments(self.root, self.out), *more)]

    def start(self, arguments: list[str], kill_at: int | None = None) -> ForkServerProcess:
        """The command in a process of its own."""
        return start_process(_child, self.name, arguments, self.out, self.log, kill_at)

    def run(self, arguments: list[str]) -> int | None:
        """Its exit code."""
        process = self.start(arguments)
        process.join(_WAIT)
        return process.exitcode

    def said(self) -> str:
        """What the last call said."""
        return self.log.read_text(errors="replace") if self.log.is_file() else ""

    def kill(self, moment: random.Random) -> Iterator[Fault]:
        """Kill it once and judge; nothing where it had ended before."""
        lay_out(self.case, self.root, self.out)
        if moment.random() < 0.5:
            change = moment.randint(1, max(1, self.changes))
            when = f"before change {change} of {self.changes}"
            process = self.start(self.arguments(), kill_at=change)
        else:
            delay = moment.uniform(0, self.seconds)
            when = f"after {delay:.2f} of {self.seconds:.2f} s"
            process = self.start(self.arguments())
            process.join(delay)
            process.kill()
        process.join(_WAIT)
        if process.exitcode != -signal.SIGKILL:
            return
        self.killed = True
        yield from (Fault(self.name, when, what) for what in self._wrong())

    def _wrong(self) -> Iterator[str]:
        case, out = self.case, self.out
        there = out.exists()
        if case.atomic and there and case.digest(out) != self.whole:
            yield "half an output is there"
        for step in [] if case.atomic else out.glob("**/checkpoints/step-*"):
            if (step / "state").is_dir() and (found := damage(step)) is not None:
                yield f"half a checkpoint is there: {found}"
        if there and not case.atomic and case.reads is not None:
            code = self.run([str(argument) for argument in case.reads(out)])
            if code not in (0, 1, 2) or "Traceback" in self.said():
                yield f"reading what is there: {code}, {self.said()[-300:]}"
        code = self.run(self.arguments(*case.again))
        if case.atomic and there and code == 2 and "exists" in self.said():
            code = 0
        if code != 0:
            yield f"the second call: {code}, {self.said()[-500:]}"
        elif (now := case.digest(out)) != self.whole:
            differing = sorted(name for name in {**now, **self.whole} if now.get(name) != self.whole.get(name))
            yield f"the second call's output differs: {', '.join(differing)}"
        elif case.reads is not None and self.run([str(argument) for argument in case.reads(out)]) != 0:
            yield f"the output is not accepted: {self.said()[-300:]}"
        if left := [str(path.relative_to(out.parent)) for path in out.parent.rglob("*") if ".partial" in path.name]:
            yield f"half written files stay: {', '.join(left)}"


def _child(name: str, arguments: list[str], out: Path, log: Path, kill_at: int | None) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    changes = _count_changes(str(out.parent), kill_at)
    with CASES[name].within():
        code = command(arguments)
    (out.parents[1] / "changes").write_text(str(changes()))
    sys.exit(code)


def _count_changes(folder: str, kill_at: int | None) -> Callable[[], int]:
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in _CHANGES or (event == "open" and isinstance(arguments[1], str) and arguments[1][0] in "wax"):
            path = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | os.PathLike) else ""
            if path.startswith(folder) or os.sep not in path:  # a bare name: of a folder that is removed as a whole
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return lambda: count


def crash(names: list[str], kills: int, scratch: Path, *, seed: int = 0) -> dict[str, Any]:
    """Kill each of these commands so often; the counts and what was wrong."""
    root = write_inputs(scratch / "inputs")
    counts: Counter[str] = Counter()
    faults: list[Fault] = []
    for name in names:
        moment = random.Random(f"{seed} {name}")
        trial = Trial(name, root, scratch / "trial")
        for _ in range(3 * kills):
            if counts[name] == kills:
                break
            trial.killed = False
            found = list(trial.kill(moment))
            counts[name] += trial.killed
            faults += found
        wrong = [fault for fault in faults if fault.case == name]
        print(f"{name}: {counts[name]} kills, {len(wrong)} faults", file=sys.stderr, flush=True)
        for fault in wrong:
            print(f"  {fault.when}: {fault.what}", file=sys.stderr, flush=True)
    return {"kills": dict(counts), "faults": [asdict(fault) for fault in faults]}


def main() -> int:
    """Print the report as JSON; 1 where something was wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", help="this command; may be repeated")
    parser.add_argument("--kills", type=int, default=50, help="of each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the report here, too")
    given = parser.parse_args()
    with TemporaryDirectory() as folder:
        os.environ["MAE_DEPLOY_CACHE"] = str(Path(folder) / "cache")
        found = crash(given.only or list(CASES), given.kills, Path(folder), seed=given.seed)
    text = json.dumps(found, indent=1)
    print(text)
    if given.out is not None:
        given.out.write_text(text + "\n")
    return int(bool(found["faults"]))


if __name__ == "__main__":
    sys.exit(main())
