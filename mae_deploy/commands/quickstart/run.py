"""`mae-deploy quickstart`: the whole chain on real handwritten digits, each step by the code that its own command
runs, and what patches, precision and streams bring on real sizes.
"""

from __future__ import annotations

import shutil
import statistics
import time
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from mae_deploy import __version__
from mae_deploy.commands.quickstart.config import QuickstartConfig
from mae_deploy.commands.quickstart.plan import Plan
from mae_deploy.commands.quickstart.report import report_page, result_tables
from mae_deploy.commands.quickstart.speed import installed_engines, measure_speed
from mae_deploy.commands.quickstart.stream import measure_stream
from mae_deploy.config import from_dict, merge
from mae_deploy.distill import run as distill
from mae_deploy.distill.config import DistillConfig
from mae_deploy.errors import ConfigError, import_optional
from mae_deploy.export import run as export
from mae_deploy.export.config import ExportConfig
from mae_deploy.files import atomic_path, remove
from mae_deploy.pretrain import finetune, reconstruct
from mae_deploy.pretrain import run as pretrain
from mae_deploy.pretrain.config import FinetuneConfig, PretrainConfig, ReconstructConfig
from mae_deploy.progress import heading
from mae_deploy.recipe import read_recipe
from mae_deploy.reporting.command_line import command_line, next_command
from mae_deploy.reporting.machine import describe_machine
from mae_deploy.reporting.markdown import write_report
from mae_deploy.reporting.tables import stacked
from mae_deploy.results import Result
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.verify import verify_bundle
from mae_deploy.text import duration

NUM_UNLABELLED = 1400
LABELS_PER_CLASS = 5
STUDENT = {"student": "vit_nano_patch4", "patch_size": 8}
FINETUNE = "quickstart-finetune"

BUNDLES = {
    "encoder-full": ("pretrain", "full"),
    "encoder-visible": ("pretrain", "visible"),
    "student": ("distill-logits-{seed}", "full"),
}
"""Each bundle's run (of the first seed) and its token mode."""

DATASET = {
    "name": "Optical Recognition of Handwritten Digits (scikit-learn load_digits)",
    "images": "1,797 scans of 8x8 pixels by 43 writers",
    "source": "E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998; doi:10.24432/C50P49",
    "licence": "CC BY 4.0",
}

C = TypeVar("C")


def run_quickstart(config: QuickstartConfig) -> Result:
    """Pretrain, fine-tune, distil, export, verify; time real sizes and a stream; report. A killed run goes on where it
    was.
    """
    started = time.monotonic()
    # For networks this small, a second thread gives 1.5 times the speed on an idle machine and a third of it where a
    # core is shared.
    torch.set_num_threads(1)
    out = config.out
    if out.is_dir() and any(out.iterdir()) and not (out / "data").is_dir():
        raise ConfigError(f"--out {out} holds something else", hint="choose another --out")
    plan = Plan.for_this_machine(seeds=len(config.seeds), engines=len(installed_engines()))
    plan.show()
    images = write_digits(out / "data", config.seeds)
    common = {"seed": config.seed, "device": config.device, "resume": True}
    with plan.next():
        mae = pretrain.run_pretrain(
            _recipe(PretrainConfig, "quickstart-pretrain", data=images, out=out / "pretrain", **common)
        )
    with plan.next():
        teacher = {"teacher": out / "pretrain", **STUDENT}
        features = {"out": out / "distill-features", "objective": "features"}
        distill.run_distill(
            _recipe(DistillConfig, "quickstart-distill-features", data=images, **features, **teacher, **common)
        )
    with plan.next():
        top1 = _few_labels(config, images)
    with plan.next():
        parity = _export(config)
    with plan.next():
        speed = measure_speed()
    with plan.next():
        stream = measure_stream(out / "stream", out / "stream.png")
    with plan.next():
        _reconstruct(config)
    report: dict[str, Any] = {
        "mae_deploy": __version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command_line("quickstart", config),
        "machine": describe_machine({name: version(name) for name in installed_engines()}, threads=1, affinity=None),
        "dataset": DATASET,
        "protocol": {
            "unlabelled_images": NUM_UNLABELLED,
            "labels_per_class": LABELS_PER_CLASS,
            "test_images": 1797 - NUM_UNLABELLED,
            "seeds": list(config.seeds),
            "pretraining_seed": config.seed,
            "a_seed_changes": (
                "which images are labelled, the initial weights, the order of the data and its augmentation"
            ),
        },
        "mae_loss": {"first": mae["first_loss"], "last": mae["last_loss"]},
        "top1": top1,
        "parity": parity,
        "size_bytes": {
            name: sum(entry["size"] for entry in Bundle.load(out / "bundles" / name).manifest["files"].values())
            for name in BUNDLES
        },
        "speed": speed,
        "stream": stream,
        "reconstruction": str(out / "reconstruction.png"),
        "stages": plan.rows,
        "seconds": round(time.monotonic() - started, 1),
    }
    write_report(out, "report", report, report_page(report), html=True)
    heading(f"Quickstart, {duration(report['seconds'])}; with pictures in {out / 'report.html'}")
    return Result(report, stacked(result_tables(report)), then=next_command("pretrain", "PHOTOS", out="runs/mae"))


def write_digits(folder: Path, seeds: tuple[int, ...]) -> Path:
    """Write the scans as PNG files once, and a few-label set for each seed; returns the folder of unlabelled images.

    `unlabelled/` and `val/<digit>/` never share an image; `few-labels-S/train/<digit>/` are drawn from the unlabelled
    ones by seed S.
    """
    digits = import_optional("sklearn.datasets", extra="train").load_digits()
    pixels, labels = np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target
    order = np.random.default_rng(0).permutation(len(labels))
    unlabelled, test = order[:NUM_UNLABELLED], order[NUM_UNLABELLED:]
    if not (folder / "unlabelled").is_dir():
        examples: list[int] = [next(index for index in test if labels[index] == digit) for digit in range(8)]
        for name, indices in (("examples", examples), ("val", test.tolist()), ("unlabelled", unlabelled.tolist())):
            remove(folder / name)
            with atomic_path(folder / name) as aside:
                for index in indices:
                    _save(pixels[index], aside / str(labels[index]) if name == "val" else aside, index)
    for seed in seeds:
        few = folder / f"few-labels-{seed}"
        if few.is_dir():
            continue
        shuffled = np.random.default_rng(seed).permutation(unlabelled)
        with atomic_path(few) as aside:
            for digit in range(10):
                for index in [index for index in shuffled if labels[index] == digit][:LABELS_PER_CLASS]:
                    _save(pixels[index], aside / "train" / str(digit), index)
            shutil.copytree(folder / "val", aside / "val")
    return folder / "unlabelled"


def _few_labels(config: QuickstartConfig, images: Path) -> dict[str, dict[str, Any]]:
    """Top-1 of four networks for each seed, with the same labels and the same fine-tuning for a pair that is
    compared.
    """
    out = config.out
    found: dict[str, list[float]] = {
        "teacher": [],
        "teacher_from_scratch": [],
        "student": [],
        "student_from_scratch": [],
    }
    for seed in config.seeds:
        data = out / "data" / f"few-labels-{seed}"
        common = {"data": data, "seed": seed, "device": config.device, "resume": True}
        teacher, student = out / f"finetune-{seed}", out / f"distill-logits-{seed}"
        finetuning = {"init": out / "pretrain", **common}
        found["teacher"].append(
            finetune.run_finetune(_recipe(FinetuneConfig, FINETUNE, out=teacher, **finetuning))["top1"]
        )
        scratch = _recipe(FinetuneConfig, FINETUNE, out=out / f"scratch-{seed}", from_scratch=True, **finetuning)
        found["teacher_from_scratch"].append(finetune.run_finetune(scratch)["top1"])
        logits = {
            "teacher": teacher,
            **STUDENT,
            "init": out / "distill-features",
            "objective": "logits",
            "logits": {"unlabelled": images},
        }
        found["student"].append(
            distill.run_distill(_recipe(DistillConfig, "quickstart-distill-logits", out=student, **logits, **common))[
                "top1"
            ]
        )
        alone = _recipe(
            FinetuneConfig,
            FINETUNE,
            out=out / f"student-scratch-{seed}",
            init=out / "distill-features",
            from_scratch=True,
            **common,
        )
        found["student_from_scratch"].append(finetune.run_finetune(alone)["top1"])
    return {
        name: {"mean": statistics.mean(values), "min": min(values), "max": max(values), "by_seed": values}
        for name, values in found.items()
    }


def _export(config: QuickstartConfig) -> dict[str, Any]:
    """Write and verify the bundles; the worst figures of each."""
    out = config.out
    parity: dict[str, Any] = {}
    for name, (run_name, tokens) in BUNDLES.items():
        path = out / "bundles" / name
        remove(path)
        checkpoint = out / run_name.format(seed=config.seeds[0])
        export.run_export(ExportConfig(checkpoint=checkpoint, out=path, tokens=tokens, samples=out / "data" / "val"))
        verification = verify_bundle(Bundle.load(path))
        parity[name] = {
            "passed": verification.passed,
            "cosine": min(check.comparison.cosine for check in verification.outputs),
            "max_abs": max(check.comparison.max_abs for check in verification.outputs),
        }
    return parity


def _reconstruct(config: QuickstartConfig) -> None:
    out = config.out / "reconstruction.png"
    out.unlink(missing_ok=True)  # of an earlier run in this folder: the same again
    reconstruct.run_reconstruct(
        ReconstructConfig(
            images=(config.out / "data" / "examples",),
            checkpoint=config.out / "pretrain",
            out=out,
            seed=config.seed,
            device=config.device,
        )
    )


def _recipe(kind: type[C], name: str, **settings: Any) -> C:
    """A shipped recipe with this run's own settings."""
    return from_dict(kind, merge(read_recipe(name), settings))


def _save(pixels: Any, folder: Path, index: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(folder / f"{index:04d}.png")
