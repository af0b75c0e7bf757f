"""Everything that only an NVIDIA GPU can show: GPU tests, TensorRT engines of ViT-T/S/B/L/H, their parity and speed,
and a report.

Each step leaves a JSON file in the state folder; a later run does what is missing, failed, or was done on another GPU
or TensorRT. With PyTorch but without TensorRT it exports bundles and times PyTorch; with TensorRT but without PyTorch
it builds, verifies and times the bundles in the state folder.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np

from mae_deploy.errors import MaeDeployError
from mae_deploy.files import atomic_path, read_json, write_json, write_text
from mae_deploy.models.config import PRESETS
from mae_deploy.runtime.cuda.driver import Gpu, require_gpu
from mae_deploy.runtime.tensorrt.timing_cache import slug
from scripts.gpu_check_report import markdown, report

MODELS = {
    "tiny": "vit_tiny_patch16",
    "small": "vit_small_patch16",
    "base": "vit_base_patch16",
    "large": "vit_large_patch16",
    "huge": "vit_huge_patch14",
}
TOKENS = ("full", "visible")
KINDS = ("tests", "weights", "images", "export", "build", "verify", "speed")

_SIDE = 224
_NUM_IMAGES = 160
"""Images that are made where none are given; calibration needs 128."""

_PROFILES = "B:1,1,1; B:8,8,8; B:32,32,32"
"""One for each batch size that is timed: TensorRT chooses kernels for the usual size."""

_WHY_LINES = 3


# --- the machine -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What steps may need, and why it is not there."""

    gpu: Gpu | None
    versions: dict[str, str]
    """Of gpu, export (PyTorch and what else that needs), pytorch, tensorrt and onnxruntime (which compute on the GPU),
    and pytest; only what is there."""
    lacks: dict[str, str]
    """Why the others are not."""

    @property
    def identity(self) -> dict[str, str]:
        """What a result on the GPU belongs to."""
        return {"gpu": self.gpu.name if self.gpu else "", "tensorrt": self.versions.get("tensorrt", "")}

    def lacking(self, needs: Sequence[str]) -> str | None:
        """Why a step that needs these cannot run here."""
        return next((f"needs {need}: {self.lacks[need]}" for need in needs if need in self.lacks), None)

    def facts(self) -> dict[str, str]:
        """For the report."""
        assert self.gpu is not None
        return {
            "GPU": self.gpu.name,
            "driver": f"CUDA {self.gpu.driver}",
            **{name: self.versions[name] for name in _ON_GPU if name in self.versions},
        }


_PROBES = {
    "export": "import torch, onnx, ml_dtypes, safetensors; print(torch.__version__)",
    "pytest": "import pytest; print(pytest.__version__)",
    "pytorch": "import torch; assert torch.cuda.is_available(), 'torch sees no GPU'; print(torch.__version__)",
    "tensorrt": (
        "from mae_deploy.runtime.cuda.memory import open_memory; from mae_deploy.runtime.tensorrt.api import"
        " load_tensorrt; api = load_tensorrt(); open_memory().close(); print(api.version)"
    ),
    "onnxruntime": (
        "import onnxruntime as o; assert 'CUDAExecutionProvider' in o.get_available_providers(), 'no"
        " CUDAExecutionProvider'; print(o.__version__)"
    ),
}
"""Tried in processes of their own: a library that ends its process takes none of the results along."""

_ON_GPU = ("pytorch", "tensorrt", "onnxruntime")


def survey() -> Machine:
    """Look for the GPU and for every library."""
    versions, lacks = {}, {}
    try:
        gpu = require_gpu()
        versions["gpu"] = gpu.name
    except MaeDeployError as error:
        gpu, lacks["gpu"] = None, str(error)
    for name, code in _PROBES.items():
        if gpu is None and name in _ON_GPU:
            lacks[name] = lacks["gpu"]
            continue
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if done.returncode == 0:
            versions[name] = done.stdout.split()[-1]
        else:
            lacks[name] = _last_line(done.stderr)
    return Machine(gpu=gpu, versions=versions, lacks=lacks)


# --- steps -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the command line says."""

    models: tuple[str, ...]
    precisions: tuple[str, ...]
    checkpoints: dict[str, Path]
    """By model; others get random weights."""
    samples: Path | None
    state: Path
    out: Path
    only: tuple[str, ...]
    typing: str
    repeats: int
    compiled: bool

    def bundle(self, name: str) -> Path:
        """The folder of a bundle."""
        return self.state / "bundles" / name

    def checkpoint(self, model: str) -> Path:
        """The weights of a model."""
        return self.checkpoints.get(model, self.state / "weights" / model)

    @property
    def images(self) -> Path:
        """Images for parity and calibration."""
        return self.samples or self.state / "images"


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One piece of work."""

    name: str
    """`kind`, or `kind/what`."""
    needs: tuple[str, ...]
    """Of `Machine.versions`."""
    after: tuple[str, ...] = ()
    """Steps whose results it uses; it runs again when they have."""
    product: Path | None = None
    """A folder that it makes; where that is there, made elsewhere perhaps, the step is done."""
    run: Callable[[], Outcome]

    @property
    def kind(self) -> str:
        """The part of the name before the slash."""
        return self.name.partition("/")[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What came of a step."""

    status: str
    """done; rejected (INT8 that is not worth it: an answer); failed."""
    result: Any = None
    message: str = ""


def keep_of(model: str) -> int:
    """A quarter of the patches: 49 of 196, 64 of 256."""
    return (_SIDE // PRESETS[MODELS[model]].patch_size) ** 2 // 4


def plan(settings: Settings, machine: Machine) -> list[Step]:
    """Every step, in the order in which they run: model by model, the smallest first."""
    steps = [Step(name="tests", needs=("gpu", "pytest"), run=run_tests)]
    if settings.samples is None:
        steps.append(
            Step(name="images", needs=("export",), product=settings.images, run=partial(make_images, settings.images))
        )
    for model in settings.models:
        steps += _steps_of(model, settings, machine)
    return [step for step in steps if step.kind in settings.only]


def _steps_of(model: str, settings: Settings, machine: Machine) -> list[Step]:
    checkpoint, steps = settings.checkpoint(model), []
    if model not in settings.checkpoints:
        steps.append(
            Step(
                name=f"weights/{model}",
                needs=("export",),
                product=checkpoint,
                run=partial(make_weights, MODELS[model], checkpoint),
            )
        )
    names = [f"{model}-{tokens}-{precision}" for tokens in TOKENS for precision in settings.precisions]
    for name in names:
        bundle = settings.bundle(name)
        command = export_command(name, settings, on_gpu="pytorch" in machine.versions)
        before = (f"weights/{model}", "images")
        steps += [
            Step(
                name=f"export/{name}",
                needs=("export",),
                after=before,
                product=bundle,
                run=partial(run_command, command),
            ),
            Step(
                name=f"build/{name}",
                needs=("gpu", "tensorrt"),
                after=(f"export/{name}",),
                run=partial(run_command, build_command(bundle)),
            ),
            Step(
                name=f"verify/{name}",
                needs=("gpu", "tensorrt"),
                after=(f"build/{name}",),
                run=partial(run_command, verify_command(bundle)),
            ),
        ]
    parts = [part for part in ("pytorch", "tensorrt") if part in machine.versions]
    source, builds = (
        "+".join(parts) or "pytorch+tensorrt",
        tuple(f"build/{name}" for name in names) if "tensorrt" in parts else (),
    )
    needs = ("gpu", *(parts or ["tensorrt"]))
    steps.append(
        Step(
            name=f"speed/{model}/{source}",
            needs=needs,
            after=builds,
            run=partial(run_speed, model, names, parts, settings, machine),
        )
    )
    return steps


def export_command(name: str, settings: Settings, *, on_gpu: bool) -> list[str]:
    """Export a bundle for TensorRT without building its engine."""
    model, tokens, precision = name.split("-")
    command = [
        "mae-deploy",
        "export",
        str(settings.checkpoint(model)),
        "--out",
        str(settings.bundle(name)),
        "--engine",
        "trt",
        "--no-build",
    ]
    command += [
        "--precision",
        precision,
        "--typing",
        settings.typing,
        "--tokens",
        tokens if tokens == "full" else f"visible:{keep_of(model)}",
    ]
    command += [
        "--batch",
        "dynamic",
        "--profile",
        "B:1,8,32",
        "--samples",
        str(settings.images),
        "--device",
        "cuda" if on_gpu else "cpu",
        "--json",
    ]
    if precision in ("int8", "fp8"):
        command += ["--calib-data", str(settings.images), "--calib-images", "128"]
        if model not in settings.checkpoints:  # random weights tell nothing of the accuracy
            command += ["--no-search", "--min-cosine", "0.01", "--min-sqnr", "0"]
    return command


def build_command(bundle: Path) -> list[str]:
    """Build the bundle's engine for the batch sizes that are timed."""
    return ["mae-deploy", "build-engine", str(bundle), "--profile", _PROFILES, "--json"]


def verify_command(bundle: Path) -> list[str]:
    """Compare the engine with PyTorch's outputs."""
    return ["mae-deploy", "verify", str(bundle), "--engine", "tensorrt", "--json"]


# --- what steps do ---------------------------------------------------------------------------------------------------


def run_command(command: Sequence[str]) -> Outcome:
    """Run a command of ours that prints JSON; an INT8 engine that is rejected is an answer and no failure."""
    has_command_line = all(map(util.find_spec, ("typer", "rich")))
    module = "mae_deploy" if has_command_line else "scripts.gpu_check_device"
    done = subprocess.run([sys.executable, "-m", module, *command[1:]], capture_output=True, text=True)
    why = " ".join(line.strip() for line in done.stderr.strip().splitlines()[-_WHY_LINES:])
    if done.returncode == 0:
        return Outcome(status="done", result=json.loads(done.stdout))
    if command[1] == "build-engine" and (rejected := re.search(r"(?:INT8|FP8) is rejected.*", why)):
        return Outcome(status="rejected", message=rejected[0])
    return Outcome(status="failed", message=why or f"exit code {done.returncode}")


def run_tests() -> Outcome:
    """The tests that are marked `gpu`; without PyTorch those beside TensorRT alone."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "gpu",
        "--confcutdir",
        "tests/gpu",
        "tests/gpu",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    summary = _last_line(done.stdout or done.stderr)
    return Outcome(
        status="done" if done.returncode == 0 else "failed",
        result=summary,
        message="" if done.returncode == 0 else summary,
    )


def make_weights(name: str, folder: Path) -> Outcome:
    """A checkpoint of an untrained encoder."""
    import torch

    from mae_deploy.checkpoint import Metadata, save_checkpoint
    from mae_deploy.config import to_dict
    from mae_deploy.images.preprocess import default_preprocess
    from mae_deploy.models.config import EncoderConfig
    from mae_deploy.models.vit import Encoder

    torch.manual_seed(0)
    model = Encoder(EncoderConfig(name=name))
    metadata = Metadata(
        kind="encoder", encoder=to_dict(model.config), preprocess=to_dict(default_preprocess((_SIDE, _SIDE)))
    )
    save_checkpoint(folder, model.state_dict(), metadata)
    return Outcome(status="done")


def make_images(folder: Path) -> Outcome:
    """Images with coarse and fine structure of random colours and contrasts, in place of photographs."""
    from PIL import Image

    rng = np.random.default_rng(0)
    with atomic_path(folder) as aside:
        aside.mkdir(parents=True)
        for index in range(_NUM_IMAGES):
            layers = [_enlarged(rng.normal(0, 1, (side, side, 3)) * rng.uniform(0, 60)) for side in (2, 8, 32, 256)]
            pixels = rng.uniform(60, 200, 3) + sum(layers)
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(aside / f"{index:03}.jpg", quality=92)
    return Outcome(status="done")


def _enlarged(small: Any) -> Any:
    return np.repeat(np.repeat(small, 256 // len(small), 0), 256 // len(small), 1)


def run_speed(model: str, names: Sequence[str], parts: Sequence[str], settings: Settings, machine: Machine) -> Outcome:
    """Time a model in a process of its own."""
    request = {
        "bundles": [str(settings.bundle(name)) for name in names if settings.bundle(name).is_dir()],
        "model": MODELS[model],
        "checkpoint": str(settings.checkpoint(model)) if settings.checkpoint(model).exists() else None,
        "keep": keep_of(model),
        "parts": [*parts, *(["onnxruntime"] if "onnxruntime" in machine.versions else [])],
        "compile": settings.compiled,
        "batches": [1, 8, 32],
        "repeats": settings.repeats,
    }
    file = settings.state / f"speed-{model}.request.json"
    write_json(file, request)
    done = subprocess.run([sys.executable, "-m", "scripts.gpu_check_speed", str(file)], capture_output=True, text=True)
    if done.returncode:
        return Outcome(status="failed", message=_last_line(done.stderr))
    rows = json.loads(done.stdout.splitlines()[-1])
    return Outcome(status="done", result=rows) if rows else Outcome(status="failed", message="nothing could be timed")


def _last_line(text: str) -> str:
    return next(iter(reversed(text.strip().splitlines())), "it says nothing")


# --- the state -------------------------------------------------------------------------------------------------------


class State:
    """A JSON file for each step that has run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "steps"
        self._folder.mkdir(parents=True, exist_ok=True)
        self.records: dict[str, dict[str, Any]] = {
            record["step"]: record for path in sorted(self._folder.glob("*.json")) for record in [read_json(path)]
        }

    def keep(self, step: Step, outcome: Outcome, machine: Machine, seconds: float) -> None:
        """Write what came of a step."""
        record = {
            "step": step.name,
            "status": outcome.status,
            "message": outcome.message,
            "result": outcome.result,
            "on": machine.identity,
            "seconds": round(seconds, 1),
            "finished": datetime.now(timezone.utc).isoformat(),
        }
        write_json(self._folder / f"{step.name.replace('/', '.')}.json", record)
        self.records[step.name] = record

    def is_current(self, step: Step, machine: Machine) -> bool:
        """Whether a step need not run again."""
        if step.product is not None:
            return step.product.exists()
        record = self.records.get(step.name)
        if record is None or record["status"] == "failed" or ("gpu" in step.needs and record["on"] != machine.identity):
            return False
        return all(self.records[name]["finished"] <= record["finished"] for name in step.after if name in self.records)


def why_not(step: Step, steps: Sequence[Step], state: State, machine: Machine) -> str | None:
    """Why a step cannot run now: what the machine lacks, or a step before it that is not done; speed takes whatever is
    there.
    """
    lacking = machine.lacking(step.needs)
    if lacking is not None:
        return lacking
    rejected = [name for name in step.after if state.records.get(name, {}).get("status") == "rejected"]
    if rejected and step.kind == "verify":
        return f"{rejected[0]} was rejected"
    known = {other.name: other for other in steps}
    waiting = [name for name in step.after if name in known and not _is_done(known[name], state, machine)]
    if step.kind == "speed":
        return (
            "no engine is built" if waiting and len(waiting) == len(step.after) and "pytorch" not in step.name else None
        )
    return f"waits for {waiting[0]}" if waiting else None


def _is_done(step: Step, state: State, machine: Machine) -> bool:
    return state.is_current(step, machine) and (
        step.product is not None or state.records[step.name]["status"] == "done"
    )


def run_steps(steps: Sequence[Step], state: State, machine: Machine, say: Callable[[str], None]) -> dict[str, str]:
    """Run what is not done, and return what could not be run, with the reasons."""
    missing = {}
    for step in steps:
        if state.is_current(step, machine):
            continue
        if (why := why_not(step, steps, state, machine)) is not None:
            missing[step.name] = why
            continue
        say(f"{step.name} ...")
        start = time.monotonic()
        try:
            outcome = step.run()
        except (MaeDeployError, OSError, ValueError) as error:
            outcome = Outcome(status="failed", message=str(error))
        seconds = time.monotonic() - start
        state.keep(step, outcome, machine, seconds)
        say(f"{step.name} {outcome.status} in {seconds:.0f} s{': ' if outcome.message else ''}{outcome.message}")
    return missing


# --- the command -----------------------------------------------------------------------------------------------------


def read_settings(arguments: Sequence[str] | None = None) -> Settings:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_check.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models",
        default=",".join(MODELS),
        help="of tiny, small, base, large and huge, separated by commas; default: all",
    )
    parser.add_argument(
        "--precisions", default="fp16,int8", help="of fp32, fp16, bf16, int8 and fp8; default: fp16,int8"
    )
    parser.add_argument(
        "--checkpoint",
        action="append",
        default=[],
        metavar="MODEL=PATH",
        help="trained weights of a model; without, they are random",
    )
    parser.add_argument("--samples", type=Path, help="folder of at least 128 photographs; default: images are made")
    parser.add_argument(
        "--state",
        type=Path,
        default=Path("gpu-check"),
        help="folder of what is done, bundles among it; default: gpu-check",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("docs/results"), help="folder of the report; default: docs/results"
    )
    parser.add_argument("--only", default=",".join(KINDS), help=f"kinds of steps, of {', '.join(KINDS)}; default: all")
    parser.add_argument(
        "--typing",
        choices=("auto", "weak", "strong"),
        default="auto",
        help="of exported graphs; weak for a device with TensorRT 8",
    )
    parser.add_argument("--repeats", type=int, default=100, help="timed rounds; default: 100")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    given = parser.parse_args(arguments)
    models, precisions, only = (_listed(parser, name, getattr(given, name), known) for name, known in _CHOICES.items())
    checkpoints = {name: Path(path) for name, _, path in (text.partition("=") for text in given.checkpoint)}
    for name, path in checkpoints.items():
        if name not in MODELS or not path.exists():
            parser.error(f"--checkpoint {name}={path}: it takes a model, {', '.join(MODELS)}, and a path that is there")
    return Settings(
        models=tuple(model for model in MODELS if model in models),
        precisions=precisions,
        checkpoints=checkpoints,
        samples=given.samples,
        state=given.state,
        out=given.out,
        only=only,
        typing=given.typing,
        repeats=given.repeats,
        compiled=not given.no_compile,
    )


_CHOICES = {"models": tuple(MODELS), "precisions": ("fp32", "fp16", "bf16", "int8", "fp8"), "only": KINDS}


def _listed(parser: argparse.ArgumentParser, name: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    values = tuple(part for part in text.split(",") if part)
    unknown = [value for value in values if value not in known]
    if unknown or not values:
        parser.error(f"--{name} {text}: it takes {', '.join(known)}")
    return values


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where nothing failed, 1 where a step did, 2 for a wrong option, 3 where no step can run on this machine."""
    settings, machine = read_settings(arguments), survey()

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    steps = plan(settings, machine)
    needing_gpu = [step for step in steps if "gpu" in step.needs]
    if all(machine.lacking(step.needs) for step in steps) or (machine.gpu is None and needing_gpu):
        for name, why in machine.lacks.items():
            say(f"no {name}: {why}")
        say("bundles can be made without a GPU: scripts/gpu_check.sh --only images,weights,export")
        return 3
    state = State(settings.state)
    missing = run_steps(steps, state, machine, say)
    for name, why in missing.items():
        say(f"not run: {name}: {why}")
    if machine.gpu is not None:
        random_weights = [model for model in settings.models if model not in settings.checkpoints]
        records = {
            name: record for name, record in state.records.items() if record["on"]["gpu"] in ("", machine.gpu.name)
        }
        found = report(records, missing, machine.facts(), random_weights=random_weights)
        path = settings.out / f"gpu-{slug(machine.gpu.name)}"
        write_json(path.with_suffix(".json"), found)
        write_text(path.with_suffix(".md"), markdown(found))
        say(f"report: {path}.md and .json")
    return int(any(state.records[step.name]["status"] == "failed" for step in steps if step.name in state.records))


if __name__ == "__main__":
    raise SystemExit(main())
