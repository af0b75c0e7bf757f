"""Plots of the tables of docs/results/: what distilling is worth, and what fewer patches bring on a GPU.

python -m scripts.draw_results
"""

from __future__ import annotations

import re
from pathlib import Path

from mae_deploy.reporting.plots import COLOURS, figure

RESULTS = Path(__file__).parents[1] / "docs" / "results"
MODELS = {"tiny": "ViT-T", "small": "ViT-S", "base": "ViT-B", "large": "ViT-L"}


def distilled(page: str) -> dict[str, list[float]]:
    """Top-1 of every seed, of the arms of the page's first table."""
    table = page.partition("## What matters")[0]
    rows = re.findall(r"^\| \**([^|*]+?)\** \| \**([\d., ]+?)\** \|", table, re.MULTILINE)
    return {arm: [float(value) for value in seeds.split(", ")] for arm, seeds in rows}


def fewer_patches(page: str) -> dict[str, dict[int, float]]:
    """By model and batch, how many times as fast 49 patches are as 196."""
    row = r"^\| vit_(\w+?)_patch16 \| (\d+) \| [^|]+\| [^|]*\(([\d.]+)x\) \|"
    found: dict[str, dict[int, float]] = {}
    for model, batch, times in re.findall(row, page, re.MULTILINE):
        found.setdefault(MODELS[model], {})[int(batch)] = float(times)
    return found


def draw_distilled(arms: dict[str, list[float]], out: Path) -> None:
    """The means, with a point for each seed."""
    with figure(out, 8.0, 2.8) as drawn:
        axes = drawn.subplots()
        for place, (arm, seeds) in enumerate(reversed(arms.items())):
            mean = sum(seeds) / len(seeds)
            colour = COLOURS[4] if arm.startswith("features") else COLOURS[0]
            axes.plot(mean, place, "D", color=colour, markersize=7)
            axes.plot(seeds, [place] * len(seeds), ".", color=colour, markersize=5)
            axes.text(max(seeds) + 0.4, place, f"{mean:.1f}", va="center")
        axes.set_yticks(range(len(arms)), list(reversed(arms)))
        axes.set(xlabel="top-1, per cent: mean and seeds", xlim=(53, 62))


def draw_fewer_patches(models: dict[str, dict[int, float]], out: Path) -> None:
    """A line for each model over the batch."""
    with figure(out, 6.0, 3.2) as drawn:
        axes = drawn.subplots()
        for model, times in models.items():
            axes.plot(list(times), list(times.values()), "o-", label=model)
        axes.set_xscale("log", base=2)
        axes.set_xticks([1, 8, 32, 128], ["1", "8", "32", "128"])
        axes.set(xlabel="batch", ylabel="times as fast as 196 patches", ylim=(1, 4.2))
        axes.set_title("49 of 196 patches, FP16, one H200")
        axes.legend()


def main() -> None:
    """Draw both beside their pages."""
    draw_distilled(distilled((RESULTS / "distillation.md").read_text(encoding="utf-8")), RESULTS / "distillation.png")
    draw_fewer_patches(fewer_patches((RESULTS / "gpu-h200.md").read_text(encoding="utf-8")), RESULTS / "gpu-tokens.png")


if __name__ == "__main__":
    main()
