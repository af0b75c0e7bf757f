"""What is killed: every command that writes, on inputs of a few kilobytes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.error import HTTPError
from urllib.request import urlopen
from uuid import uuid4

from mae_deploy.config import to_yaml
from mae_deploy.distill.config import DistillConfig
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.tensorrt.add_engine import Built
from mae_deploy.runtime.tensorrt.add_plan import add_plan
from mae_deploy.runtime.tensorrt.build import BuiltPlan
from tests.commands.test_sign import write_keys
from tests.data.image_folders import write_classes, write_noise
from tests.export.tiny_exports import write_checkpoint
from tests.models.tiny_models import tiny_encoder
from tests.runtime.tensorrt.planned_bundle import ORIN, planned
from tests.runtime.video.tiny_video import moving_square, write_video
from tests.training.tiny_runs import STUDENT, finetuning, optim, pretraining

_BY_CONTENT = (".safetensors", ".onnx", ".npz", ".npy", ".parquet", ".tar", ".pth", ".csv", ".jsonl", ".png", ".plan")
"""Files that are the same each time, to the byte; others hold times and paths."""

_OF_THE_MACHINE = ("metrics.jsonl",)

Arguments = list[str | Path]


def digest_of(out: Path, varies: tuple[str, ...] = ()) -> dict[str, str]:
    """The names of all files, and the content of those that must be the same as without a kill."""
    files = [out] if out.is_file() else sorted(path for path in out.rglob("*") if path.is_file())
    skipped = (*_OF_THE_MACHINE, *varies)
    return {
        str(path.relative_to(out)): hashlib.sha256(_content(path)).hexdigest()
        if path.suffix in _BY_CONTENT and not any(name in path.name for name in skipped)
        else "there"
        for path in files
        if "tfevents" not in path.name and "profile" not in path.parts
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A command and what a kill must leave of it."""

    arguments: Callable[[Path, Path], Arguments]
    """Of the folder of inputs and the output."""
    suffix: str = ""
    """Of the output."""
    atomic: bool = True
    """The output is there as a whole or not at all; else the same command goes on with what is there."""
    several: bool = False
    """The output is a folder of outputs, each of which is as `atomic` says."""
    again: tuple[str, ...] = ()
    """What the second call has on top."""
    start: Callable[[Path, Path], object] | None = None
    """What lies at the output before."""
    within: Callable[[], Any] = field(default=lambda: mock.patch.dict(os.environ))
    """What the command runs within, such as a stand-in for a GPU."""
    varies: tuple[str, ...] = ()
    """Names of files that are not the same each time."""
    stops: bool = False
    """A signal ends it with what was written so far."""
    reads: Callable[[Path, Path], Arguments] | None = None
    """The command that reads the output, once it is whole."""
    digest: Callable[..., Mapping[str, str]] = digest_of
    """Of the output, and of `varies`."""


def _content(path: Path) -> bytes:
    """A file's bytes; of weights without the header, which holds the settings of the call, `resume` among them."""
    content = path.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :] if path.suffix == ".safetensors" else content


_MADE: dict[str, Callable[[Path, Path], Arguments]] = {
    "mae": lambda root, out: ["pretrain", "--recipe", root / "pretrain.yaml", "--out", out],
    "square": lambda root, out: [*("pretrain", "--recipe", root / "pretrain.yaml", "--out", out, "--image-size", "15")],
    "classifier": lambda root, out: ["finetune", "--recipe", root / "finetune.yaml", "--out", out],
    "bundle": lambda root, out: ["export", root / "classifier", "--out", out, "--samples", root / "photos"],
    "cached": lambda root, out: [
        *("export", root / "encoder", "--out", out, "--tokens", "cached", "--samples", root / "photos")
    ],
    "timm": lambda root, out: ["export-weights", root / "mae", "--to", "timm", "--out", out],
    "features": lambda root, out: ["embed", root / "photos", root / "bundle", "--out", out],
}
"""Inputs that commands make of others, in this order."""


def write_inputs(root: Path, names: list[str], make: Callable[[list[str]], object]) -> Path:
    """Images, labelled images, a video, keys and recipes; runs, bundles and what else these cases need.

    Args:
        make: runs a command.
    """
    write_noise(root / "photos", 11)
    write_classes(root / "classes")
    write_video(root / "square.mp4", [moving_square(index) for index in range(24)])
    write_keys(root, "key")
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
    write_checkpoint(root / "encoder", tiny_encoder())
    needed = set[str]()
    words = [word for name in names for word in CASES[name].arguments(root, root / "out")]
    words += [root / start.name for name in names if isinstance(start := CASES[name].start, _Copied)]
    for name, arguments in reversed(_MADE.items()):
        recipes = " ".join(Path(word).read_text() for word in words if str(word).endswith(".yaml"))
        if root / name in words or str(root / name) + "\n" in recipes:
            needed.add(name)
            words += arguments(root, root / "out")
    for name, arguments in _MADE.items():
        if name in needed:
            make([str(argument) for argument in arguments(root, root / name)])
    return root


def _training(stage: str, *more: str) -> Case:
    return Case(
        arguments=lambda root, out: [stage, "--recipe", root / f"{stage}.yaml", "--out", out, *more],
        atomic=False,
        again=("--resume",),
        reads=lambda root, out: ["info", out],
    )


def _exporting(*more: str) -> Case:
    return Case(
        arguments=lambda root, out: ["export", root / "classifier", "--out", out, "--samples", root / "photos", *more],
        reads=lambda root, out: ["verify", out],
    )


def _linprobe(*more: str) -> Case:
    return Case(
        arguments=lambda root, out: [
            *("linprobe", root / "classes", "--init", root / "mae", "--out", out, "--device", "cpu"),
            *("--epochs", "2", "--batch-size", "5", "--num-workers", "0", *more),
        ],
        atomic=False,
        again=("--resume",),
        reads=lambda root, out: ["info", out],
    )


def _streaming(suffix: str) -> Case:
    return Case(
        arguments=lambda root, out: ["stream", root / "square.mp4", root / "cached", "--bypass", "0.9", "--out", out],
        suffix=suffix,
        stops=True,
    )


def _predicting(suffix: str) -> Case:
    return Case(
        arguments=lambda root, out: ["predict", root / "bundle", root / "photos", "--out", out, "--batch-size", "2"],
        suffix=suffix,
    )


def _packing(*more: str) -> Case:
    return Case(
        arguments=lambda root, out: ["data", "pack", root / "photos", out, "--shard-images", "3", *more],
        atomic=False,
        reads=lambda root, out: ["data", "stats", out, "--num-workers", "0"],
    )


def _embedding(*more: str) -> Case:
    return Case(
        arguments=lambda root, out: [
            *("embed", root / "photos", root / "bundle", "--out", out, "--shard-images", "4", "--threads", "1"),
            *more,
        ],
        atomic=False,
        reads=lambda root, out: ["search", out, "--outliers", "--k", "2"],
    )


def _converting(library: str, suffix: str = "") -> Case:
    return Case(
        arguments=lambda root, out: ["export-weights", root / "square", "--to", library, "--out", out], suffix=suffix
    )


@dataclass(frozen=True)
class _Copied:
    """An input lies at the output, as a copy."""

    name: str

    def __call__(self, root: Path, out: Path) -> object:
        return shutil.copytree(root / self.name, out)


def _pushed(out: Path, varies: tuple[str, ...]) -> Mapping[str, str]:
    """What the hub has."""
    address = f"{os.environ['HF_ENDPOINT']}/me/{out.read_text()}/resolve/main"
    try:
        with urlopen(f"{address}/manifest.json") as answer:
            names = json.loads(answer.read())["files"]
        return {name: hashlib.sha256(urlopen(f"{address}/{name}").read()).hexdigest() for name in names}
    except HTTPError:
        return {}


def _engines(out: Path, varies: tuple[str, ...]) -> Mapping[str, str]:
    """Whichever of its two names an engine has."""
    return {name.replace("-2.", "."): content for name, content in digest_of(out, varies).items()}


def _small_quickstart() -> Any:
    """With the networks of its test."""
    return import_module("tests.commands.quickstart.test_run").small_quickstart()


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
            profiles=[{size: (a, b, c) for size, (a, b, c) in bundle.manifest["profile"].items()}],
            build={
                "size": 4000,
                "seconds": 1.0,
                "kernels": {"layers": 3, "fused_attention": 2, "precisions": {}},
                "warnings": [],
            },
            parity={"checks": 7, "sizes": ["B 1"]},
            latency_ms=1.5,
        )
        return Built(entry=entry, checks=(), baseline=None, rejected=None)

    return mock.patch.multiple("mae_deploy.commands.build_engine", load_tensorrt=lambda index: None, build_engine=build)


CASES: dict[str, Case] = {
    "pretrain": _training("pretrain"),
    "pretrain, three copies kept": _training("pretrain", "--keep-checkpoints", "3", "--ema", "0.9"),
    "pretrain, pictures and profile": _training("pretrain", "--pictures-every", "1", "--profile"),
    "finetune": _training("finetune"),
    "linprobe": _linprobe(),
    "linprobe, closed form": _linprobe("--solver", "ridge"),
    "distill": _training("distill", "--num-workers", "0"),
    "distill, answers kept": Case(
        arguments=lambda root, out: [
            *("distill", "--recipe", root / "distill.yaml", "--num-workers", "0", "--fixed-views", "1"),
            *("--out", out / "run", "--teacher-cache", out / "cache"),
        ],
        several=True,
        atomic=False,
        again=("--resume",),
    ),
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
    "export, as a recipe": Case(
        arguments=lambda root, out: ["export", root / "classifier", "--out", "x", "--dump-config", out], suffix=".yaml"
    ),
    "export, for Triton": Case(
        arguments=lambda root, out: [
            *("export", root / "classifier", "--samples", root / "photos"),
            *("--out", out / "bundle", "--triton", out / "models"),
        ],
        several=True,
    ),
    "export-weights": _converting("timm"),
    "export-weights, transformers": _converting("huggingface"),
    "export-weights, original": _converting("original", ".pth"),
    "import": Case(
        arguments=lambda root, out: ["import", root / "timm", "--out", out],
        reads=lambda root, out: ["info", out],
    ),
    "build-engine": Case(
        arguments=lambda root, out: ["build-engine", out],
        start=lambda root, out: planned(out),
        atomic=False,
        within=_engine,
        digest=_engines,
        reads=lambda root, out: ["info", out],
    ),
    "build-engine, for servers": Case(
        arguments=lambda root, out: [
            *("build-engine", out / "bundle", "--triton", out / "models", "--deepstream", out / "deepstream")
        ],
        several=True,
        start=lambda root, out: planned(out / "bundle", token_mode="full", preprocess={"std": [0.3] * 3}),
        atomic=False,
        within=_engine,
        digest=_engines,
    ),
    "verify": Case(
        arguments=lambda root, out: ["verify", root / "bundle", "--certificate", out, "--samples", root / "photos"],
        suffix=".json",
    ),
    "sign": Case(
        arguments=lambda root, out: ["sign", out, "--key", root / "key.pem"],
        start=_Copied("bundle"),
        atomic=False,
        reads=lambda root, out: ["verify", out, "--signature", root / "key.pub"],
    ),
    "push": Case(
        arguments=lambda root, out: ["push", root / "bundle", f"hf://me/{out.read_text() if out.exists() else 0}"],
        start=lambda root, out: out.write_text(uuid4().hex),
        atomic=False,
        digest=_pushed,
    ),
    "eval": Case(
        arguments=lambda root, out: ["eval", root / "bundle", root / "classes", "--confusion", out], suffix=".csv"
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
    "data pack": _packing("--num-workers", "0"),
    "data pack, two processes": _packing("--num-workers", "2", "--dedup", "exact"),
    "embed": _embedding("--engine-workers", "1"),
    "embed, two processes": _embedding("--engine-workers", "2"),
    "search": Case(
        arguments=lambda root, out: [
            *("search", root / "features", "--image", root / "photos/03.png", "--duplicates", "--outliers"),
            *("--k", "3", "--out", out),
        ],
    ),
    "search, with an index": Case(
        arguments=lambda root, out: ["search", out, "--outliers", "--k", "2", "--method", "approximate"],
        start=_Copied("features"),
        atomic=False,
    ),
    "predict": _predicting(".npz"),
    "predict, Parquet": _predicting(".parquet"),
    "stream": _streaming(".npz"),
    "stream, Parquet": _streaming(".parquet"),
    "stream, lines": _streaming(".jsonl"),
    "stream, report and video": Case(
        arguments=lambda root, out: [
            *("stream", root / "square.mp4", root / "cached", "--bypass", "0.9", "--out", out / "rows.npz"),
            *("--report", out / "report", "--annotate", out / "seen.mp4"),
        ],
        several=True,
        varies=(".png",),
        stops=True,
    ),
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
        arguments=lambda root, out: [
            *("benchmark", root / "bundle", "--repeats", "3", "--warmup", "1", "--no-probe", "--out", out)
        ],
        varies=(".png",),
    ),
    "benchmark-train": Case(
        arguments=lambda root, out: [
            *("benchmark-train", "--model", "vit_nano_patch4", "--image-size", "12,20", "--batch-size", "3"),
            *("--steps", "1", "--repeats", "1", "--warmup", "1", "--no-measure-kernels", "--out", out),
        ],
        varies=(".png",),
    ),
    "quickstart": Case(
        arguments=lambda root, out: ["quickstart", "--out", out, "--device", "cpu"],
        atomic=False,
        within=_small_quickstart,
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
