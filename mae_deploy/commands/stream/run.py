"""`mae-deploy stream`: frames of a source through a bundle, as they come; torch-free."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime, timezone
from typing import Any

import numpy as np

from mae_deploy import __version__
from mae_deploy.commands.predict import usual_outputs
from mae_deploy.commands.stream.config import StreamCommandConfig
from mae_deploy.commands.stream.draw import Samples, VideoWriter, annotated, written_video
from mae_deploy.commands.stream.out import Writer, check_out, written
from mae_deploy.commands.stream.panel import View, shown
from mae_deploy.commands.stream.record import Record
from mae_deploy.commands.stream.report import report_page, summary_table
from mae_deploy.errors import CheckFailed, ConfigError, MaeDeployError
from mae_deploy.files import refuse_to_overwrite
from mae_deploy.progress import notice
from mae_deploy.reporting.command_line import command_line
from mae_deploy.reporting.machine import describe_machine
from mae_deploy.reporting.markdown import write_report
from mae_deploy.results import Result
from mae_deploy.runtime.backbone import Backbone
from mae_deploy.runtime.engines.base import check_outputs
from mae_deploy.runtime.predict import class_labels, class_scores, rank
from mae_deploy.runtime.streams.stream import Seen
from mae_deploy.runtime.video import Frame, Video, open_video
from mae_deploy.training.monitor.signals import Stopped, StopSignals


def run_stream(config: StreamCommandConfig) -> Result:
    """Follow a source to its end, or until a signal.

    Raises:
        CheckFailed: no frame came.
        ConfigError: no such source, or an output that is there already or of no kind that is written.
        DriftError: an audit failed, where --on-drift is error.
        MissingDependency: PyAV, pyarrow, or a camera that is not there.
        SourceLost: a live source broke off and did not come back.
        Stopped: a signal came; the outputs are complete up to there.
    """
    _check_outputs(config)
    with ExitStack() as stack:
        backbone = stack.enter_context(
            Backbone.load(
                config.bundle, config.engine, device=config.device, threads=config.threads, affinity=config.affinity
            )
        )
        names = check_outputs(config.outputs or usual_outputs(backbone.bundle, writing=True), backbone.output_names)
        video = stack.enter_context(open_video(config.source, read=backbone.read, **_values(config.video)))
        follow = _follower(backbone, config)
        session = _Session(config, backbone, video, follow)
        signals = stack.enter_context(StopSignals(call=video.stop))
        failure = session.run(names, signals)
    result = session.result(signals.received, failure)
    if failure is not None:
        failure.result = result
        raise failure
    if signals.received is not None:
        raise Stopped(f"{signals.received} stopped it at frame {session.last}", result=result)
    return result


class _Session:
    """One stream from its first to its last frame."""

    def __init__(
        self, config: StreamCommandConfig, backbone: Backbone, video: Video, follow: Callable[[Any], Seen]
    ) -> None:
        self._config, self._backbone, self._video, self._follow = config, backbone, video, follow
        self._patch_size: int = backbone.bundle.model["patch_size"]
        self._samples = Samples()
        self._drawn: VideoWriter | None = None
        self._out: Writer | None = None
        self.record = Record(backbone.num_patches)
        self.view = View(f"{config.source} → {config.bundle}", video, self.record)
        self.last = -1
        """The last frame's number."""

    def run(self, names: tuple[str, ...], signals: StopSignals) -> MaeDeployError | None:
        """Follow the source; what is to be written appears at the end, also of a stream that fails after some frames.

        Returns:
            Why it failed.
        """
        config, failure = self._config, None
        with ExitStack() as stack:
            if config.out is not None:
                self._out = stack.enter_context(written(config.out, config.source, names))
            if config.annotate is not None:
                rate = self._video.rate
                every = config.video.every
                self._drawn = stack.enter_context(written_video(config.annotate, rate and rate / every))
            after = stack.enter_context(shown(self.view))
            try:
                for frame in self._video:
                    self._take(frame)
                    after()
                    if signals.received is not None:
                        break
            except MaeDeployError as error:
                if not self.record.frames:
                    raise
                failure = error
            self.record.end()
            if not self.record.frames:
                raise CheckFailed(f"no frame came from {config.source}")
        return failure

    def result(self, stopped: str | None, failure: MaeDeployError | None) -> Result:
        """The summary, once the stream has ended; writes the report."""
        config, record, counts = self._config, self.record, self._video.counts
        data = {
            "command": command_line("stream", config),
            "mae_deploy": __version__,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "source": config.source,
            "bundle": str(config.bundle),
            "tokens": self._backbone.bundle.token_mode,
            "engine": self._backbone.engine.name,
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
            **dataclasses.asdict(counts),
            "label_changes": record.num_labels,
            "labels": record.labels,
            "events": record.events,
            "stopped": stopped or (str(failure) if failure is not None else None),
            "out": config.out and str(config.out),
            "annotate": config.annotate and str(config.annotate),
            "report": config.report and str(config.report),
            "machine": describe_machine(
                {self._backbone.engine.name: self._backbone.engine.version},
                threads=config.threads,
                affinity=config.affinity,
            ),
        }
        if config.report is not None:
            page = report_page(data, record, self._samples.frames)
            write_report(config.report, "stream", data, page, html=True)
        return Result(data, summary_table(data))

    def _take(self, frame: Frame) -> None:
        started = time.perf_counter()
        seen = self._follow(frame.image)
        seconds = time.perf_counter() - started
        self.last = frame.index
        number = self.record.frames
        self.record.add(frame, seen, seconds)
        self.view.patches = len(seen.keep) / self._backbone.num_patches
        label = self._label(frame, seen)
        if self._out is not None:
            self._out.add(frame, seen, label)
        sample = self._config.report is not None and self._samples.wants(number)
        if self._drawn is not None or sample:
            words = f"frame {frame.index}  {len(seen.keep)} patches  {label or ''}  {seen.event or ''}"
            pixels = annotated(frame.rgb(), seen, self._backbone.preprocess, self._patch_size, " ".join(words.split()))
            if self._drawn is not None:
                self._drawn.add(pixels)
            if sample:
                self._samples.add(frame.index, pixels)

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
            notice("label:", f"{name} {shares[0, 0]:.0%} from frame {frame.index} on{at}")
        self.view.label = f"{name} {shares[0, 0]:.0%}"
        return name


def _follower(backbone: Backbone, config: StreamCommandConfig) -> Callable[[Any], Seen]:
    """A stream; with a graph that keeps nothing, whole frames."""
    if backbone.bundle.token_mode == "cached":
        return backbone.stream(select=config.selection.select(), **_values(config.stream))
    notice(
        "whole frames:",
        f"the graph of {config.bundle} keeps nothing of earlier frames (its token mode is"
        f" '{backbone.bundle.token_mode}'), so every patch of every frame is computed; to compute what changed:"
        " mae-deploy export RUN --out BUNDLE --tokens cached",
    )
    everything = np.arange(backbone.num_patches)

    def whole(image: Any) -> Seen:
        return Seen(backbone(image), keep=everything, age=np.zeros(len(everything), np.int64), cost=1.0, event=None)

    return whole


def _check_outputs(config: StreamCommandConfig) -> None:
    """Say before a stream begins what would stop its outputs from being written."""
    if config.out is not None:
        check_out(config.out)
    if config.annotate is not None:
        if config.annotate.suffix != ".mp4":
            raise ConfigError(f"--annotate {config.annotate} must end in .mp4")
        refuse_to_overwrite(config.annotate, option="--annotate")
    if config.report is not None:
        refuse_to_overwrite(config.report, option="--report")


def _values(section: Any) -> dict[str, Any]:
    return {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
