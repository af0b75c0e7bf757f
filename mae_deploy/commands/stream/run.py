"""`mae-deploy stream`: frames of one or several sources through a bundle, as they come; torch-free."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from mae_deploy import __version__
from mae_deploy.commands.predict import usual_outputs
from mae_deploy.commands.stream.camera import SourceFrames
from mae_deploy.commands.stream.config import StreamCommandConfig
from mae_deploy.commands.stream.draw import written_video
from mae_deploy.commands.stream.out import JSONL, written
from mae_deploy.commands.stream.outputs import appearing_together, finish_appearing
from mae_deploy.commands.stream.panel import Panels, shown
from mae_deploy.commands.stream.report import report_page, summary_table
from mae_deploy.errors import CheckFailed, ConfigError, MaeDeployError
from mae_deploy.files import refuse_to_overwrite
from mae_deploy.images.find import is_image_file
from mae_deploy.progress import notice
from mae_deploy.reporting.command_line import command_line
from mae_deploy.reporting.machine import describe_machine
from mae_deploy.reporting.markdown import write_report
from mae_deploy.reporting.tables import facts_table
from mae_deploy.results import Result
from mae_deploy.runtime.backbone import Backbone
from mae_deploy.runtime.engines.base import check_outputs
from mae_deploy.runtime.feature_file import SUFFIXES, check_features
from mae_deploy.runtime.streams.stream import Seen
from mae_deploy.runtime.video import Video, open_video
from mae_deploy.runtime.video.together import together
from mae_deploy.training.monitor.signals import Stopped, StopSignals

Follow = Callable[[Mapping[int, Any]], dict[int, Seen]]
"""Features of the sources that have a frame, by their numbers."""


def run_stream(config: StreamCommandConfig) -> Result:
    """Follow sources to their end, or until a signal.

    Raises:
        CheckFailed: no frame came.
        ConfigError: no such source, or an output that is there already or of no kind that is written.
        DriftError: an audit failed, where --on-drift is error.
        MissingDependency: PyAV, pyarrow, or a camera that is not there.
        SourceLost: a live source broke off and did not come back; others went on to their end.
        Stopped: a signal came; the outputs are complete up to there.
    """
    outputs = _outputs(config)
    call = command_line("stream", config)
    if finish_appearing(outputs, call):
        notice("kept:", f"{', '.join(map(str, outputs))}, which the same call had written when it was killed")
        found = {"outputs": [str(path) for path in outputs]}
        return Result(found, facts_table("", found))
    _check(config)
    with appearing_together(outputs, call):
        with ExitStack() as stack:
            backbone = stack.enter_context(
                Backbone.load(
                    config.bundle, config.engine, device=config.device, threads=config.threads, affinity=config.affinity
                )
            )
            known = backbone.output_names
            known += ("feature_map",) if "tokens" in known and "feature_map" not in known else ()
            names = check_outputs(config.outputs or usual_outputs(backbone.bundle, writing=True), known)
            videos = [
                stack.enter_context(open_video(source, read=backbone.read, **_values(config.video)))
                for source in config.sources
            ]
            session = _Session(config, backbone, videos, _follower(backbone, config))
            signals = stack.enter_context(StopSignals(call=session.stop))
            failure = session.run(names, signals)
        result = session.result(signals.received, failure)
    if failure is not None:
        failure.result = result
        raise failure
    if signals.received is not None:
        at = " and ".join(str(source.last) for source in session.sources)
        raise Stopped(f"{signals.received} stopped it at frame {at}", result=result)
    return result


class _Session:
    """All sources from the first to the last frame."""

    def __init__(self, config: StreamCommandConfig, backbone: Backbone, videos: list[Video], follow: Follow) -> None:
        self._config, self._backbone, self._follow = config, backbone, follow
        self._several = len(videos) > 1
        self.sources = [
            SourceFrames(
                source, backbone, video, name=f"{source}: " if self._several else "", sampled=config.report is not None
            )
            for source, video in zip(config.sources, videos, strict=True)
        ]

    def stop(self) -> None:
        """End the frames, from a signal."""
        for source in self.sources:
            source.video.stop()

    def run(self, names: tuple[str, ...], signals: StopSignals) -> MaeDeployError | None:
        """Follow the sources; what is to be written appears at the end, also of a stream that fails after some frames.

        Returns:
            Why it failed.
        """
        config, failure = self._config, None
        with ExitStack() as stack:
            if config.out is not None:
                writers = stack.enter_context(written(config.out, config.sources, names))
                for source, writer in zip(self.sources, writers, strict=True):
                    source.out = writer
            for source, path in zip(self.sources, _annotated_files(config), strict=True):
                if path is not None:
                    rate = source.video.rate
                    source.drawn = stack.enter_context(written_video(path, rate and rate / config.video.every))
            after = stack.enter_context(shown(Panels([source.view for source in self.sources], str(config.bundle))))
            try:
                self._run(after, signals)
            except MaeDeployError as error:
                failure = error
            for source in self.sources:
                source.end()
            failures = [failure] if failure else [source.failure for source in self.sources if source.failure]
            failed = None if not failures else failures[0] if len(failures) == 1 else _all_of(failures)
            if not any(source.record.frames for source in self.sources):
                raise failed or CheckFailed(f"no frame came from {', '.join(config.sources)}")
        return failed

    def _run(self, after: Callable[[], None], signals: StopSignals) -> None:
        for frames in together([source.video for source in self.sources], self._ended):
            started = time.perf_counter()
            seen = self._follow({number: frame.image for number, frame in frames.items()})
            seconds = time.perf_counter() - started
            for number, frame in frames.items():
                self.sources[number].take(frame, seen[number], seconds)
            after()
            if signals.received is not None:
                return

    def _ended(self, number: int, failure: MaeDeployError | None) -> None:
        source = self.sources[number]
        source.end(failure)
        others = sum(not other.record.ended for other in self.sources)
        if others:
            notice("ended:", f"{failure or source.source}; {others} of {len(self.sources)} sources go on")

    def result(self, stopped: str | None, failure: MaeDeployError | None) -> Result:
        """The summary, once the stream has ended; writes the report."""
        config = self._config
        files = _annotated_files(config)
        each = [source.data(path) for source, path in zip(self.sources, files, strict=True)]
        common = {
            "command": command_line("stream", config),
            "mae_deploy": __version__,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "bundle": str(config.bundle),
            "tokens": self._backbone.bundle.token_mode,
            "engine": self._backbone.engine.name,
            "stopped": stopped or (str(failure) if failure is not None else None),
            "out": config.out and str(config.out),
            "report": config.report and str(config.report),
            "machine": describe_machine(
                {self._backbone.engine.name: self._backbone.engine.version},
                threads=config.threads,
                affinity=config.affinity,
            ),
        }
        data = {**common, "sources": each} if self._several else {**each[0], **common}
        if config.report is not None:
            page = report_page(data, [(source.record, source.samples) for source in self.sources])
            write_report(config.report, "stream", data, page, html=True)
        return Result(data, summary_table(data))


def _follower(backbone: Backbone, config: StreamCommandConfig) -> Follow:
    """Streams; with a graph that keeps nothing, whole frames."""
    if backbone.bundle.token_mode == "cached":
        return backbone.stream_pool(config.sources, select=config.selection.select(), **_values(config.stream)).follow
    notice(
        "whole frames:",
        f"the graph of {config.bundle} keeps nothing of earlier frames (its token mode is"
        f" '{backbone.bundle.token_mode}'), so every patch of every frame is computed; to compute what changed:"
        " mae-deploy export RUN --out BUNDLE --tokens cached",
    )
    everything = np.arange(backbone.num_patches)
    height, width = backbone.preprocess.image_size
    P = backbone.bundle.model["patch_size"]
    grid = (height // P, width // P)

    def whole(frames: Mapping[int, Any]) -> dict[int, Seen]:
        features = backbone(list(frames.values()))
        age = np.zeros(len(everything), np.int64)
        return {
            number: Seen(
                {name: array[at : at + 1] for name, array in features.items()},
                keep=everything,
                age=age,
                cost=1.0,
                event=None,
                grid=grid,
            )
            for at, number in enumerate(frames)
        }

    return whole


def _check(config: StreamCommandConfig) -> None:
    """Say before a stream begins what would stop it, or its outputs from being written."""
    if len(config.sources) > 1 and all(is_image_file(Path(source)) for source in config.sources):
        raise ConfigError(
            f"{len(config.sources)} images are {len(config.sources)} sources of one frame each",
            hint="give their folder, or quote the pattern, such as 'frames/*.png'",
        )
    if config.out is not None:
        check_features(config.out, (*SUFFIXES, JSONL))
    for path in _annotated_files(config):
        if path is None:
            continue
        if path.suffix != ".mp4":
            raise ConfigError(f"--annotate {config.annotate} must end in .mp4")
        refuse_to_overwrite(path, option="--annotate", file=True)
    if config.report is not None:
        refuse_to_overwrite(config.report, option="--report")


def _outputs(config: StreamCommandConfig) -> list[Path]:
    """Everything that is written, whole or not at all each."""
    return [path for path in (config.out, config.report, *_annotated_files(config)) if path is not None]


def _annotated_files(config: StreamCommandConfig) -> list[Path | None]:
    """The video of each source."""
    path = config.annotate
    if path is None or len(config.sources) == 1:
        return [path] * len(config.sources)
    return [path.with_name(f"{path.stem}-{number}{path.suffix}") for number in range(len(config.sources))]


def _all_of(failures: list[MaeDeployError]) -> MaeDeployError:
    return MaeDeployError("; ".join(map(str, failures)), hint=failures[0].hint)


def _values(section: Any) -> dict[str, Any]:
    return {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
