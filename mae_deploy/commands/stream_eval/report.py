"""An evaluation's tables, its page and its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mae_deploy.commands.stream_eval.halves import ALONE, CACHED, NTH, OURS, STALE, TOKENS, WHOLE
from mae_deploy.reporting import plots
from mae_deploy.reporting.machine import machine_table
from mae_deploy.reporting.markdown import Page, Picture
from mae_deploy.reporting.tables import Column, Row, Table

_COLOURS = {OURS: "C0", NTH: "C1", CACHED: "C2", ALONE: "C3", STALE: "C7"}
_MARKERS = {"clean": "o", "reencoded": "s", "flicker": "^", "jitter": "v"}

_EQUAL = 1.1
"""Times the stream's cost, up to which an arm costs the same."""

_WHICH = (Column("frames", "condition"), Column("arm", "arm"))
_TIME = (
    *_WHICH,
    Column("CPU", "cpu_share", "{:.2f}"),
    Column("median", "cpu_ratio", "{:.2f}"),
    Column("p50 ms", "p50_ms", "{:.1f}"),
    Column("p95 ms", "p95_ms", "{:.1f}"),
    Column("p99 ms", "p99_ms", "{:.1f}"),
    Column("whole", "whole_frames"),
)

_NOTES = """\
Each video's first half chooses thresholds and trains the probe, its second half is reported; all arms take turns on
each frame. **cost**: operations as a share of those of whole frames, refreshes, whole frames between and audits
included. **dB**: temporal signal-to-noise ratio of an output, the energy of the true features' deviation from their
mean over the frames, over that of the error; 0 dB is no better than that mean. *worst*: the same with the error that
1 % of the frames exceed. **probe**: average precision of a linear probe on the tokens, trained on true tokens, for the
patches that a background subtractor finds; of a moving camera it says nothing. **CPU**: time of the processor from
encoded frame to features, decoding included, as a share of that of whole frames, the mean over all frames; *median*:
the ratio of the medians; p50, p95 and p99 of the clock. *whole*: how many frames were computed whole.

Arms: *stale* computes every 30th frame. *every n-th frame* computes whole frames at the stream's cost (n need not be
whole), and is also the line in the picture. *changed patches alone* see nothing else, as in a visible-token graph;
*cached*, they attend to the keys and values of all patches. The threshold of both makes them cost on the first half
what the stream does. *stream* is `backbone.stream()`."""


def result_tables(report: dict[str, Any]) -> list[Table]:
    """Narrow enough for 80 characters, two for each video: how near the features are, how long they take."""
    found = []
    for video, parts in _by_video(report).items():
        rows = [{"condition": part["condition"], **row} for part in parts for row in part["rows"]]
        outputs = [key.removesuffix("_snr") for key in rows[-1] if key.endswith("_snr") and "_worst_" not in key]
        outputs.sort(key=lambda name: (name != TOKENS, name))
        near = [Column(f"{name} dB", f"{name}_snr", "{:.1f}") for name in outputs]
        worst = Column("worst", f"{outputs[0]}_worst_snr", "{:.1f}")
        probe = Column("probe", "average_precision", "{:.3f}")
        columns = (*_WHICH, Column("cost", "cost", "{:.2f}"), near[0], worst, *near[1:], probe)
        found += [
            Table(f"{video}: how near", columns, rows, [_conclusion(part) for part in parts]),
            Table(f"{video}: how long", _TIME, rows),
        ]
    return found


def report_page(report: dict[str, Any]) -> Page:
    """The report for people."""
    videos = _by_video(report)
    return Page(
        title="What a stream is worth",
        command=report["command"],
        parts=[
            Picture("signal-to-noise ratio against cost", partial(_draw_costs, videos=videos), "cost"),
            Picture("signal-to-noise ratio and cost over time", partial(_draw_course, videos=videos), "course"),
            *result_tables(report),
            _NOTES,
            machine_table(report),
        ],
    )


def margin(rows: Sequence[Row]) -> tuple[Row, Row, float]:
    """The stream's row, that of the best other arm that costs no more (a tenth aside), and by how many dB the stream is
    nearer.
    """
    ours = next(row for row in rows if row["arm"] == OURS)
    key = _key(ours)
    others = [row for row in rows if row["arm"] not in (OURS, WHOLE) and row["cost"] <= _EQUAL * ours["cost"]]
    best = max(others, key=lambda row: row[key])
    return ours, best, ours[key] - best[key]


def _conclusion(part: dict[str, Any]) -> str:
    ours, best, more = margin(part["rows"])
    key = _key(ours)
    return (
        f"{part['condition']}: the stream's {key.removesuffix('_snr')} are at {ours[key]:.1f} dB for"
        f" {ours['cost']:.2f} of the operations and {ours['cpu_share']:.2f} of the CPU time,"
        f" {abs(more):.1f} dB {'above' if more >= 0 else 'below'} the best other arm at that cost,"
        f" {best['arm']} ({best['cost']:.2f})."
    )


def _key(row: Row) -> str:
    """The ratio that is judged: of the tokens, where there are any."""
    tokens = f"{TOKENS}_snr"
    return tokens if tokens in row else next(key for key in row if key.endswith("_snr"))


def _by_video(report: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for part in report["results"]:
        found.setdefault(part["video"], []).append(part)
    return found


def _draw_costs(path: Path, videos: dict[str, list[dict[str, Any]]]) -> None:
    """A panel for each video: a point for each arm and condition, and the line of every n-th clean frame."""
    width, height = plots.PANEL
    columns = min(2, len(videos))
    rows = -(-len(videos) // columns)
    with plots.figure(path, width * columns, height * rows + 0.6) as drawn:
        panels = drawn.subplots(rows, columns, squeeze=False).reshape(-1)
        for axes, (video, parts) in zip(panels, videos.items(), strict=False):
            curve = parts[0]["curve"]
            axes.plot([at["cost"] for at in curve], [at["snr"] for at in curve], color=_COLOURS[NTH], label=NTH)
            for part in parts:
                for row in part["rows"]:
                    if row["arm"] in _COLOURS and row["arm"] != NTH:
                        clean = part is parts[0]
                        axes.plot(
                            row["cost"],
                            row[_key(row)],
                            _MARKERS[part["condition"]],
                            color=_COLOURS[row["arm"]],
                            fillstyle="full" if clean else "none",
                            label=row["arm"] if clean else None,
                        )
            axes.set(title=video, xlabel="cost, share of whole frames' operations", ylabel="tokens, dB", xscale="log")
            axes.set_xticks([0.03, 0.1, 0.2, 0.5, 1], ["0.03", "0.1", "0.2", "0.5", "1"], minor=False)
            axes.axhline(0, color="black", linewidth=0.5)
        for axes in panels[len(videos) :]:
            axes.axis("off")
        for condition in dict.fromkeys(part["condition"] for parts in videos.values() for part in parts[1:]):
            panels[0].plot([], [], _MARKERS[condition], color="black", fillstyle="none", label=condition)
        plots.legend_below(drawn, panels[0], columns=4)


def _draw_course(path: Path, videos: dict[str, list[dict[str, Any]]]) -> None:
    """Two panels for each video, above one another: how near each frame's features are, and what the stream paid."""
    width, height = plots.PANEL
    with plots.figure(path, 1.6 * width, height * len(videos) + 0.4) as drawn:
        panels = drawn.subplots(2 * len(videos), 1, squeeze=False, height_ratios=[3, 1] * len(videos))[:, 0]
        for number, (video, (part, *_)) in enumerate(videos.items()):
            near, paid = panels[2 * number : 2 * number + 2]
            for name, course in part["course"].items():
                near.plot(np.minimum(course["snr"], 40), color=_COLOURS[name], linewidth=0.9, label=name)
            near.set(title=f"{video}, {part['condition']}", ylabel="tokens, dB")
            near.axhline(0, color="black", linewidth=0.5)
            cost = part["course"][OURS]["cost"]
            paid.fill_between(range(len(cost)), cost, step="mid", color=_COLOURS[OURS], alpha=0.5)
            paid.set(xlabel="frame of the second half", ylabel="cost", ylim=(0, max(1.05, *cost)))
        plots.legend_below(drawn, panels[0], columns=3)
