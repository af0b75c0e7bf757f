"""What meets a latency is found with few measurements, also where they are noisy."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from mae_deploy.commands.compare.points import OperatingPoint, fewer_tokens, fit, smaller_images
from mae_deploy.models.config import EncoderConfig

VIT = EncoderConfig(name="own", image_size=(48, 112), patch_size=16, embed_dim=12, depth=1, num_heads=3)


def test_smaller_images_keep_their_form() -> None:
    points = smaller_images(VIT)
    assert [point.image_size for point in points] == [
        *((16, 16), (16, 32), (16, 48), (32, 64), (32, 80)),
        *((48, 96), (48, 112)),
    ]
    assert [point.keep for point in points] == [1, 2, 3, 8, 10, 18, 21]
    assert all(point.whole for point in points)


def test_fewer_tokens_of_the_same_images() -> None:
    whole = smaller_images(VIT)[-1]
    assert [str(point) for point in fewer_tokens(whole, 19)] == [
        *("19 of 21 patches at 48x112", "20 of 21 patches at 48x112", "all 21 patches at 48x112"),
    ]


def test_the_most_that_fits_is_found_by_bisection() -> None:
    whole = OperatingPoint((224, 224), 196, 196)
    ladders = {name: fewer_tokens(whole)[:-1] for name in ("slow", "fast", "slowest")}
    rate = {"slow": 0.1, "fast": 0.001, "slowest": 11.0}
    rounds: list[bool] = []

    def timed(points: Mapping[str, OperatingPoint], good: bool) -> dict[str, float]:
        rounds.append(good)
        return {name: rate[name] * point.keep for name, point in points.items()}

    found = fit(ladders, 10.0, timed)
    assert {name: point and point.keep for name, (point, _) in found.items()} == {
        "slow": 100,
        "fast": 195,
        "slowest": None,
    }
    assert [found[name][1] for name in ladders] == pytest.approx([10.0, 0.195, 11.0])
    assert rounds == [False] * 8 + [True]


def test_what_was_found_must_hold_when_measured_for_good() -> None:
    ladder = fewer_tokens(OperatingPoint((224, 224), 196, 196))[:-1]
    seen: list[int] = []

    def timed(points: Mapping[str, OperatingPoint], good: bool) -> dict[str, float]:
        seen.extend(point.keep for point in points.values() if good)
        return {name: point.keep * (0.125 if good else 0.1) for name, point in points.items()}

    assert fit({"a": ladder}, 10.0, timed) == {"a": (ladder[79], 10.0)}
    assert seen == [100, 80]
    assert fit({}, 10.0, timed) == {}
