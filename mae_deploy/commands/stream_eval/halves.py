"""What is done with the first half of a video, and with the second."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from mae_deploy.commands.stream_eval.arms import Answer, Arm, ChangedPatches, Costs, Held, Streamed, Whole
from mae_deploy.commands.stream_eval.conditions import Decoded
from mae_deploy.commands.stream_eval.config import StreamEvalConfig
from mae_deploy.commands.stream_eval.scores import Probe, Signal, average_precision, decibels, squared
from mae_deploy.config import to_dict
from mae_deploy.images.read import Array
from mae_deploy.runtime.backbone import Backbone
from mae_deploy.runtime.selection import Motion
from mae_deploy.runtime.timing import Timing

WHOLE, STALE, NTH, ALONE, CACHED, OURS = (
    "whole frames",
    "stale",
    "every n-th frame",
    "changed patches alone",
    "changed patches, cached",
    "stream",
)
"""The arms, in the order of the report."""

TOKENS = "tokens"
"""The output that the probe reads, and whose ratio is drawn."""

_STALE = 1 / 30
"""Share of the frames that the stale arm computes."""
_RATES = tuple(float(rate) for rate in np.arange(1, 51) / 50)
"""Shares of the frames at which every n-th frame is measured; n need not be whole."""
_THRESHOLDS = tuple(float(value) for value in np.geomspace(0.25, 64, 17))
"""Between which those of the changed patches are found."""
_CHOICES = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
"""Thresholds of the stream, where a cost or a signal-to-noise ratio is asked for."""
_WORST = 99
"""Percentile of the frames' errors."""


class FirstHalf:
    """Chooses thresholds, and trains the probe."""

    def __init__(self, backbone: Backbone, config: StreamEvalConfig, threshold: float | None) -> None:
        """Begin.

        Args:
            threshold: the stream's; None: it is to be chosen, and a probe to be trained, for which whole frames are
                computed.
        """
        self._backbone, self._config = backbone, config
        self._learns = threshold is None
        given = (threshold,) if threshold is not None else (config.threshold,)
        choices = _CHOICES if self._learns and (config.cost or config.snr is not None) else given
        self._streams = {value: Streamed(backbone.stream(**_options(config, value))) for value in choices}
        self._costs: dict[float, list[float]] = {value: [] for value in choices}
        self._errors = dict.fromkeys(choices, 0.0)
        self._whole, self._signal, self._probe = Whole(backbone), Signal(), Probe()
        self._changed = Costs(backbone, _THRESHOLDS)
        self._shown = False

    def add(self, frame: Any, labels: Array) -> None:
        """One frame, and which of its patches are foreground `(N,)`."""
        self._changed.add(frame)
        true = self._whole(frame).features if self._learns else {}
        self._signal.add(true)
        if TOKENS in true:
            self._probe.add(true[TOKENS][0], labels)
            self._shown |= bool(labels.any())
        for threshold, stream in self._streams.items():
            answer = stream(frame)
            self._costs[threshold].append(answer.cost)
            for name in self._judged(true):
                self._errors[threshold] += squared(true[name] - answer.features[name])

    @property
    def chosen(self) -> float:
        """The stream's threshold: the least that costs no more than asked for, or the largest that is as near as asked
        for; else the nearest to it.
        """
        config, costs = self._config, {threshold: float(np.mean(found)) for threshold, found in self._costs.items()}
        if len(costs) == 1:
            return next(iter(costs))
        if config.cost is not None:
            return min((value for value, cost in costs.items() if cost <= config.cost), default=max(costs))
        assert config.snr is not None
        (name,) = self._judged(dict.fromkeys(self._signal.names))
        energy, frames = self._signal.energy(name), len(self._costs[min(costs)])
        near = {threshold: decibels(energy, error / frames) for threshold, error in self._errors.items()}
        return max((value for value, found in near.items() if found >= config.snr), default=min(near))

    @property
    def options(self) -> dict[str, Any]:
        """Of the stream."""
        return _options(self._config, self.chosen)

    @property
    def thresholds(self) -> dict[str, float]:
        """Those at which changed patches cost what the stream costs."""
        cost = float(np.mean(self._costs[self.chosen]))
        return {
            ALONE: self._changed.threshold(cost, context=False),
            CACHED: self._changed.threshold(cost, context=True),
        }

    def probe(self) -> Probe | None:
        """The trained probe; None where the bundle has no tokens, or nothing was in front of the background."""
        if not self._shown:
            return None
        self._probe.fit()
        return self._probe

    def _judged(self, features: Mapping[str, Any]) -> list[str]:
        return [TOKENS] if TOKENS in features else list(features)[:1]


@dataclass(slots=True)
class _Course:
    """What an arm did, frame by frame."""

    costs: list[float] = field(default_factory=list)
    wholes: int = 0
    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    errors: dict[str, list[float]] = field(default_factory=dict)
    scores: list[Array] = field(default_factory=list)

    def add(self, answer: Answer, true: Mapping[str, Array], probe: Probe | None) -> None:
        """A frame's features against the true ones."""
        self.costs.append(answer.cost)
        self.wholes += answer.whole
        for name, value in true.items():
            self.errors.setdefault(name, []).append(squared(value.astype(np.float32) - answer.features[name]))
        if probe is not None:
            self.scores.append(probe.scores(answer.features[TOKENS][0]))

    def took(self, cpu: float, wall: float) -> None:
        """Seconds of one frame, from the file to its features."""
        self.cpu.append(cpu)
        self.wall.append(wall)


class SecondHalf:
    """All arms, side by side."""

    def __init__(
        self, backbone: Backbone, options: dict[str, Any], thresholds: Mapping[str, float], probe: Probe | None
    ) -> None:
        """Begin with arms that have seen nothing."""
        self._arms: dict[str, Arm] = {
            WHOLE: Whole(backbone),
            ALONE: ChangedPatches(backbone, thresholds[ALONE], context=False),
            CACHED: ChangedPatches(backbone, thresholds[CACHED], context=True),
            OURS: Streamed(backbone.stream(**options)),
        }
        self._held = {rate: Held(rate) for rate in (_STALE, *_RATES)}
        self._courses = {key: _Course() for key in (*self._arms, *self._held)}
        self._probe = probe
        self._signal = Signal()
        self.frames = 0

    def add(self, found: Decoded) -> None:
        """One frame; whoever is first at one is last at the next."""
        names = list(self._arms)
        turn = self.frames % len(names)
        self.frames += 1
        answers: dict[str, Answer] = {}
        for name in names[turn:] + names[:turn]:
            answers[name], cpu, wall = _timed(partial(self._arms[name], found.image))
            self._courses[name].took(found.cpu + cpu, found.wall + wall)
        whole, true = self._courses[WHOLE], answers[WHOLE].features
        self._signal.add(true)
        for name, answer in answers.items():
            self._courses[name].add(answer, true, self._probe)
        for rate, arm in self._held.items():
            answer, course = arm(true), self._courses[rate]
            course.add(answer, true, self._probe)
            course.took(*((whole.cpu[-1], whole.wall[-1]) if answer.whole else (found.cpu, found.wall)))

    def result(self, labels: Array) -> dict[str, Any]:
        """Rows, the curve of every n-th frame, and the course of some arms; JSON values."""
        courses = self._courses
        spent = float(np.mean(courses[OURS].costs))
        rate = min((rate for rate in _RATES if rate >= spent), default=max(_RATES))
        shown = {WHOLE: WHOLE, STALE: _STALE, NTH: rate, ALONE: ALONE, CACHED: CACHED, OURS: OURS}
        labels = labels[: self.frames].reshape(-1)
        judged = TOKENS if TOKENS in self._signal.names else self._signal.names[0]
        return {
            "rows": [self._row(name, courses[key], labels) for name, key in shown.items()],
            "curve": [
                {"cost": float(np.mean(courses[rate].costs)), "snr": self._ratio(courses[rate], judged)}
                for rate in _RATES[:-1]
            ],
            "course": {
                name: {
                    "cost": [round(cost, 4) for cost in courses[key].costs],
                    "snr": [
                        round(decibels(self._signal.energy(judged), error), 2) for error in courses[key].errors[judged]
                    ],
                }
                for name, key in shown.items()
                if name in (NTH, CACHED, OURS)
            },
        }

    def _row(self, name: str, course: _Course, labels: Array) -> dict[str, Any]:
        whole = self._courses[WHOLE]
        wall = Timing(tuple(course.wall))
        row: dict[str, Any] = {
            "arm": name,
            "cost": float(np.mean(course.costs)),
            "whole_frames": course.wholes,
            "cpu_share": sum(course.cpu) / sum(whole.cpu),
            "cpu_ratio": Timing(tuple(course.cpu)).ratio(Timing(tuple(whole.cpu))),
            **{f"p{percent}_ms": 1000 * wall.percentile(percent) for percent in (50, 95, 99)},
            "average_precision": average_precision(np.concatenate(course.scores), labels) if course.scores else None,
        }
        if name != WHOLE:
            for output in self._signal.names:
                row[f"{output}_snr"] = self._ratio(course, output)
                worst = float(np.percentile(course.errors[output], _WORST))
                row[f"{output}_worst_snr"] = decibels(self._signal.energy(output), worst)
        return row

    def _ratio(self, course: _Course, output: str) -> float:
        return decibels(self._signal.energy(output), float(np.mean(course.errors[output])))


def _options(config: StreamEvalConfig, threshold: float) -> dict[str, Any]:
    return {"select": Motion(threshold=threshold), **to_dict(config.stream)}


def _timed(call: Callable[[], Answer]) -> tuple[Answer, float, float]:
    """What it returns, and the seconds that it took, of the processor and of the clock."""
    cpu, wall = time.process_time(), time.perf_counter()
    answer = call()
    return answer, time.process_time() - cpu, time.perf_counter() - wall
