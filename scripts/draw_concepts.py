"""The pictures of docs/concepts/, as SVG: masking, visible tokens, cached streams, the ladder of parity.

    python scripts/draw_concepts.py

No background, and colours that stand out from a white page and from a dark one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from pathlib import Path

INK, BLUE, ORANGE, GREEN, GREY = "#7b818c", "#2a7de8", "#e8702a", "#1f9d6b", "#9aa1ac"
SCENE = ("#6fa8dc", "#8fbbe3", "#b7c9a8", "#86a96a", "#c9a36b", "#b5764a")
"""Of the painted picture: sky, horizon, meadow, wood, path, house."""
PAINTING = (
    "0000000",
    "0011000",
    "1155511",
    "2255522",
    "3344432",
    "3344332",
    "3444433",
)
FOLDER = Path(__file__).parents[1] / "docs" / "concepts"


class Drawing:
    """An SVG that grows by shapes; positions in pixels."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.shapes: list[str] = []

    def box(self, x: float, y: float, w: float, h: float, colour: str, *, fill: float = 0.14) -> None:
        self.shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="5" fill="{colour}" fill-opacity="{fill:g}"'
            f' stroke="{colour}" stroke-width="1.5"/>'
        )

    def text(
        self,
        x: float,
        y: float,
        text: str,
        colour: str = INK,
        *,
        size: int = 13,
        bold: bool = False,
        at: str = "middle",
    ) -> None:
        weight = ' font-weight="600"' if bold else ""
        escaped = text.replace("&", "&amp;").replace("<", "&lt;")
        self.shapes.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}" text-anchor="{at}"{weight}>{escaped}</text>'
        )

    def labelled(self, x: float, y: float, w: float, h: float, colour: str, *lines: str) -> None:
        """A box with a bold line in its middle, and others below it."""
        self.box(x, y, w, h, colour)
        top = y + h / 2 - 8 * (len(lines) - 1) + 5
        for number, line in enumerate(lines):
            self.text(x + w / 2, top + 17 * number, line, colour if number == 0 else INK, bold=number == 0)

    def arrow(self, x1: float, y1: float, x2: float, y2: float, colour: str = INK) -> None:
        self.shapes.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{colour}" stroke-width="2"'
            ' marker-end="url(#head)"/>'
        )

    def patches(self, x: float, y: float, side: float, colour: Callable[[int, int], tuple[str, float]]) -> None:
        """A grid of patches as large as the painting; `colour(row, column)` gives colour and opacity."""
        for row in range(len(PAINTING)):
            for column in range(len(PAINTING[0])):
                fill, opacity = colour(row, column)
                self.shapes.append(
                    f'<rect x="{x + column * side:g}" y="{y + row * side:g}" width="{side - 2:g}" height="{side - 2:g}"'
                    f' rx="2" fill="{fill}" fill-opacity="{opacity:g}"/>'
                )

    def write(self, path: Path) -> None:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" role="img"'
            f' aria-label="{self.title}" font-family="system-ui, Helvetica, Arial, sans-serif">\n'
            f"<title>{self.title}</title>\n"
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7"'
            f' orient="auto"><path d="M0 0 8 4 0 8z" fill="{INK}"/></marker></defs>\n'
        )
        path.write_text(head + "\n".join(self.shapes) + "\n</svg>\n", encoding="utf-8")


def painted(row: int, column: int) -> tuple[str, float]:
    return SCENE[int(PAINTING[row][column])], 1.0


def only(kept: Collection[tuple[int, int]], rest: float = 0.18) -> Callable[[int, int], tuple[str, float]]:
    """The painting where a patch is kept, grey elsewhere."""
    return lambda row, column: painted(row, column) if (row, column) in kept else (GREY, rest)


KEPT = {(0, 2), (0, 6), (1, 0), (1, 4), (2, 3), (3, 1), (3, 5), (4, 6), (5, 2), (5, 4), (6, 0), (6, 5)}
"""12 of 49: a quarter."""


def masking() -> Drawing:
    """Pretraining: the encoder sees a quarter, the decoder draws the rest."""
    d = Drawing(900, 250, "Masked pretraining: a quarter of the patches is encoded, the rest is predicted")
    d.patches(10, 50, 20, painted)
    d.text(79, 210, "an image, no label")
    d.arrow(158, 118, 188, 118)
    d.patches(198, 50, 20, only(KEPT))
    d.text(267, 210, "25 % kept, at random")
    d.arrow(346, 118, 376, 118)
    d.labelled(386, 66, 140, 104, BLUE, "encoder", "the kept patches", "and nothing else:", "what you deploy")
    d.arrow(530, 118, 552, 118)
    d.labelled(562, 78, 130, 80, GREEN, "decoder", "all places; small,", "only for training")
    d.arrow(696, 118, 718, 118)
    d.patches(728, 50, 20, lambda r, c: painted(r, c) if (r, c) in KEPT else (painted(r, c)[0], 0.6))
    d.text(797, 210, "predicted pixels")
    d.text(797, 230, "loss: on the hidden ones", ORANGE)
    return d


def visible_tokens() -> Drawing:
    """Deployment: the patches to look at are an input of the graph."""
    d = Drawing(900, 270, "Visible tokens: the graph takes the patches to look at as an input")
    region = {(row, column) for row in (2, 3, 4) for column in (1, 2, 3, 4)}
    d.patches(10, 50, 20, lambda r, c: painted(r, c) if (r, c) in region else (painted(r, c)[0], 0.25))
    d.box(28, 88, 82, 62, ORANGE, fill=0)
    d.text(79, 210, "a frame and a region")
    d.arrow(158, 118, 200, 118)
    d.labelled(210, 92, 150, 52, ORANGE, "ids_keep", "15, 16, 17, 18, 22, …")
    d.arrow(364, 118, 396, 118)
    d.labelled(406, 72, 130, 92, BLUE, "encoder.onnx", "one graph,", "any number of", "patches")
    d.arrow(540, 118, 572, 118)
    d.text(582, 100, "cls (B, D)", at="start")
    d.text(582, 122, "tokens (B, K, D)", at="start")
    d.text(582, 144, "pooled (B, D)", at="start")
    d.text(800, 40, "time of ViT-B, one core", bold=True)
    for number, (share, ratio) in enumerate(((196, 1.0), (98, 0.51), (49, 0.267), (20, 0.127))):
        y = 56 + 34 * number
        d.text(730, y + 15, f"{share}", at="end")
        d.box(738, y, 150 * ratio, 20, BLUE, fill=0.75)
        d.text(
            744 + 150 * ratio if ratio < 0.9 else 882,
            y + 15,
            f"{ratio:.2f}",
            "#ffffff" if ratio > 0.9 else INK,
            at="start" if ratio < 0.9 else "end",
        )
    d.text(813, 212, "patches kept of 196")
    return d


def cached_streams() -> Drawing:
    """Streams: what changed attends to what was kept of all."""
    d = Drawing(900, 290, "Cached streams: changed patches attend to the keys and values of all patches")
    moved = {(4, 5), (4, 6), (5, 5), (5, 6), (5, 4)}
    oldest = {(0, 0), (0, 1)}

    def frame(row: int, column: int) -> tuple[str, float]:
        if (row, column) in moved:
            return ORANGE, 1.0
        return (GREEN, 1.0) if (row, column) in oldest else (painted(row, column)[0], 0.35)

    d.patches(10, 60, 20, frame)
    d.text(79, 222, "the next frame")
    d.text(79, 242, "changed", ORANGE, bold=True)
    d.text(79, 260, "the oldest, in turn", GREEN, bold=True)
    d.arrow(158, 128, 196, 128)
    d.labelled(206, 100, 112, 56, ORANGE, "K patches", "12 to 40 of 196")
    d.arrow(322, 128, 356, 128)
    d.labelled(366, 78, 170, 100, BLUE, "every block", "queries: K patches, CLS", "keys and values:", "of all N")
    d.labelled(366, 218, 170, 52, GREY, "cache", "keys and values of N")
    d.arrow(420, 216, 420, 182)
    d.arrow(482, 182, 482, 216)
    d.text(410, 204, "read", at="end")
    d.text(492, 204, "new rows", at="start")
    d.arrow(540, 128, 574, 128)
    d.patches(584, 60, 20, lambda r, c: (BLUE, 0.9) if (r, c) in moved | oldest else (BLUE, 0.35))
    d.text(653, 222, "features of the whole frame")
    d.labelled(752, 78, 140, 100, GREEN, "audit", "now and then, a", "whole frame: how", "far off, in dB?")
    d.arrow(728, 128, 748, 128)
    return d


def parity_ladder() -> Drawing:
    """Proof: every rung is compared with the same reference."""
    d = Drawing(900, 330, "The ladder of parity: every step is compared with PyTorch in FP32")
    rungs = (
        ("PyTorch, FP32", "the reference: outputs of your images, kept as golden samples", INK, ""),
        (
            "graph, FP32",
            "ONNX, written node by node; every output, at three numbers of patches",
            BLUE,
            "≥ 0.99999",
        ),
        ("FP16, BF16", "types in the graph; centred cosine and signal-to-noise too", BLUE, "≥ 0.9995"),
        ("INT8", "only if it is also faster, on the engine that runs it", ORANGE, "≥ 0.995"),
        ("engine", "ONNX Runtime, OpenVINO, TensorRT: what it really computes", GREEN, "same bars"),
        ("device", "mae-deploy verify: the same samples, no PyTorch; a miss is exit code 1", GREEN, "same bars"),
    )
    for number, (name, text, colour, bar) in enumerate(rungs):
        y = 14 + 52 * number
        d.box(20, y, 150, 38, colour)
        d.text(95, y + 24, name, colour, bold=True, size=14)
        d.text(190, y + 24, text, at="start")
        if bar:
            d.text(880, y + 24, f"cosine {bar}" if bar[0] == "≥" else bar, colour, at="end", bold=True)
        if number:
            d.arrow(95, y - 14, 95, y - 2)
    return d


DRAWINGS: dict[str, Callable[[], Drawing]] = {
    "masking": masking,
    "visible-tokens": visible_tokens,
    "cached-streams": cached_streams,
    "parity-ladder": parity_ladder,
}


def main() -> None:
    """Write every picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, draw in DRAWINGS.items():
        draw().write(out / f"{name}.svg")


if __name__ == "__main__":
    main()
