"""Pictures: written without a display, of the size that was asked for, with paths as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mae_deploy.reporting import plots
from mae_deploy.reporting.plots import Curve, draw_bars, draw_curves, figure, line_style

ROWS = [
    {"name": "runs/$a_1$", "top1": 50.0, "top1_range": [49.0, 52.0], "flat": 30.0, "flat_range": [30.0, 30.0]},
    {"name": "b", "top1": 60.0, "top1_range": [60.0, 60.0], "flat": 30.0, "flat_range": [30.0, 30.0]},
]
CURVES = (Curve("linear", "top1"), Curve("from scratch", "flat", flat=True), Curve("absent", "absent"))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are written."""
    import matplotlib.figure

    seen: list[Any] = []
    real = matplotlib.figure.Figure.savefig

    def watched(self: Any, *given: Any, **named: Any) -> None:
        seen.append(self)
        real(self, *given, **named)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", watched)
    return seen


def test_a_figure_has_its_size_and_the_style_is_not_left_behind(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    with figure(tmp_path / "a.png", 4, 3):
        pass
    assert dict(matplotlib.rcParams) == before
    with Image.open(tmp_path / "a.png") as image:
        assert (image.format, image.size) == ("PNG", (600, 450))


def test_what_fails_leaves_no_picture(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), figure(tmp_path / "a.png", 4, 3):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("values", "places"), [([0.75, 0.5], [0.5, 0.75]), ([True, False], [0, 1]), (["a", "b"], [0, 1])]
)
def test_curves(tmp_path: Path, drawn: list[Any], values: list[Any], places: list[float]) -> None:
    draw_curves(tmp_path / "a.png", ROWS, CURVES, label="mask_ratio", values=values)
    (axes,) = drawn[0].axes
    assert [(line.get_label(), line.get_linestyle()) for line in axes.lines] == [
        ("linear", "-"),
        ("from scratch", "--"),
    ]
    assert list(axes.lines[0].get_xdata()) == places
    means = dict(zip(places, axes.lines[0].get_ydata(), strict=True))
    assert means == ({0.75: 50.0, 0.5: 60.0} if values == [0.75, 0.5] else {0: 50.0, 1: 60.0})


def test_bars_reach_from_the_lowest_to_the_highest_seed(tmp_path: Path, drawn: list[Any]) -> None:
    draw_bars(tmp_path / "a.png", ROWS, CURVES[:2])
    (axes,) = drawn[0].axes
    assert [patch.get_height() for patch in axes.patches] == [50.0, 60.0, 30.0, 30.0]
    spread = axes.collections[0].get_segments()[0]
    assert sorted(spread[:, 1]) == [49.0, 52.0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["runs/$a_1$", "b"]
    assert not axes.get_xticklabels()[0].get_parse_math()


def test_lines_keep_apart() -> None:
    styles = [tuple(line_style(index).values()) for index in range(4 * len(plots.COLOURS))]
    assert len(set(styles)) == len(styles)
