"""Distil a classifier into students of several sizes, and export the fastest that is accurate enough for the device.

    python examples/distil_for_a_device.py labelled --teacher runs/classifier --out runs/device --within 1.0

Run it on the device, or on a machine like it: the report times FP32 and INT8 there, all students in turns.
"""

import argparse
import json
from pathlib import Path

from mae_deploy.cli import main as mae_deploy


def main(arguments: list[str] | None = None) -> str:
    """The bundle that was chosen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="labelled images: train/<class>/… and val/<class>/…")
    parser.add_argument("--teacher", required=True, help="a fine-tuned run")
    parser.add_argument("--students", default="vit_tiny_patch16,vit_small_patch16")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--within", type=float, default=1.0, help="points of top-1 below the best student")
    parser.add_argument("--epochs", default="100")
    parser.add_argument("--batch-size", default="64")
    given = parser.parse_args(arguments)

    runs = []
    for student in given.students.split(","):
        runs.append(str(given.out / student))
        options = ["--student", student, "--epochs", given.epochs, "--batch-size", given.batch_size, "--resume"]
        run("distill", given.data, "--teacher", given.teacher, "--out", runs[-1], *options)
    run("report", *runs, "--data", given.data, "--out", str(given.out / "report"))

    rows = json.loads((given.out / "report" / "report.json").read_text())["rows"]
    found = [(row["fp32_ms"], row["top1"], row["model"], "FP32", row["fp32_bundle"]) for row in rows]
    found += [
        (row["int8_ms"], row["int8_top1"], row["model"], "INT8", row["int8_bundle"])
        for row in rows
        if row["verdict"] == "ok"
    ]
    best = max(top1 for _, top1, *_ in found)
    milliseconds, top1, model, precision, bundle = min(row for row in found if row[1] >= best - given.within)
    print(f"{model} in {precision}: top-1 {top1:.2f} of at most {best:.2f}, {milliseconds:.1f} ms an image")
    print(f"Next: mae-deploy verify {bundle}")
    return bundle


def run(*words: str) -> None:
    if code := mae_deploy(list(words)):
        raise SystemExit(code)


if __name__ == "__main__":
    main()
