"""One source of `mae-deploy stream`: what is written, drawn and remembered of its frames."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from mae_deploy.commands.stream.draw import Samples, VideoWriter, annotated
from mae_deploy.commands.stream.out import Writer
from mae_deploy.commands.stream.panel import View
from mae_deploy.commands.stream.record import Record
from mae_deploy.errors import MaeDeployError
from mae_deploy.progress import notice
from mae_deploy.runtime.backbone import Backbone
from mae_deploy.runtime.predict import class_labels, class_scores, rank
from mae_deploy.runtime.streams.stream import Seen
from mae_deploy.runtime.video import Frame, Video


class SourceFrames:
    """A source from its first to its last frame."""

    def __init__(self, source: str, backbone: Backbone, video: Video, *, name: str = "", sampled: bool = False) -> None:
        """Args:
        name: in front of what is said of it; empty where there is no other.
        sampled: whether some frames are drawn for a report.
        """
        self.source, self._backbone, self.video, self._name = source, backbone, video, name
        self._patch_size: int = backbone.bundle.model["patch_size"]
        self.samples = Samples() if sampled else None
        self.drawn: VideoWriter | None = None
        self.out: Writer | None = None
        self.record = Record(backbone.num_patches)
        self.view = View(source, video, self.record)
        self.last = -1
        """The last frame's number."""
        self.failure: MaeDeployError | None = None
        """Why it broke off."""

    def take(self, frame: Frame, seen: Seen, seconds: float) -> None:
        """A frame's features, computed in so many seconds."""
        self.last = frame.index
        number = self.record.frames
        self.record.add(frame, seen, seconds)
        self.view.patches = len(seen.keep) / self._backbone.num_patches
        label = self._label(frame, seen)
        if self.out is not None:
            self.out.add(frame, seen, label)
        sample = self.samples is not None and self.samples.wants(number)
        if self.drawn is None and not sample:
            return
        words = f"frame {frame.index}  {len(seen.keep)} patches  {label or ''}  {seen.event or ''}"
        pixels = annotated(frame.rgb(), seen, self._backbone.preprocess, self._patch_size, " ".join(words.split()))
        if self.drawn is not None:
            self.drawn.add(pixels)
        if self.samples is not None and sample:
            self.samples.add(frame.index, pixels)

    def end(self, failure: MaeDeployError | None = None) -> None:
        """No frame comes any more."""
        if self.record.ended:
            return
        self.record.end()
        self.failure = failure
        self.view.end = "ended" if failure is None else str(failure)

    def data(self, annotate: Path | None) -> dict[str, Any]:
        """The summary, once it has ended."""
        record = self.record
        return {
            "source": self.source,
            "frames": record.frames,
            "last_frame": self.last,
            "seconds": round(record.seconds, 3),
            "frames_per_second": round(record.rate, 2),
            "patches": round(record.patches, 4),
            "cost": round(record.cost, 4),
            "whole_frames": dict(record.whole),
            "latency_ms": {
                f"p{round(100 * share)}": round(record.times.milliseconds(share) or 0, 3) for share in (0.5, 0.95, 0.99)
            },
            "audits": {
                "count": record.num_audits,
                "last": round(record.audits[-1][1], 4) if record.audits else None,
                "worst": None if record.worst is None else round(record.worst, 4),
            },
            **dataclasses.asdict(self.video.counts),
            "label_changes": record.num_labels,
            "labels": record.labels,
            "events": record.events,
            "stopped": None if self.failure is None else str(self.failure),
            "annotate": annotate and str(annotate),
        }

    def _label(self, frame: Frame, seen: Seen) -> str | None:
        """A classifier's best class; a change is an event."""
        scores = class_scores(seen)
        if scores is None:
            return None
        classes, shares = rank(scores, 1)
        name = class_labels(self._backbone.bundle.class_names, scores.shape[1])[int(classes[0, 0])]
        if not self.record.labels or self.record.labels[-1]["label"] != name:
            self.record.add_label(frame, name, float(shares[0, 0]))
            at = "" if frame.time is None else f", {frame.time:.2f} s"
            notice("label:", f"{self._name}{name} {shares[0, 0]:.0%} from frame {frame.index} on{at}")
        self.view.label = f"{name} {shares[0, 0]:.0%}"
        return name
