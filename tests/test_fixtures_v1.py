"""What version 0.1.0 wrote, `tests/fixtures/v1/`, is read, run, continued and exported by this one.

Through the public ways in alone, `mae_deploy.cli.main` and `mae_deploy.runtime`, so that modules may move.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from mae_deploy.cli import main
from mae_deploy.images.read import Array
from mae_deploy.runtime import Backbone, Bundle

Command = Callable[..., dict[str, Any]]

FIXTURES = Path(__file__).parent / "fixtures" / "v1"

BUNDLES = sorted(path.name for path in (FIXTURES / "bundles").iterdir())
CHECKPOINTS = sorted(path.name for path in (FIXTURES / "checkpoints").iterdir())
RUNS = ("distill", "finetune", "pretrain")

ON_OPENVINO = {
    *("bands", "external", "full", "pyramid", "ragged", "reconstruct", "uint8", "visible-8"),
    *("fp16", "fp16-half", "fp16-openvino"),
}
"""One of each kind in FP32, and FP16. INT8 misses its parity there on CPUs without VNNI; BF16 depends on the CPU."""

FLOORS = {"fp32": 100, "fp16": 45, "bf16": 35, "int8": 30}
"""dB between an engine's outputs and PyTorch's: the limits of the export, and for FP32 1e-5: sums in another order."""

LOSS_TOLERANCE = 1e-5
"""Relative. Other CPUs have other kernels, which sum in another order: generic ones, those of AVX2, MKL and oneDNN gave
losses that differ by up to 2e-7. A run that forgets its optimiser or draws other masks is off by 9e-4 and more."""

PLAIN = ("--drop-path", 0, "--label-smoothing", 0, "--mixup", 0, "--cutmix", 0, "--reprob", 0, "--auto-augment", "none")
TRAINING = ("--epochs", 1, "--batch-size", 4, "--num-workers", 0, "--device", "cpu")


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the fixtures, so that nothing can be written into them."""
    return Path(shutil.copytree(FIXTURES, tmp_path_factory.mktemp("fixtures") / "v1", symlinks=True))


@pytest.fixture(autouse=True)
def working_folder(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The paths in the fixtures are relative."""
    monkeypatch.chdir(copied)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command that must succeed; returns its JSON."""

    def run(*arguments: object) -> dict[str, Any]:
        capsys.readouterr()
        code = main([*map(str, arguments), "--json"])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        found: dict[str, Any] = json.loads(captured.out)
        return found

    return run


def read_json(path: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    return found


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def assert_holds(found: Any, expected: Any, where: str) -> None:
    """Every value of `expected` is in `found`, which may have more keys: later versions add some."""
    if isinstance(expected, dict):
        assert isinstance(found, dict), where
        for key, value in expected.items():
            assert key in found, f"{where}.{key} is missing"
            assert_holds(found[key], value, f"{where}.{key}")
    else:
        assert found == expected, where


# --- bundles ---------------------------------------------------------------------------------------------------------


def golden_of(bundle: str | Path) -> dict[str, Array]:
    with np.load(Path(bundle) / "golden.npz", allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def outputs_for(bundle: str | Path, engine: str, golden: dict[str, Array]) -> dict[str, Array]:
    """What a bundle computes of golden samples, all of its outputs."""
    images, keep, num_keep = golden["images"], golden.get("ids_keep"), golden.get("num_keep")
    with Backbone.load(bundle, engine, threads=1) as backbone:
        call = backbone.run_cropped if images.dtype == np.uint8 else backbone
        return dict(call(images, keep, num_keep=num_keep))


def assert_close(found: dict[str, Array], golden: dict[str, Array], floor: float) -> None:
    """Each output is that of the golden samples, but for noise."""
    assert found
    for name, array in found.items():
        expected = golden[name].astype(np.float64)
        assert array.shape == expected.shape, name
        noise = np.square(array.astype(np.float64) - expected).sum()
        assert 10 * math.log10(np.square(expected).sum() / max(noise, 1e-300)) > floor, name


def verify(name: str, engine: str, command: Command) -> None:
    found = command("verify", f"bundles/{name}", "--engine", engine, "--threads", 1)
    assert (found["passed"], found["engine"], found["failures"]) == (True, engine, [])


def check_outputs(name: str, engine: str) -> None:
    """A bundle gives the outputs of its golden samples."""
    manifest, golden = read_json(f"bundles/{name}/manifest.json"), golden_of(f"bundles/{name}")
    outputs = outputs_for(f"bundles/{name}", engine, golden)
    assert list(outputs) == [entry["name"] for entry in manifest["graph"]["outputs"]]
    assert_close(outputs, golden, FLOORS[manifest["precision"]])


@pytest.mark.parametrize("name", BUNDLES)
def test_a_bundle_on_onnx_runtime(name: str, command: Command) -> None:
    verify(name, "onnxruntime", command)
    check_outputs(name, "onnxruntime")


@pytest.mark.parametrize("name", sorted(ON_OPENVINO))
def test_a_bundle_on_openvino(name: str, command: Command) -> None:
    pytest.importorskip("openvino")
    verify(name, "openvino", command)
    if name in ("fp16-half", "full"):  # each graph is compiled anew
        check_outputs(name, "openvino")


def test_every_kind_of_bundle_is_here() -> None:
    """In all token modes and precisions of an export on a CPU, with every input and for every engine."""
    manifests = [read_json(f"bundles/{name}/manifest.json") for name in BUNDLES]
    assert set(BUNDLES) >= ON_OPENVINO
    assert {manifest["schema_version"] for manifest in manifests} == {2}
    assert {manifest["token_mode"] for manifest in manifests} == {"full", "visible", "ragged", "reconstruct"}
    assert {manifest["precision"] for manifest in manifests} == set(FLOORS)
    assert {manifest["engine"] for manifest in manifests} == {"onnxruntime", "openvino", "tensorrt"}
    inputs = [entry for manifest in manifests for entry in manifest["graph"]["inputs"]]
    assert {entry["dtype"] for entry in inputs if entry["name"] == "images"} == {"float32", "float16", "uint8"}


def test_what_bundles_say_of_themselves(command: Command) -> None:
    keys = ("kind", "token_mode", "precision", "typing", "engine", "batch", "keep", "profile", "licence", "class_names")
    for name in BUNDLES:
        manifest = read_json(f"bundles/{name}/manifest.json")
        found = command("info", f"bundles/{name}")
        assert found["type"] == "bundle"
        assert_holds(found, {key: manifest[key] for key in keys}, name)
        bundle = Bundle.load(f"bundles/{name}")
        assert (bundle.token_mode, bundle.precision) == (manifest["token_mode"], manifest["precision"])
        assert (bundle.num_patches, bundle.licence) == (manifest["num_patches"], manifest["licence"])
        assert (bundle.fixed_batch, bundle.fixed_keep) == (manifest["batch"], manifest["keep"])
        assert sorted(bundle.golden()) == sorted(golden_of(f"bundles/{name}"))


def test_a_classifier_sees_images(command: Command) -> None:
    """Files are read, resized and cropped as they were: dark and light are told apart."""
    found = command("predict", "bundles/full", "labelled/val", "--top-k", 1, "--threads", 1)
    assert [row["classes"][0]["class"] for row in found["predictions"]] == ["dark"] * 3 + ["light"] * 3
    assert command("eval", "bundles/full", "labelled", "--threads", 1)["top1"] == 100


def test_images_become_the_golden_inputs() -> None:
    """The golden samples of this bundle are the images of a folder: from the files today come the same outputs.

    40 dB, as versions of Pillow may round a pixel otherwise.
    """
    golden, images = golden_of("bundles/full"), []
    for path in sorted(Path("labelled/val").rglob("*.png")):
        with Image.open(path) as image:
            images.append(np.asarray(image))
    with Backbone.load("bundles/full", "onnxruntime", threads=1) as backbone:
        assert_close(dict(backbone(images)), golden, 40)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_what_checkpoints_say_of_themselves(command: Command) -> None:
    for name in CHECKPOINTS:
        metadata = read_json(f"checkpoints/{name}/metadata.json")
        assert metadata.pop("schema_version") == 1
        found = command("info", f"checkpoints/{name}")
        assert found["type"] == "checkpoint"
        assert_holds(found, metadata, name)
        assert command("info", f"checkpoints/{name}/model.safetensors")["kind"] == metadata["kind"]


@pytest.mark.parametrize("name", ["checkpoints/classifier", "checkpoints/linprobe", "runs/finetune"])
def test_a_checkpoint_is_evaluated(name: str, command: Command) -> None:
    found = command("eval", name, "labelled", "--device", "cpu", "--num-workers", 0)
    assert (found["images"], found["top1"]) == (6, 100)


@pytest.mark.parametrize("name", ["checkpoints/mae", "checkpoints/imported", "checkpoints/student", "runs/pretrain"])
def test_a_checkpoint_is_fine_tuned(name: str, tmp_path: Path, command: Command) -> None:
    found = command("finetune", "labelled", "--init", name, "--out", tmp_path / "tuned", *PLAIN, *TRAINING)
    assert found["steps"] == 3
    parent = command("info", tmp_path / "tuned")["provenance"]["parent"]
    assert parent["stage"] == command("info", name)["provenance"]["stage"]


def test_checkpoints_teach(tmp_path: Path, command: Command) -> None:
    student = ("--student", "vit_nano_patch4", "--student-width", 8, "--student-depth", 1, "--student-heads", 2)
    for teacher, data in (("mae", "images"), ("classifier", "labelled")):
        arguments = ("--teacher", f"checkpoints/{teacher}", "--out", tmp_path / teacher, "--patch-size", 5)
        assert command("distill", data, *arguments, *student, *TRAINING)["steps"] > 0


def test_a_checkpoint_is_what_another_run_predicts(tmp_path: Path, command: Command) -> None:
    more = ("--recipe", "tiny.yaml", "--target", "features", "--teacher", "checkpoints/mae")
    assert command("pretrain", "images", *more, "--out", tmp_path / "new", *TRAINING)["steps"] == 2


@pytest.mark.parametrize(
    ("checkpoint", "images", "bands"), [("runs/pretrain", "images", "0"), ("checkpoints/bands", "scenes", "3,2,1")]
)
def test_a_checkpoint_draws(checkpoint: str, images: str, bands: str, tmp_path: Path, command: Command) -> None:
    arguments = (
        "--checkpoint",
        checkpoint,
        "--out",
        tmp_path / "grid.png",
        "--picture-bands",
        bands,
        "--device",
        "cpu",
    )
    assert command("reconstruct", images, *arguments, "--num-images", 2)["images"] == 2
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.mode == ("L" if bands == "0" else "RGB")


SIZES = ("--profile", "B:1,8,32 K:8,9,10")

AGAIN: dict[str, tuple[str, tuple[object, ...]]] = {
    "bands": ("bands", ("--tokens", "visible", "--outputs", "cls,tokens,feature_map")),
    "full": ("classifier", ()),
    "ragged": ("student", ("--tokens", "ragged", "--layers", 0, *SIZES)),
    "reconstruct": ("mae", ("--tokens", "reconstruct", "--pixels", "image", *SIZES)),
    "resized": ("classifier", ("--image-size", "30,10", "--one-std")),
    "visible-8": ("imported", ("--tokens", "visible:8", "--batch", 1)),
}
"""Bundles with the checkpoint and the options that gave them."""


@pytest.mark.parametrize("name", AGAIN)
def test_a_checkpoint_is_exported_again(name: str, tmp_path: Path, command: Command) -> None:
    """The new bundle gives the old one's golden outputs, says the same of the checkpoint, and inherits the licence."""
    checkpoint, options = AGAIN[name]
    samples = "scenes" if checkpoint == "bands" else "images"
    made = command(
        *("export", f"checkpoints/{checkpoint}", "--out", tmp_path / "again", *options),
        *("--samples", samples, "--num-samples", 4, "--threads", 1),
    )
    before, now = read_json(f"bundles/{name}/manifest.json"), read_json(tmp_path / "again/manifest.json")
    assert made["licence"] == before["licence"]
    for key in ("kind", "model", "token_mode", "num_patches", "batch", "keep", "profile", "precision", "preprocess"):
        assert_holds(now[key], before[key], key)
    assert_holds(now["provenance"]["checkpoint"], before["provenance"]["checkpoint"], "checkpoint")
    golden = golden_of(f"bundles/{name}")
    assert_close(outputs_for(tmp_path / "again", "onnxruntime", golden), golden, FLOORS["fp32"])


def test_a_run_is_exported(tmp_path: Path, command: Command) -> None:
    for run in RUNS:
        made = command("export", f"runs/{run}", "--out", tmp_path / run, "--num-samples", 4, "--threads", 1)
        own = "labelled/val" if run == "finetune" else "images"
        assert made["samples"] == f"4 images of {own}"


# --- runs ------------------------------------------------------------------------------------------------------------


def test_what_runs_say_of_themselves(command: Command) -> None:
    for name in RUNS:
        found = command("info", f"runs/{name}")
        assert (found["type"], found["provenance"]["stage"], found["licence"]) == ("run", name, "own")
        assert found["environment"]["mae_deploy"] == "0.1.0"


@pytest.mark.parametrize("by", ["command", "config"])
@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_resumed(
    name: str, by: str, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    """With the options that it was started with, or with its own settings as a recipe.

    The losses are those of the unbroken run, and each step is there once.
    """
    monkeypatch.chdir(shutil.copytree(copied, tmp_path / "v1", symlinks=True, ignore=shutil.ignore_patterns("bundles")))
    run = Path("runs") / name
    stopped = read_lines(run / "metrics.jsonl")
    saved = int(read_json(run / "checkpoints/last/metadata.json")["step"])
    expected = read_json("runs/unbroken.json")[name]
    assert saved < len(expected["metrics"])
    typed = read_json(run / "environment.json")["command"][1:]
    command(*(typed if by == "command" else [name, "--recipe", run / "config.yaml"]), "--resume")

    lines = read_lines(run / "metrics.jsonl")
    assert lines[:saved] == stopped[:saved], "what was done before is not done again"
    assert [line["step"] for line in lines] == [line["step"] for line in expected["metrics"]]
    for line, whole in zip(lines, expected["metrics"], strict=True):
        assert line["epoch"] == whole["epoch"]
        assert line["lr"] == pytest.approx(whole["lr"], rel=1e-9), "float64's rounding"
        assert line["loss"] == pytest.approx(whole["loss"], rel=LOSS_TOLERANCE)
    if name == "finetune":  # with the moving average of the weights
        for line, whole in zip(read_lines(run / "eval.jsonl"), expected["eval"], strict=True):
            assert (line["step"], line["top1"]) == (whole["step"], whole["top1"])
            assert line["val_loss"] == pytest.approx(whole["val_loss"], rel=LOSS_TOLERANCE)
    assert read_json(run / "checkpoints/last/metadata.json")["step"] == len(lines)
    assert (run / "checkpoints/last").is_symlink()


def test_the_runs_were_stopped_in_both_ways() -> None:
    """One after a step that no checkpoint has seen, one by a signal, whose checkpoint lies within an epoch."""
    steps = {run: int(read_json(f"runs/{run}/checkpoints/last/metadata.json")["step"]) for run in RUNS}
    assert steps == {"distill": 2, "finetune": 3, "pretrain": 4}
    measured = {run: len(read_lines(Path("runs") / run / "metrics.jsonl")) for run in RUNS}
    assert measured == {"distill": 3, "finetune": 3, "pretrain": 5}


# --- recipes and shards ----------------------------------------------------------------------------------------------


def check_recipe(stage: str, path: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A recipe is read, and each setting that it had keeps its name, its place and its value."""
    assert main([stage, "--recipe", path, "--dump-config", "-"]) == 0
    found = yaml.safe_load(capsys.readouterr().out)
    assert_holds(found, yaml.safe_load(Path(path).read_text(encoding="utf-8")), path)


def test_recipes_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    for path in sorted(Path("recipes").iterdir()):
        check_recipe(path.stem.partition("-")[0], str(path), capsys)


def test_the_settings_of_runs_and_bundles_are_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run keeps those that it was started with, a manifest those of its export."""
    for name in RUNS:
        check_recipe(name, f"runs/{name}/config.yaml", capsys)
    for name in BUNDLES:
        settings = read_json(f"bundles/{name}/manifest.json")["provenance"]["export"]
        (tmp_path / "export.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        check_recipe("export", str(tmp_path / "export.yaml"), capsys)


def test_shards_are_read(tmp_path: Path, command: Command) -> None:
    found = command("data", "stats", "shards")
    files = command("data", "stats", "images")
    keys = ("images", "read", "mean", "std", "unreadable")
    assert {key: found[key] for key in keys} == {key: files[key] for key in keys}
    assert command("pretrain", "shards", "--recipe", "tiny.yaml", "--out", tmp_path / "new", *TRAINING)["steps"] == 2
