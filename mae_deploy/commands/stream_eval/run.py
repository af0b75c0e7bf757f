"""`mae-deploy stream-eval`: a stream beside what else its cost would buy, on one's own videos; torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mae_deploy import __version__
from mae_deploy.commands.stream_eval.config import Condition, StreamEvalConfig
from mae_deploy.commands.stream_eval.evaluate import Evaluation
from mae_deploy.commands.stream_eval.report import report_page, result_tables
from mae_deploy.config import fixed_settings
from mae_deploy.errors import ConfigError
from mae_deploy.files import read_json, refuse_to_overwrite, write_json
from mae_deploy.progress import progress
from mae_deploy.reporting.command_line import command_line
from mae_deploy.reporting.machine import describe_machine
from mae_deploy.reporting.markdown import write_report
from mae_deploy.reporting.tables import stacked
from mae_deploy.results import Result
from mae_deploy.runtime.backbone import Backbone

PARTS = "parts"
"""The folder of what is finished: a file for each video and condition."""


def run_stream_eval(config: StreamEvalConfig) -> Result:
    """Evaluate every video under every condition; with `out`, what an earlier call has finished is kept.

    Raises:
        ConfigError: a bundle that cannot follow a stream, no video or too short a one, or an output folder that holds
            something else, or what was made with other settings.
        MissingDependency: PyAV or the engine is not installed.
    """
    names = [video.name for video in config.videos]
    if len(set(names)) < len(names):
        raise ConfigError(f"two videos have the same name: {', '.join(map(str, config.videos))}")
    if (out := config.out) is not None and not (out / PARTS).is_dir():
        refuse_to_overwrite(out, filled=True)
    with Backbone.load(
        config.bundle, config.engine, device=config.device, threads=config.threads, affinity=config.affinity
    ) as backbone:
        backbone.stream()  # says so where the bundle cannot, before any video is read
        results = [part for video in config.videos for part in _of_video(config, backbone, video)]
        engines = {backbone.engine.name: backbone.engine.version}
    report: dict[str, Any] = {
        "mae_deploy": __version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command_line("stream-eval", config),
        "machine": describe_machine(engines, threads=config.threads, affinity=config.affinity),
        "results": [{name: value for name, value in part.items() if name != "probe"} for part in results],
    }
    if config.out is not None:
        write_report(config.out, "stream-eval", report, report_page(report), html=True)
    return Result(report, stacked(result_tables(report)))


def _of_video(config: StreamEvalConfig, backbone: Backbone, video: Path) -> Iterator[dict[str, Any]]:
    """What is found under each condition; clean comes first, since it chooses the threshold and trains the probe."""
    conditions: list[Condition] = sorted(dict.fromkeys(config.conditions), key=lambda name: name != "clean")
    parts: dict[Condition, dict[str, Any] | None] = {
        name: _finished(config, backbone, video, name) for name in conditions
    }
    if all(part is not None for part in parts.values()):
        yield from (part for part in parts.values() if part is not None)
        return
    evaluation = Evaluation(config, backbone, video)
    frames = evaluation.look()
    done = sum(part is not None for part in parts.values())
    with progress(video.name, frames * len(parts), done=frames * done) as bar:
        for name, part in parts.items():
            if part is None:
                part = evaluation.run(name, bar)
                if (path := _path(config, video, name)) is not None:
                    write_json(path, {"made_with": _made_with(config, backbone, video), **part})
            else:
                evaluation.remember(part)
            yield part


def _finished(config: StreamEvalConfig, backbone: Backbone, video: Path, name: Condition) -> dict[str, Any] | None:
    path = _path(config, video, name)
    if path is None or not path.is_file():
        return None
    part: dict[str, Any] = read_json(path)
    if part.pop("made_with", None) != _made_with(config, backbone, video):
        raise ConfigError(f"{path} was made with other settings", hint="choose another --out, or delete it")
    return part


def _path(config: StreamEvalConfig, video: Path, name: Condition) -> Path | None:
    return None if config.out is None else config.out / PARTS / f"{video.name}-{name}.json"


def _made_with(config: StreamEvalConfig, backbone: Backbone, video: Path) -> dict[str, Any]:
    """What a result depends on."""
    return {
        "settings": fixed_settings(config),
        "files": backbone.bundle.manifest["files"],
        "bytes": video.stat().st_size if video.exists() else 0,
    }
