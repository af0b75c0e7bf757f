"""One video under one condition: thresholds are chosen and the probe is trained on the first half, all arms take turns
on the second.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from mae_deploy.commands.stream_eval.conditions import Decoded, opened
from mae_deploy.commands.stream_eval.config import Condition, StreamEvalConfig
from mae_deploy.commands.stream_eval.foreground import foreground
from mae_deploy.commands.stream_eval.halves import FirstHalf, SecondHalf
from mae_deploy.commands.stream_eval.scores import Probe
from mae_deploy.errors import ConfigError
from mae_deploy.images.read import Array
from mae_deploy.progress import Bar
from mae_deploy.runtime.backbone import Backbone
from mae_deploy.runtime.selection.difference import grey

_LEAST = 16
"""Frames."""


class Evaluation:
    """One video and one bundle."""

    def __init__(self, config: StreamEvalConfig, backbone: Backbone, video: Path) -> None:
        self._config, self._backbone, self._video = config, backbone, video
        self._threshold: float | None = None
        self._probe: Probe | None = None
        self._labels: Array | None = None

    def look(self) -> int:
        """Find what moves in the clean video; returns how many frames will be evaluated.

        Raises:
            ConfigError: no video, or too short a one.
        """
        preprocess = self._backbone.preprocess
        with self._opened("clean") as frames:
            greys = [
                grey(preprocess.crop_roughly(preprocess.converted(found.image))).round().astype(np.uint8)
                for found in frames
            ]
        if len(greys) < _LEAST:
            raise ConfigError(f"{self._video} has {len(greys)} frames", hint=f"give a video of {_LEAST} or more")
        self._labels = foreground(np.stack(greys), self._backbone.bundle.model["patch_size"])
        return len(greys)

    def remember(self, clean: Mapping[str, Any]) -> None:
        """Take the threshold and the probe of what `run` found of the clean video."""
        self._threshold = clean["threshold"]
        self._probe = None if clean["probe"] is None else Probe(np.array(clean["probe"]))

    def run(self, condition: Condition, bar: Bar) -> dict[str, Any]:
        """Evaluate; JSON values. Clean comes first: the threshold and the probe are those of the clean video."""
        assert self._labels is not None
        half = len(self._labels) // 2
        with self._opened(condition) as frames:
            learns = self._threshold is None
            first = FirstHalf(self._backbone, self._config, self._threshold)
            second: SecondHalf | None = None
            started = time.monotonic()
            for index, (found, labels) in enumerate(zip(frames, self._labels, strict=False)):
                if index < half:
                    first.add(found.image, labels)
                else:
                    if second is None:
                        self._threshold = first.chosen
                        self._probe = first.probe() if learns else self._probe
                        second = SecondHalf(self._backbone, first.options, first.thresholds, self._probe)
                    second.add(found)
                bar.advance(1, f"{condition}, {(index + 1) / (time.monotonic() - started):.1f}/s")
        if second is None or self._threshold is None:
            raise ConfigError(f"{self._video} ends before its second half, which was there before")
        return {
            "video": self._video.name,
            "condition": condition,
            "frames": second.frames,
            "foreground": float(self._labels[half:].mean()),
            "threshold": self._threshold,
            "thresholds": first.thresholds,
            "probe": None if self._probe is None else self._probe.weights.tolist(),
            **second.result(self._labels[half:]),
        }

    def _opened(self, condition: Condition) -> AbstractContextManager[Iterator[Decoded]]:
        config = self._config
        return opened(self._video, condition, every=config.every, max_frames=config.max_frames, seed=config.seed)
