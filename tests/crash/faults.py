"""What may happen to a command that writes: it is killed or asked to stop, the disk is full, fails once or cannot be
written, the output is named oddly, another process has the same output.

Each takes a trial and random numbers and yields what is wrong, after a word on when it happened. One that had ended
before anything happened yields nothing at all, and does not count.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mae_deploy.training.monitor.signals import EXIT_STOPPED
from tests.crash.cases import digest_of
from tests.crash.trial import Trial

Found = Iterator[str]
"""When it happened, then what was wrong."""

REFUSED = (1, 2)

ODD = {
    "ünï 日本 [x]*? %s{0}$HOME,a=b '\"#: y": False,
    "two\nlines\x1b[31mred": True,
    "-leading": True,
    "~": True,
    os.fsdecode(b"not-utf8-\xff"): False,
    "n" * 247: False,
    "n" * 256: False,
}
"""Names that a file may have, or may not, and whether they are given as they are, from the working folder."""


def kill(trial: Trial, moment: random.Random) -> Found:
    """SIGKILL, half of the times at a random time, half before a random change of a file."""
    trial.lay_out()
    if moment.random() < 0.5:
        change = moment.randint(1, max(1, trial.changes))
        when = f"before change {change} of {trial.changes}"
        process = trial.start(trial.arguments(), kill_at=change)
    else:
        delay = moment.uniform(0, trial.seconds)
        when = f"after {delay:.2f} of {trial.seconds:.2f} s"
        process = trial.start(trial.arguments())
        process.join(delay)
        process.kill()
    process.join()
    if process.exitcode == -signal.SIGKILL:
        yield when
        yield from trial.wrong()


def stop(trial: Trial, moment: random.Random) -> Found:
    """SIGTERM, SIGHUP or, as a terminal does it to all processes of a command, SIGINT; once or twice."""
    trial.lay_out()
    number, times = moment.choice((signal.SIGTERM, signal.SIGHUP, signal.SIGINT)), moment.choice((1, 2))
    send = os.killpg if number == signal.SIGINT else os.kill
    delay = moment.uniform(0, trial.seconds)
    process = trial.start(trial.arguments())
    time.sleep(0.01)  # until it listens
    process.join(delay)
    for _ in range(times):
        if process.is_alive() and process.pid is not None:
            send(process.pid, number)
            process.join(moment.uniform(0, 0.02))
    process.join()
    if process.exitcode == 0:
        return
    yield f"{times} {number.name} after {delay:.2f} of {trial.seconds:.2f} s"
    yield from trial.unclear(process.exitcode, (128 + number, EXIT_STOPPED))
    yield from [] if times > 1 else trial.half_written()
    yield from trial.wrong()


def fill(trial: Trial, moment: random.Random) -> Found:
    """A disk that is full after a random number of bytes."""
    trial.lay_out()
    size = moment.randint(1, max(2, trial.size * 5 // 4 // 4096)) * 4096
    with trial.disk.full_after(size) as largest:
        code = trial.run(trial.arguments(), largest=largest)
    yield from _after(trial, code, f"a disk that is full after {size} of {trial.size} bytes")


def fail(trial: Trial, moment: random.Random) -> Found:
    """A disk that fails once: when a file is opened, flushed or renamed, or a folder made."""
    trial.lay_out()
    change = moment.randint(1, max(1, 2 * trial.changes))
    code = trial.run(trial.arguments(), fail_at=change)
    yield from _after(trial, code, f"an error of the disk at change {change}")


def _after(trial: Trial, code: int | None, when: str) -> Found:
    """What is wrong where a command could not write; nothing happened to one that did its work."""
    if code == 0:
        return
    yield when
    yield from trial.unclear(code, REFUSED)
    yield from trial.half_written()
    yield from trial.wrong()


def read_only(trial: Trial, moment: random.Random) -> Found:
    """A disk that cannot be written."""
    trial.lay_out()
    with trial.disk.read_only() as so:
        code = trial.run(trial.arguments())
    if so and code != 0:
        yield "a disk that cannot be written"
        yield from trial.unclear(code, REFUSED)


def two(trial: Trial, moment: random.Random) -> Found:
    """Two processes with one output."""
    trial.lay_out()
    logs = [trial.log.with_name(f"log-{number}.txt") for number in range(2)]
    processes = []
    for log in logs:
        processes.append(trial.start(trial.arguments(), log=log))
        time.sleep(moment.uniform(0, trial.seconds / 2))
    for process in processes:
        process.join()
    yield "two processes"
    codes = [process.exitcode for process in processes]
    if 0 not in codes:
        yield f"none of both did its work: {codes}, {logs[0].read_text()[-300:]}, {logs[1].read_text()[-300:]}"
    elif differing := trial.differing():
        yield f"what is there is not what one of them writes: {differing}"
    for code, log in zip(codes, logs, strict=True):
        if code:
            shutil.copyfile(log, trial.log)
            yield from trial.unclear(code, (2,))
    yield from trial.half_written()


# --- places ---------------------------------------------------------------------------------------------------------


def odd_outputs(trial: Trial, moment: random.Random) -> Found:
    """Outputs of odd names, absolute and from the working folder."""
    yield f"{len(ODD)} names of outputs"
    for name, relative in ODD.items() if trial.case.digest is digest_of else ():  # else it is no file
        trial.lay_out()
        called = Path(f"{name}{trial.case.suffix}")
        out = trial.place / called
        try:
            if trial.case.start is not None:
                trial.out.rename(out)
        except OSError:  # there can be no such file
            continue
        code = trial.run(trial.arguments(out=called if relative else out))
        if code != 0:
            yield from (f"{name!r}: {what}" for what in (*trial.unclear(code, REFUSED), *trial.half_written()))
        elif differing := trial.differing(out):
            yield f"{name!r}: another output: {differing}"


def odd_inputs(trial: Trial, moment: random.Random) -> Found:
    """Inputs in folders of odd names."""
    yield f"{len(ODD)} names of inputs"
    for name in ODD:
        trial.lay_out()
        root = trial.log.with_name(name)
        try:
            root.symlink_to(trial.root)
        except OSError:
            continue
        try:
            code = trial.run(trial.arguments(root=root))
        finally:
            root.unlink()
        if code != 0:
            yield from (f"{name!r}: {what}" for what in (*trial.unclear(code, REFUSED), *trial.half_written()))


def places(trial: Trial, moment: random.Random) -> Found:
    """Outputs where there is something else, or nothing yet."""
    yield "places"
    if trial.case.start is not None:  # the output is there before
        return
    for name, prepare in _PLACES.items():
        trial.lay_out()
        out, may_do = prepare(trial)
        before = _listing(trial.place)
        code = trial.run(trial.arguments(out=out))
        if code == 0 and may_do:
            if differing := trial.differing(trial.place / out):
                yield f"{name}: another output: {differing}"
        elif code == 0:
            yield from () if trial.case.several else (f"{name}: it wrote there",)  # several are below the place
        else:
            yield from (f"{name}: {what}" for what in (*trial.unclear(code, REFUSED), *trial.half_written()))
            if may_do and name not in _MAY_BE_REFUSED:
                yield f"{name}: refused, {trial.said()[-300:]}"
            if lost := before - _listing(trial.place):
                yield f"{name}: {', '.join(map(str, lost))} is lost"


def _listing(folder: Path) -> set[tuple[Path, bytes]]:
    return {(path, path.read_bytes() if path.is_file() else b"") for path in folder.rglob("*")}


def _absent(trial: Trial) -> tuple[Path, bool]:
    return trial.place / "not" / "there" / trial.out.name, True


def _below_a_file(trial: Trial) -> tuple[Path, bool]:
    (trial.place / "file").write_text("kept")
    return trial.place / "file" / trial.out.name, False


def _file(trial: Trial) -> tuple[Path, bool]:
    trial.out.write_text("kept")
    return trial.out, False


def _full_folder(trial: Trial) -> tuple[Path, bool]:
    trial.out.mkdir()
    (trial.out / "kept").write_text("kept")
    return trial.out, False


def _empty_folder(trial: Trial) -> tuple[Path, bool]:
    trial.out.mkdir()
    return trial.out, not trial.case.suffix


def _link_to_folder(trial: Trial) -> tuple[Path, bool]:
    (trial.place / "real").mkdir()
    (trial.place / "link").symlink_to("real")
    return trial.place / "link" / trial.out.name, True


def _out_is_a_link(trial: Trial) -> tuple[Path, bool]:
    (trial.place / "real").mkdir()
    trial.out.symlink_to("real")
    return trial.out, not trial.case.suffix


def _dangling(trial: Trial) -> tuple[Path, bool]:
    trial.out.symlink_to("nowhere")
    return trial.out, True


def _loop(trial: Trial) -> tuple[Path, bool]:
    trial.out.symlink_to(trial.out.name)
    return trial.out, True


def _working_folder(trial: Trial) -> tuple[Path, bool]:
    return Path("."), not trial.case.suffix


def _long(trial: Trial) -> tuple[Path, bool]:
    return trial.place / "/".join(["n" * 200] * 30) / trial.out.name, False


def _device(trial: Trial) -> tuple[Path, bool]:
    try:
        os.mknod(trial.place / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))  # one that may be lost
    except PermissionError:
        return _pipe(trial)
    return trial.place / "null", False


def _pipe(trial: Trial) -> tuple[Path, bool]:
    os.mkfifo(trial.place / "pipe")
    return trial.place / "pipe", False


_PLACES: dict[str, Callable[[Trial], tuple[Path, bool]]] = {
    "a folder that is not there": _absent,
    "below a file": _below_a_file,
    "a file is there": _file,
    "a folder with a file": _full_folder,
    "an empty folder": _empty_folder,
    "a link to a folder above": _link_to_folder,
    "a link to an empty folder": _out_is_a_link,
    "a link to nothing": _dangling,
    "a link to itself": _loop,
    "the working folder": _working_folder,
    "a path that is too long": _long,
    "a device": _device,
    "a pipe": _pipe,
}
"""By what is there; each says where to write, and whether it may work."""

_MAY_BE_REFUSED = ("a link to nothing", "a link to itself", "the working folder", "a link to an empty folder")

FAULTS: dict[str, Callable[[Trial, random.Random], Found]] = {
    "kill": kill,
    "stop": stop,
    "full": fill,
    "error": fail,
    "read-only": read_only,
    "two": two,
    "outputs": odd_outputs,
    "inputs": odd_inputs,
    "places": places,
}

ONCE = ("read-only", "outputs", "inputs", "places")
"""Those in which nothing is random."""
