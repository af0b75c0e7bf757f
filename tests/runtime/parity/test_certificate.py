"""Certificates: which images count, what the budgets are judged on, what is said and recorded."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mae_deploy import __version__
from mae_deploy.machine import cpu_features, cpu_name
from mae_deploy.runtime.parity import certificate as module
from mae_deploy.runtime.parity.bounds import difference_interval, mcnemar, ratio_interval, share_interval
from mae_deploy.runtime.parity.certificate import Classes, Rule, Speed, certificate, classes_of, time_both
from mae_deploy.runtime.parity.compare import Comparison
from mae_deploy.runtime.timing import Timing
from mae_deploy.runtime.tolerance import Tolerance

REFERENCE, FOUND, LABELS = (
    np.array([2, 1, 0, 4, 3, 3, 0]),
    np.array([2, 0, 0, 4, 1, 2, 1]),
    np.array([2, 1, 1, 4, 1, 0, 0]),
)
"""Of seven images both have two right and one wrong alike, FP32 alone has two right, the other alone one, and one they
have wrong in two ways."""


def classes(*, labelled: bool = True) -> Classes:
    return Classes(REFERENCE, FOUND, LABELS if labelled else None)


def many(lost: int, gained: int, images: int, *, labelled: bool = True) -> Classes:
    reference, found, labels = np.zeros((3, images), np.int64)
    found[:lost] = 1
    reference[lost : lost + gained] = 1
    return Classes(reference, found, labels if labelled else None)


@pytest.mark.parametrize(
    ("kind", "below", "at", "above"),
    [("at_least", False, True, True), ("at_most", True, True, False), ("below", True, False, False)],
)
def test_a_limit_is_met(kind: Any, below: bool, at: bool, above: bool) -> None:
    assert [Rule("it", 0.5, value, kind).passed for value in (0.4, 0.5, 0.6)] == [below, at, above]
    assert not Rule("it", 0.5, math.nan, kind).passed
    assert Rule("it", 0.5, 0.4, kind).to_dict() == {"rule": "it", kind: 0.5, "value": 0.4, "passed": below}
    assert Rule("it", 0.5, math.inf, kind).to_dict()["value"] is None


def test_which_images_count() -> None:
    found = classes()
    assert (len(found), found.lost, found.gained) == (7, 2, 1)
    assert found.top1 == pytest.approx((100 * 4 / 7, 100 * 3 / 7))
    assert found.interval == pytest.approx(tuple(100 * end for end in difference_interval(2, 1, 7)))
    rule = found.rule(1.5)
    assert (rule.name, rule.limit, rule.kind) == ("points of top-1 lost, upper end", 1.5, "at_most")
    assert rule.value == found.interval[1]
    assert found.to_dict() == {
        "images": 7,
        "labelled": True,
        "agreement": pytest.approx(3 / 7),
        "agreement_interval": pytest.approx([1 - end for end in reversed(share_interval(4, 7))]),
        "fp32_top1": pytest.approx(400 / 7),
        "top1": pytest.approx(300 / 7),
        "lost": 2,
        "gained": 1,
        "drop": pytest.approx(100 / 7),
        "drop_interval": list(found.interval),
        "mcnemar_p": mcnemar(2, 1),
    }
    json.dumps(found.to_dict())


def test_without_labels_every_other_class_is_a_loss() -> None:
    found = classes(labelled=False)
    assert (found.lost, found.gained, found.top1) == (4, 0, None)
    assert found.interval == pytest.approx(tuple(100 * end for end in difference_interval(4, 0, 7)))
    assert found.rule(1).name == "points of agreement lost, upper end"
    assert found.to_dict().keys() == {"images", "labelled", "agreement", "agreement_interval"}
    assert not found.to_dict()["labelled"]


def test_classes_are_the_largest_value_of_each_image() -> None:
    logits = np.array([[0.1, 0.9, 0.3], [2.0, -1.0, 1.0]])
    found = classes_of(logits, logits[:, ::-1], np.array([1, 2]))
    assert (found.reference.tolist(), found.found.tolist()) == ([1, 0], [1, 2])
    assert found.labels is not None
    assert found.labels.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("lost", "gained", "images", "labelled", "said"),
    [
        (0, 0, 487, True, None),
        (
            0,
            0,
            486,
            True,
            "top-1 is 100.00, 0.00 points below FP32's 100.00; --max-drop 1, and it may be ",
        ),
        (30, 10, 1000, True, "top-1 is 97.00, 2.00 points below FP32's 99.00; --max-drop 1"),
        (30, 0, 1000, False, "30 of 1000 images get another class than in FP32, 3.00 %; --max-drop 1"),
        (5, 2, 400, True, "top-1 is 98.75, 0.75 points below FP32's 99.50; --max-drop 1, and it may be "),
        (3, 0, 400, False, "3 of 400 images get another class than in FP32, 0.75 %; --max-drop 1, and it may be "),
        (4, 0, 400, False, "4 of 400 images get another class than in FP32, 1.00 %; --max-drop 1, and it may be "),
    ],
)
def test_what_is_said_of_a_budget(lost: int, gained: int, images: int, labelled: bool, said: str | None) -> None:
    found = many(lost, gained, images, labelled=labelled)
    failure = found.failure(1.0)
    if said is None:
        assert failure is None
        return
    assert failure is not None
    assert failure.startswith(said)
    if "may be" in said:
        high = f"{found.interval[1]:.2f} with 95% confidence"
        assert failure.startswith(f"{said}{high}; {images} images are too few to show it")
    else:  # a loss that is seen is no question of how many images there are
        assert failure == said


def test_how_many_images_would_do() -> None:
    few, never = many(0, 0, 100).failure(1.0), many(4, 0, 400, labelled=False).failure(1.0)
    assert few is not None
    assert few.endswith("100 images are too few to show it: about 600 would do, if they are like these")
    assert never is not None
    assert never.endswith("400 images are too few to show it")


SPEED = Speed(timing=Timing((7e-3, 8e-3, 9e-3)), baseline=Timing((1e-2, 2e-2, 1e-2)), baseline_name="fp16")


def test_the_speed_is_judged_on_the_upper_end() -> None:
    low, high = ratio_interval(SPEED.timing, SPEED.baseline)
    assert SPEED.ratio == pytest.approx(0.8)
    assert SPEED.interval == (low, high)
    rule = SPEED.rule(0.9)
    assert (rule.name, rule.limit, rule.value, rule.kind) == ("share of FP16's latency, upper end", 0.9, high, "below")
    assert SPEED.words() == (
        f"0.80 of FP16's latency, 8.00 against 10.00 ms ({low:.2f} to {high:.2f} with 95% confidence)"
    )
    assert SPEED.to_dict() == {
        "baseline": "fp16",
        "ratio": pytest.approx(0.8),
        "ratio_interval": [low, high],
        "ms": pytest.approx(8),
        "baseline_ms": pytest.approx(10),
        "rounds": 3,
    }
    assert Speed(timing=SPEED.timing, baseline=SPEED.baseline).baseline_name == "fp32"


@pytest.mark.parametrize(("seconds", "rounds"), [(0.13, 38), (1.0, 15), (0.001, 61)])
def test_two_graphs_are_timed_in_as_many_rounds_as_fit(
    monkeypatch: pytest.MonkeyPatch, seconds: float, rounds: int
) -> None:
    """Of both together, after a trial."""
    asked: list[dict[str, int]] = []

    def measured(calls: dict[str, Any], **given: int) -> dict[str, Timing]:
        asked.append(given)
        return {"mine": Timing((0.4 * seconds,) * given["repeats"]), "other": Timing((0.6 * seconds,))}

    monkeypatch.setattr(module, "measure", measured)
    speed = time_both({"mine": list, "other": list}, "mine", "other")
    assert asked == [{"repeats": 1, "warmup": 2}, {"repeats": rounds, "warmup": 1}]
    assert (len(speed.timing.seconds), speed.baseline.median, speed.baseline_name) == (rounds, 0.6 * seconds, "other")


ENGINE: Any = SimpleNamespace(name="onnxruntime", version="1.2", device="cpu", options=SimpleNamespace(num_threads=3))
COMPARISON = Comparison(
    name="logits",
    num_samples=8,
    cosine=0.999,
    centred_cosine=0.98,
    max_abs=0.02,
    max_relative=0.3,
    sqnr_db=33.0,
    worst_sqnr_db=31.0,
    top1_agreement=0.875,
)
TOLERANCE = Tolerance(
    cosine=0.995, centred_cosine=0.99, sqnr_db=30, top1_agreement=0.99, max_abs=0.01, max_relative=0.4
)


def record_of(**changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "precision": "int8",
        "images": "7 images of photos",
        "comparisons": [COMPARISON],
        "tolerance": TOLERANCE,
        "classes": classes(),
        "speed": SPEED,
        "max_drop": 99.0,
        "max_latency": 1.2,
    }
    return certificate(ENGINE, **{**given, **changes})


def test_the_record() -> None:
    record = record_of()
    json.dumps(record)
    created = record.pop("created")
    assert created.endswith("+00:00")
    assert "." not in created, "to the second"
    assert record == {
        "mae_deploy_version": __version__,
        "passed": False,
        "confidence": 0.95,
        "precision": "int8",
        "engine": "onnxruntime",
        "engine_version": "1.2",
        "device": "cpu",
        "cpu": cpu_name(),
        "instructions": list(cpu_features() or ()),
        "threads": 3,
        "images": "7 images of photos",
        "outputs": [{name: value for name, value in COMPARISON.to_dict().items() if name != "reason"}],
        "classes": classes().to_dict(),
        "speed": SPEED.to_dict(),
        "rules": [
            {"rule": "logits: cosine, worst image", "at_least": 0.995, "value": 0.999, "passed": True},
            {"rule": "logits: centred cosine, worst image", "at_least": 0.99, "value": 0.98, "passed": False},
            {"rule": "logits: SQNR in dB", "at_least": 30, "value": 33.0, "passed": True},
            # One of eight samples may always differ.
            {"rule": "logits: top-1 agreement", "at_least": 0.875, "value": 0.875, "passed": True},
            # Twice the absolute limit, three quarters of the relative one: one is enough.
            {
                "rule": "logits: largest difference, of what is allowed",
                "at_most": 1,
                "value": pytest.approx(0.75),
                "passed": True,
            },
            classes().rule(99.0).to_dict(),
            SPEED.rule(1.2).to_dict(),
        ],
    }


def test_it_passes_where_every_rule_is_met() -> None:
    loose = Tolerance(cosine=0.9)
    assert record_of(tolerance=loose)["passed"]
    assert [rule["rule"] for rule in record_of(tolerance=loose)["rules"]] == [
        "logits: cosine, worst image",
        "points of top-1 lost, upper end",
        "share of FP16's latency, upper end",
    ]
    assert not record_of(tolerance=loose, max_drop=1.0)["passed"]
    assert not record_of(tolerance=loose, max_latency=0.5)["passed"]


@pytest.mark.parametrize(
    ("changes", "classes_rule", "speed_rule"),
    [
        ({"classes": None}, False, True),
        ({"max_drop": None}, False, True),
        ({"speed": None}, True, False),
        ({"max_latency": None}, True, False),
    ],
)
def test_what_was_not_measured_or_asked_is_no_rule(
    changes: dict[str, Any], classes_rule: bool, speed_rule: bool
) -> None:
    record = record_of(**changes)
    rules = [rule["rule"] for rule in record["rules"]]
    assert any("points" in rule for rule in rules) == classes_rule
    assert any("latency" in rule for rule in rules) == speed_rule
    for name in changes.keys() & {"classes", "speed"}:
        assert record[name] is None


def test_outputs_without_classes_have_no_agreement() -> None:
    plain = Comparison(name="cls", cosine=1.0, max_abs=0.0, max_relative=0.0, centred_cosine=1.0, sqnr_db=math.inf)
    rules = record_of(comparisons=[plain], tolerance=Tolerance(sqnr_db=30, max_abs=0.5), classes=None)["rules"]
    assert [(rule["rule"], rule["value"], rule["passed"]) for rule in rules[:-1]] == [
        ("cls: SQNR in dB", None, True),
        ("cls: largest difference, of what is allowed", 0.0, True),
    ]
