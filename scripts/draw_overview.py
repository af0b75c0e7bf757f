"""The picture of the README: reconstructions, and latency against the patches that are kept.

    python -m scripts.draw_overview reconstruction.png docs/results/cpu.md docs/overview.png

The first is what `mae-deploy reconstruct` drew, the second a page with the tables of `mae-deploy benchmark`.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from PIL import Image

from mae_deploy.reporting.plots import figure

ROW = re.compile(
    r"^\| *\d+ \| (?P<graph>[\w-]+) \| (?P<precision>\w+) \| (?P<engine>\w+) \| 1 \| (?P<kept>\d+) \| (?P<ms>[\d.]+) \|"
)
LINES = {
    ("fp32", "onnxruntime"): ("FP32, ONNX Runtime", "o-"),
    ("int8", "onnxruntime"): ("INT8, ONNX Runtime", "s--"),
    ("int8", "openvino"): ("INT8, OpenVINO", "D--"),
}


def latencies(page: str) -> dict[tuple[str, str], dict[int, float]]:
    """Milliseconds by the number of patches, of each precision and engine of the page's first table; of INT8, the
    bundles that were made for that engine.
    """
    found: dict[tuple[str, str], dict[int, float]] = {key: {} for key in LINES}
    table = page.partition("### Latency")[2].partition("###")[0]
    for line in table.splitlines():
        row = ROW.match(line)
        if row is None or (row["precision"], row["engine"]) not in found:
            continue
        made_for = "openvino" if row["graph"].endswith("openvino") else "onnxruntime"
        if row["precision"] == "fp32" or made_for == row["engine"]:
            found[row["precision"], row["engine"]][int(row["kept"])] = float(row["ms"])
    return found


def main() -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reconstruction", type=Path)
    parser.add_argument("page", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    grid = Image.open(given.reconstruction)
    width, height = 9.0, 4.0
    with figure(given.out, width, height) as drawn:
        pictures, chart = drawn.subplots(
            1, 2, width_ratios=[grid.width / grid.height, width / height - grid.width / grid.height]
        )
        pictures.imshow(grid)
        pictures.set_axis_off()
        for number, title in enumerate(("original", "kept", "predicted")):
            pictures.text((number + 0.5) / 3, 1.02, title, transform=pictures.transAxes, ha="center", fontsize=10)
        for key, points in latencies(given.page.read_text(encoding="utf-8")).items():
            label, style = LINES[key]
            kept = sorted(points)
            chart.plot(kept, [points[number] for number in kept], style, label=label)
        chart.set(xlabel="patches kept of 196", ylabel="ms", xticks=[20, 49, 98, 147, 196], ylim=(0, None))
        chart.set_title("ViT-B/16, one image, one CPU core")
        chart.legend()


if __name__ == "__main__":
    main()
