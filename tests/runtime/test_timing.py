"""The stopwatch: who is called when, what is counted, and the figures of known durations."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mae_deploy.errors import ConfigError
from mae_deploy.runtime.timing import Timing, measure


def test_candidates_take_turns_and_warm_up_untimed() -> None:
    now = [0.0]
    calls: list[str] = []
    durations = {"a": iter([9.0, 1.0, 2.0, 6.0]), "b": iter([9.0, 4.0, 4.0, 4.0])}

    def candidate(name: str) -> Callable[[], None]:
        def run() -> None:
            calls.append(name)
            now[0] += next(durations[name])

        return run

    def after_call() -> None:
        calls.append(".")
        now[0] += 1000  # showing progress is not timed

    timings = measure(
        {"a": candidate("a"), "b": candidate("b")}, repeats=3, warmup=1, clock=lambda: now[0], after_call=after_call
    )
    rounds = "".join(calls).replace(".", "")
    assert calls[1::2] == ["."] * 8
    assert rounds[:2] == "ab"
    assert {rounds[2:4], rounds[4:6], rounds[6:]} == {"ab", "ba"}, "each comes first at times"
    assert list(timings["a"].seconds) == [1, 2, 6]
    assert list(timings["b"].seconds) == [4, 4, 4]
    assert timings["a"].median == 2
    assert timings["a"].ratio(timings["b"]) == 0.5


def test_figures() -> None:
    timing = Timing(tuple(value / 1000 for value in range(101, 0, -1)))
    assert timing.to_dict() == pytest.approx(
        {"min_ms": 1, "p50_ms": 51, "p95_ms": 96, "p99_ms": 100, "max_ms": 101, "calls": 101}
    )


def test_the_default_clock_runs() -> None:
    timings = measure({"sum": lambda: sum(range(20000))}, repeats=2, warmup=0)
    assert len(timings["sum"].seconds) == 2
    assert min(timings["sum"].seconds) > 0


@pytest.mark.parametrize(("functions", "repeats", "warmup"), [({}, 1, 0), ({"a": int}, 0, 0), ({"a": int}, 1, -1)])
def test_nothing_to_time(functions: dict[str, Callable[[], object]], repeats: int, warmup: int) -> None:
    with pytest.raises(ConfigError, match="nothing to time"):
        measure(functions, repeats=repeats, warmup=warmup)
