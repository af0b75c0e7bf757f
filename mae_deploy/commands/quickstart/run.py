"""`mae-deploy quickstart`: the whole chain on real handwritten digits, each step by the code that its own command
runs.
"""

from __future__ import annotations

import shutil
import statistics
import time
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from mae_deploy.commands.quickstart.config import QuickstartConfig
from mae_deploy.commands.quickstart.report import quickstart_table, report_page
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
from mae_deploy.progress import heading, progress
from mae_deploy.recipe import read_recipe
from mae_deploy.reporting.command_line import command_line
from mae_deploy.reporting.markdown import write_report
from mae_deploy.results import Result
from mae_deploy.runtime.backbone import Backbone
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.timing import measure
from mae_deploy.runtime.verify import verify_bundle

NUM_UNLABELLED = 1400
LABELS_PER_CLASS = 5
STUDENT = {"student": "vit_nano_patch4", "patch_size": 8}
FINETUNE = "quickstart-finetune"

_LATENCY_BATCHES = (1, 16)

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
    """Pretrain, fine-tune, distil, export, verify, time, report; a killed run goes on where it was."""
    started = time.monotonic()
    # For networks this small, a second thread gives 1.5 times the speed on an idle machine and a third of it where a
    # core is shared.
    torch.set_num_threads(1)
    out = config.out
    if out.is_dir() and any(out.iterdir()) and not (out / "data").is_dir():
        raise ConfigError(f"--out {out} holds something else", hint="choose another --out")
    images = write_digits(out / "data", config.seeds)
    common = {"seed": config.seed, "device": config.device, "resume": True}
    heading("1/6 pretraining: a masked autoencoder on 1,400 digits without labels")
    mae = pretrain.run_pretrain(
        _recipe(PretrainConfig, "quickstart-pretrain", data=images, out=out / "pretrain", **common)
    )
    heading("2/6 feature distillation: a smaller student, still without labels")
    teacher = {"teacher": out / "pretrain", **STUDENT}
    distill.run_distill(
        _recipe(
            DistillConfig,
            "quickstart-distill-features",
            data=images,
            out=out / "distill-features",
            objective="features",
            **teacher,
            **common,
        )
    )
    heading(
        f"3/6 few labels, {LABELS_PER_CLASS} a class: fine-tuning, distillation of logits, and both networks from"
        " scratch"
    )
    top1 = _few_labels(config, images)
    heading("4/6 export to ONNX, checked against PyTorch")
    parity = _export(config)
    heading("5/6 latency of the full and of the visible-token graph, in turns")
    latency = _latency(out)
    heading("6/6 reconstruction pictures and the report")
    picture = out / "reconstruction.png"
    picture.unlink(missing_ok=True)  # of an earlier run in this folder: the same again
    reconstruct.run_reconstruct(
        ReconstructConfig(
            images=(out / "data" / "examples",),
            checkpoint=out / "pretrain",
            out=picture,
            seed=config.seed,
            device=config.device,
        )
    )
    report = {
        "command": command_line("quickstart", config),
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
        "latency": latency,
        "size_bytes": {
            name: sum(entry["size"] for entry in Bundle.load(out / "bundles" / name).manifest["files"].values())
            for name in BUNDLES
        },
        "reconstruction": str(picture),
        "seconds": round(time.monotonic() - started, 1),
    }
    write_report(out, "report", report, report_page(report))
    return Result(report, quickstart_table(report, f"Quickstart, {report['seconds']:.0f} s"))


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


def _latency(out: Path) -> dict[str, Any]:
    """Medians at batch 1 and 16, one thread, the graphs taking turns."""
    found: dict[str, Any] = {}
    with (
        progress("latency", len(_LATENCY_BATCHES)) as bar,
        Backbone.load(out / "bundles" / "encoder-full", threads=1) as full,
        Backbone.load(out / "bundles" / "encoder-visible", threads=1) as visible,
    ):
        keep = np.random.default_rng(0).permutation(full.num_patches)[: full.num_patches // 4]
        height, width = full.preprocess.image_size
        for batch in _LATENCY_BATCHES:
            images = np.zeros((batch, full.preprocess.channels, height, width), np.float32)

            def run_full(images: Any = images) -> object:
                return full(images, outputs=["pooled"])

            def run_visible(images: Any = images) -> object:
                return visible(images, keep, outputs=["pooled"])

            times = measure({"full": run_full, "visible": run_visible}, repeats=200, warmup=20)
            found[f"batch_{batch}"] = {
                "full_ms": times["full"].median * 1000,
                "visible_ms": times["visible"].median * 1000,
                "ratio": times["visible"].ratio(times["full"]),
            }
            bar.advance(1)
    return found


def _recipe(kind: type[C], name: str, **settings: Any) -> C:
    """A shipped recipe with this run's own settings."""
    return from_dict(kind, merge(read_recipe(name), settings))


def _save(pixels: Any, folder: Path, index: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(folder / f"{index:04d}.png")
