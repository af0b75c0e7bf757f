"""The share of a TensorRT build that is done, from phases within phases, and an interruption that waits for the next
step.
"""

from __future__ import annotations

import pytest

from mae_deploy.runtime.tensorrt.build_progress import BuildProgress


def test_a_phase_within_a_phase_is_a_part_of_its_step() -> None:
    seen: list[tuple[str, float]] = []
    progress = BuildProgress(lambda name, share: seen.append((name, share)))
    progress.start("build", None, 2)
    progress.start("tactics", "build", 4)
    assert all(progress.step("tactics", number) for number in range(3))
    progress.finish("tactics")
    assert progress.step("build", 0)
    progress.start("myelin", "build", 5)
    progress.step("myelin", 0)
    progress.step("build", 1)
    assert seen == [
        ("tactics", 0.125),
        ("tactics", 0.25),
        ("tactics", 0.375),
        ("build", 0.5),
        ("myelin", 0.6),
        ("build", 1.0),
    ]


def test_it_never_goes_back_and_never_beyond_the_end() -> None:
    shares: list[float] = []
    progress = BuildProgress(lambda _, share: shares.append(share))
    progress.start("first", None, 2)
    progress.step("first", 0)
    progress.finish("first")
    progress.start("second", None, 0)
    progress.step("second", 4)
    progress.step("unknown", 3)
    assert shares == [0.5, 1.0, 1.0]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("no bar")])
def test_what_a_report_raises_ends_the_build(error: BaseException) -> None:
    calls: list[str] = []

    def report(name: str, _: float) -> None:
        calls.append(name)
        raise error

    progress = BuildProgress(report)
    progress.start("build", None, 3)
    assert [progress.step("build", number) for number in range(2)] == [False, False]
    assert progress.error is error
    assert calls == ["build"], "nothing is reported after that"
