"""The parts of a job on this machine: in this process, or in several that each have an engine of their own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait

from mae_deploy.embedding.embedder import Embedder, Outcome
from mae_deploy.embedding.job import Job
from mae_deploy.errors import MaeDeployError

Tick = Callable[[int], object]


def run_here(job: Job, parts: Sequence[int], tick: Tick) -> Iterator[Outcome]:
    """Embed parts one after the other in this process."""
    embedder = Embedder(job)
    try:
        for part in parts:
            yield embedder.embed(part, tick)
    finally:
        embedder.close()


def run_processes(job: Job, parts: Sequence[int], workers: int, tick: Tick) -> Iterator[Outcome]:
    """Embed parts in so many processes, each of which is given the next one when it has done one.

    A worker whose parent dies ends with its next batch, as nobody reads what it reports.

    Raises:
        MaeDeployError: as the worker raised it; or a worker died.
    """
    context = multiprocessing.get_context("spawn")  # engines have threads, which a fork would not
    waiting, pipes = iter(parts), list[Connection]()
    started = []
    for _ in range(min(workers, len(parts))):
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(job, theirs), daemon=True)
        process.start()
        theirs.close()
        _give(ours, next(waiting))
        pipes.append(ours)
        started.append(process)
    try:
        while pipes:
            for pipe in wait(pipes):
                assert isinstance(pipe, Connection)
                match _received(pipe):
                    case int() as images:
                        tick(images)
                    case Outcome() as outcome:
                        yield outcome
                        _give(pipe, part := next(waiting, None))
                        if part is None:
                            pipes.remove(pipe)
                    case error:
                        raise error
    finally:
        for process in started:
            if pipes:  # something failed, or nobody wants the rest
                process.kill()
            process.join()


def _received(pipe: Connection) -> int | Outcome | Exception:
    try:
        found: int | Outcome | Exception = pipe.recv()
    except (EOFError, ConnectionError):
        return _died()
    return found


def _give(pipe: Connection, part: int | None) -> None:
    """Raise MaeDeployError where nobody is there to take it, unless it is that there is nothing more to do."""
    try:
        pipe.send(part)
    except ConnectionError as error:
        if part is not None:
            raise _died() from error


def _died() -> MaeDeployError:
    return MaeDeployError(
        "a process that computes features has died: out of memory?",
        hint="fewer --engine-workers, a smaller --batch-size; the same call goes on",
    )


def _work(job: Job, pipe: Connection) -> None:
    """A worker: parts come through the pipe, and what was done goes back."""
    try:
        embedder = Embedder(job)
        while (part := pipe.recv()) is not None:
            pipe.send(embedder.embed(part, pipe.send))
        embedder.close()
    except (EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        return  # nobody is there any more
    except Exception as error:
        pipe.send(error)
