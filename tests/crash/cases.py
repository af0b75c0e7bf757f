"""What is killed: every command that writes, on inputs of a few kilobytes."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from mae_deploy.cli import main
from mae_deploy.config import to_yaml
from mae_deploy.distill.config import DistillConfig
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.tensorrt.add_engine import Built
from mae_deploy.runtime.tensorrt.add_plan import add_plan
from mae_deploy.runtime.tensorrt.build import BuiltPlan
from tests.data.image_folders import write_classes, write_noise
from tests.export.tiny_exports import write_checkpoint
from tests.models.tiny_models import tiny_encoder
from tests.runtime.tensorrt.planned_bundle import ORIN, PROFILES, planned
from tests.runtime.video.tiny_video import moving_square, write_video
from tests.training.tiny_runs import STUDENT, finetuning, optim, pretraining

_BY_CONTENT = (".safetensors", ".onnx", ".npz", ".npy", ".parquet", ".tar", ".pth", ".csv", ".jsonl", ".png", ".plan")
"""Files that are the same each time, to the byte; others hold times and paths."""

_OF_THE_MACHINE = ("metrics.jsonl",)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A command and what a kill must leave of it."""

    arguments: Callable[[Path, Path], list[str | Path]]
    """Of the folder of inputs and the output."""
    suffix: str = ""
    """Of the output."""
    atomic: bool = True
    """The output is there as a whole or not at all; else the same command goes on with what is there."""
    again: tuple[str, ...] = ()
    """What the second call has on top."""
    start: Callable[[Path, Path], object] | None = None
    """What lies at the output before."""
    within: Callable[[], Any] = field(default=lambda: mock.patch.dict(os.environ))
    """What the command runs within, such as a stand-in for a GPU."""
    varies: tuple[str, ...] = ()
    """Names of files that are not the same each time."""
    reads: Callable[[Path], list[str | Path]] | None = None
    """The command that reads the output, once it is whole."""

    def digest(self, out: Path) -> Mapping[str, str]:
        """The names of all files, and the content of those that must be the same as without a kill."""
        files = [out] if out.is_file() else sorted(path for path in out.rglob("*") if path.is_file())
        skipped = (*_OF_THE_MACHINE, *self.varies)
        return {
            str(path.relative_to(out.parent)): hashlib.sha256(_content(path)).hexdigest()
            if path.suffix in _BY_CONTENT and not any(name in path.name for name in skipped)
            else "there"
            for path in files
            if "tfevents" not in path.name
        }


def _content(path: Path) -> bytes:
    """A file's bytes; of weights without the header, which holds the settings of the call, `resume` among them."""
    content = path.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :] if path.suffix == ".safetensors" else content


def write_inputs(root: Path) -> Path:
    """Images, labelled images, a video, runs, bundles and weights."""
    write_noise(root / "photos", 11)
    write_classes(root / "classes")
    write_video(root / "square.mp4", [moving_square(index) for index in range(40)])
    configs = {
        "pretrain": pretraining(root / "photos", root / "mae"),
        "finetune": finetuning(root / "classes", root / "classifier", root / "mae"),
        "sweep-pretrain": pretraining(root / "classes", root / "x", optim=optim(epochs=1, batch_size=6)),
        "sweep-finetune": finetuning(root / "classes", root / "x", root / "x", optim=optim(epochs=1, batch_size=6)),
        "distill": DistillConfig(
            data=root / "photos", teacher=root / "mae", out=root / "x", **STUDENT, optim=optim(), device="cpu"
        ),
    }
    for name, config in configs.items():
        text = to_yaml(config)
        (root / f"{name}.yaml").write_text("".join(line for line in text.splitlines(True) if line[:4] != "out:"))
    encoder = write_checkpoint(root / "encoder", tiny_encoder())
    for arguments in (
        ["pretrain", "--recipe", root / "pretrain.yaml", "--out", root / "mae"],
        ["finetune", "--recipe", root / "finetune.yaml", "--out", root / "classifier"],
        ["export", root / "classifier", "--out", root / "bundle", "--samples", root / "photos"],
        ["export", encoder, "--out", root / "cached", "--tokens", "cached", "--samples", root / "photos"],
        ["export-weights", root / "mae", "--to", "timm", "--out", root / "timm"],
    ):
        assert main([str(argument) for argument in arguments]) == 0, arguments
    return root


def _training(stage: str, *more: str) -> Case:
    return Case(
        arguments=lambda root, out: [stage, "--recipe", root / f"{stage}.yaml", "--out", out, *more],
        atomic=False,
        again=("--resume",),
        reads=lambda out: ["info", out],
    )


def _exporting(*more: str) -> Case:
    return Case(
        arguments=lambda root, out: ["export", root / "classifier", "--out", out, "--samples", root / "photos", *more],
        reads=lambda out: ["verify", out],
    )


def _linprobe(*more: str) -> Case:
    return Case(
        arguments=lambda root, out: [
            *("linprobe", root / "classes", "--init", root / "mae", "--out", out, "--device", "cpu"),
            *("--epochs", "2", "--batch-size", "5", "--num-workers", "0", *more),
        ],
        atomic=False,
        again=("--resume",),
        reads=lambda out: ["info", out],
    )


def _streaming(suffix: str) -> Case:
    return Case(
        arguments=lambda root, out: ["stream", root / "square.mp4", root / "cached", "--bypass", "0.9", "--out", out],
        suffix=suffix,
    )


def _planned_bundle(root: Path, out: Path) -> None:
    planned(out)


def _engine() -> Any:
    """`build-engine` whose builder is a file that is copied; what puts it into the bundle is ours."""

    def build(bundle: Bundle, **given: object) -> Built:
        plan = bundle.path.with_name("built.plan")
        plan.write_bytes(b"plan" * 1000)
        options = {"hardware_compatible": "none", "version_compatible": False, "strip": False}
        entry = add_plan(
            bundle,
            BuiltPlan(file=plan, layers='{"Layers": []}', record={"options": options}),
            version="10.3.0",
            gpu=ORIN,
            precision="fp16",
            profiles=PROFILES,
            build=bundle.manifest["engines"][0]["build"],
            parity={"checks": 7, "sizes": ["B 1"]},
            latency_ms=1.5,
        )
        return Built(entry=entry, checks=(), baseline=None, rejected=None)

    return mock.patch.multiple("mae_deploy.commands.build_engine", load_tensorrt=lambda index: None, build_engine=build)


CASES: dict[str, Case] = {
    "pretrain": _training("pretrain"),
    "pretrain, three copies kept": _training("pretrain", "--keep-checkpoints", "3", "--ema", "0.9"),
    "finetune": _training("finetune"),
    "linprobe": _linprobe(),
    "linprobe, closed form": _linprobe("--solver", "ridge"),
    "distill": _training("distill", "--num-workers", "0"),
    "sweep": Case(
        arguments=lambda root, out: [
            *("sweep", root / "classes", "--mask-ratio", "0.5,0.75", "--out", out, "--linear", "ridge", "--k", "3"),
            *("--recipe", root / "sweep-pretrain.yaml", "--finetune-recipe", root / "sweep-finetune.yaml"),
            *("--num-workers", "0", "--device", "cpu"),
        ],
        atomic=False,
    ),
    "export": _exporting(),
    "export, INT8": _exporting("--precision", "int8", "--max-latency", "1000", "--max-drop", "99"),
    "export-weights": Case(
        arguments=lambda root, out: ["export-weights", root / "mae", "--to", "timm", "--out", out],
    ),
    "import": Case(
        arguments=lambda root, out: ["import", root / "timm", "--out", out],
        reads=lambda out: ["info", out],
    ),
    "build-engine": Case(
        arguments=lambda root, out: ["build-engine", out],
        start=_planned_bundle,
        atomic=False,
        within=_engine,
        reads=lambda out: ["info", out],
    ),
    "reconstruct": Case(
        arguments=lambda root, out: [
            *("reconstruct", root / "photos", "--checkpoint", root / "mae", "--out", out, "--device", "cpu")
        ],
        suffix=".png",
    ),
    "compare": Case(
        arguments=lambda root, out: [
            *("compare", root / "mae", "random", "--data", root / "classes", "--out", out),
            *("--k", "3", "--num-workers", "0", "--device", "cpu"),
        ],
    ),
    "data pack": Case(
        arguments=lambda root, out: [
            *("data", "pack", root / "photos", out, "--shard-images", "3", "--num-workers", "0")
        ],
        atomic=False,
        reads=lambda out: ["data", "stats", out, "--num-workers", "0"],
    ),
    "data pack, two processes": Case(
        arguments=lambda root, out: [
            *("data", "pack", root / "photos", out, "--shard-images", "3", "--num-workers", "2", "--dedup", "exact")
        ],
        atomic=False,
    ),
    "predict": Case(
        arguments=lambda root, out: ["predict", root / "bundle", root / "photos", "--out", out, "--batch-size", "2"],
        suffix=".npz",
    ),
    "predict, Parquet": Case(
        arguments=lambda root, out: ["predict", root / "bundle", root / "photos", "--out", out, "--batch-size", "2"],
        suffix=".parquet",
    ),
    "stream": _streaming(".npz"),
    "stream, lines": _streaming(".jsonl"),
    "stream-eval": Case(
        arguments=lambda root, out: [
            *("stream-eval", root / "square.mp4", root / "cached", "--out", out, "--conditions", "clean,jitter")
        ],
        atomic=False,
        varies=(".png",),
    ),
    "report": Case(
        arguments=lambda root, out: [
            *("report", root / "classifier", "--data", root / "classes", "--out", out, "--repeats", "2"),
            *("--warmup", "1", "--max-latency", "1000", "--max-drop", "99"),
        ],
        atomic=False,
        varies=(".png",),
    ),
    "benchmark": Case(
        arguments=lambda root, out: ["benchmark", root / "bundle", "--repeats", "3", "--warmup", "1", "--out", out],
        varies=(".png",),
    ),
    "quickstart": Case(
        arguments=lambda root, out: ["quickstart", "--out", out],
        atomic=False,
        varies=("stream", "report", "speed"),
    ),
}
"""By what is shown of them."""


def lay_out(case: Case, root: Path, out: Path) -> None:
    """The output's folder as it is before the command."""
    shutil.rmtree(out.parent, ignore_errors=True)
    out.parent.mkdir(parents=True)
    if case.start is not None:
        case.start(root, out)
