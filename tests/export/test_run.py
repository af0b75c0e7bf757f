"""`mae-deploy export` leaves a bundle that says what it is and proves it, or nothing at all."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from mae_deploy import __version__
from mae_deploy.checkpoint import Metadata
from mae_deploy.cli import main
from mae_deploy.config import to_dict
from mae_deploy.export import job
from mae_deploy.export import run as export
from mae_deploy.export.graph import builder as onnx_builder
from mae_deploy.export.graph.builder import GraphBuilder
from mae_deploy.export.graph.encoder import build_graph
from mae_deploy.export.graph.spec import GraphSpec
from mae_deploy.export.reference import Reference
from mae_deploy.images.find import find_images
from mae_deploy.images.preprocess import default_preprocess
from mae_deploy.images.read import Array, read_image
from mae_deploy.models.config import BEYOND_PLAIN, EncoderConfig
from mae_deploy.models.position import interpolate_position_embedding
from mae_deploy.models.vit import Classifier, Encoder
from mae_deploy.runtime import Backbone, Bundle
from mae_deploy.runtime.check_manifest import validate_manifest
from mae_deploy.runtime.engines.base import EngineOptions
from mae_deploy.runtime.parity.trials import trials
from mae_deploy.runtime.verify import verify_bundle
from tests.data.image_folders import spoil
from tests.export.tiny_exports import CLASS_NAMES, open_session, read_graph, write_checkpoint
from tests.models.tiny_models import CLASSES, ENCODER, fill, tiny_classifier, tiny_encoder, tiny_mae, write_original
from tests.reporting.printed import cells

LINEAGE = {
    "stage": "distill",
    "teacher": {"stage": "finetune", "parent": {"stage": "import", "source": "mae_pretrain_vit_base.pth"}},
    "parent": {"stage": "distill", "objective": "features"},
}


def classifier(folder: Path, **metadata: Any) -> Path:
    """A student that was distilled from a fine-tuned teacher of imported weights."""
    common: dict[str, Any] = {
        "licence": "own",
        "provenance": LINEAGE,
        "class_names": CLASS_NAMES,
        "metrics": {"top1": 0.75},
    }
    return write_checkpoint(folder, tiny_classifier("avg"), **{**common, **metadata})


def encoder(folder: Path, **metadata: Any) -> Path:
    return write_checkpoint(folder, tiny_encoder(), **{"licence": "own", **metadata})


def run(checkpoint: Path, out: Path, *arguments: str | Path) -> int:
    return main(["export", str(checkpoint), "--out", str(out), *map(str, arguments)])


def manifest_of(bundle: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((bundle / "manifest.json").read_text())
    return found


def given(config: Any) -> dict[str, Any]:
    """What a manifest holds of a config: what is not set is left out."""
    return {name: value for name, value in to_dict(config).items() if value is not None}


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- the bundle ------------------------------------------------------------------------------------------------------


def test_the_bundle(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, out = classifier(tmp_path / "checkpoint"), tmp_path / "deep" / "bundle"
    assert (
        run(
            checkpoint,
            out,
            "--tokens",
            "visible:4",
            "--batch",
            "2",
            "--samples",
            photos,
            "--num-samples",
            "9",
            "--json",
        )
        == 0
    )
    result = json.loads(capsys.readouterr().out)
    manifest = manifest_of(out)
    assert validate_manifest(manifest) == manifest
    assert left_in(out) == {"README.md", "manifest.json", "encoder.onnx", "golden.npz"}
    assert left_in(out.parent) == {"bundle"}
    assert (manifest["mae_deploy_version"], manifest["kind"], manifest["precision"], manifest["engines"]) == (
        __version__,
        "classifier",
        "fp32",
        [],
    )
    assert abs(datetime.now(timezone.utc) - datetime.fromisoformat(manifest["created"])).total_seconds() < 60
    assert manifest["model"] == {key: value for key, value in given(ENCODER).items() if key not in BEYOND_PLAIN}
    assert (manifest["token_mode"], manifest["num_patches"], manifest["batch"], manifest["keep"]) == (
        "visible",
        15,
        2,
        4,
    )
    assert manifest["profile"] == {"B": [2, 2, 2], "K": [4, 4, 4]}
    assert (manifest["schema_version"], manifest["typing"], manifest["engine"], manifest["quantization"]) == (
        2,
        "weak",
        "onnxruntime",
        None,
    )
    expected = given(default_preprocess((6, 10)))
    assert manifest["preprocess"] == {name: value for name, value in expected.items() if name != "crop_mode"}
    assert manifest["class_names"] == list(CLASS_NAMES)
    assert manifest["tolerance"] == {"cosine": 0.99999, "max_abs": 1e-4, "max_relative": 1e-5}
    graph = read_graph(out / "encoder.onnx").graph
    assert manifest["graph"] == {
        "file": "encoder.onnx",
        "opset": 17,
        "inputs": [
            {"name": "images", "dtype": "float32", "shape": [2, 3, 6, 10]},
            {"name": "ids_keep", "dtype": "int64", "shape": [2, 4]},
        ],
        "outputs": [
            {"name": "logits", "dtype": "float32", "shape": [2, CLASSES]},
            {"name": "pooled", "dtype": "float32", "shape": [2, 20]},
        ],
        "blocks": ["blocks.0/mlp_residual", "blocks.1/mlp_residual"],
    }
    assert [entry.name for entry in [*graph.input, *graph.output]] == ["images", "ids_keep", "logits", "pooled"]
    assert set(manifest["files"]) == {"encoder.onnx", "golden.npz"}
    for name, entry in manifest["files"].items():
        content = (out / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    assert manifest["golden"] == {"file": "golden.npz", "source": f"9 images of {photos}", "num_samples": 8}
    assert result == {
        "out": str(out),
        "tokens": "visible:4",
        "precision": "fp32",
        "typing": "weak",
        "engine": "onnxruntime",
        "parity": manifest["parity"]["onnx-fp32"]["outputs"],
        "samples": f"9 images of {photos}",
        "licence": "own",
        "files": {name: entry["size"] for name, entry in manifest["files"].items()},
    }


SIZES = {"logits": CLASSES, "pooled": 20}


@pytest.mark.parametrize("tokens", ["visible:2", "ragged:2", "reconstruct:4", "cached:4"])
def test_where_k_is_fixed_every_patch_is_given(tmp_path: Path, photos: Path, tokens: str) -> None:
    model = tiny_mae() if "reconstruct" in tokens else tiny_encoder()
    checkpoint = write_checkpoint(tmp_path / "checkpoint", model)
    assert run(checkpoint, tmp_path / "bundle", "--samples", photos, "--tokens", tokens, "--images", "uint8") == 0
    bundle = Bundle.load(tmp_path / "bundle")
    every, extremes = trials(bundle)
    assert (every.name, extremes.name) == ("every patch", "black, white, noise")
    assert {*every.inputs["ids_keep"].ravel().tolist()} == {*range(15)}
    pixels = extremes.inputs["patches" if "cached" in tokens else "images"]
    assert (pixels[0].min(), pixels[1].max()) == (0, 255)


def test_golden_samples_are_the_users_images_and_pytorchs_outputs(tmp_path: Path, photos: Path) -> None:
    assert (
        run(classifier(tmp_path / "checkpoint"), tmp_path / "bundle", "--tokens", "visible", "--samples", photos) == 0
    )
    with np.load(tmp_path / "bundle" / "golden.npz", allow_pickle=False) as archive:
        golden = {name: archive[name] for name in archive.files}
    del golden["exported"]
    assert {name: (array.shape, array.dtype.name) for name, array in golden.items()} == {
        **{f"K={K}/ids_keep": ((2, K), "int64") for K in (1, 15)},
        **{f"K={K}/{name}": ((2, size), "float32") for K in (1, 15) for name, size in SIZES.items()},
        **{f"black, white, noise/{name}": ((3, size), "float32") for name, size in SIZES.items()},
        "black, white, noise/images": ((3, 3, 6, 10), "float32"),
        "black, white, noise/ids_keep": ((3, 3), "int64"),
        "images": ((8, 3, 6, 10), "float32"),
        "ids_keep": ((8, 3), "int64"),
        "logits": ((8, CLASSES), "float32"),
        "pooled": ((8, 20), "float32"),
        "blocks": ((2, 2, 4, 20), "float32"),
        "frame": ((9, 21, 3), "uint8"),
        "frame_image": ((3, 6, 10), "float32"),
    }
    spec = default_preprocess((6, 10))
    np.testing.assert_array_equal(golden["frame_image"], spec([golden["frame"]])[0])
    np.testing.assert_array_equal(golden["images"], spec([read_image(path) for path in find_images(photos)[:8]]))
    assert len({tuple(row) for row in golden["ids_keep"].tolist()}) > 1
    with torch.no_grad():
        logits = tiny_classifier("avg")(torch.from_numpy(golden["images"]), torch.from_numpy(golden["ids_keep"]))
    # The same operations on a batch of the same size.
    np.testing.assert_allclose(golden["logits"], logits.numpy(), rtol=0, atol=1e-6)
    with torch.no_grad():
        tokens = tiny_classifier("avg").embed(
            torch.from_numpy(golden["images"][:2]), torch.from_numpy(golden["ids_keep"][:2])
        )
        for index, block in enumerate(tiny_classifier("avg").blocks):
            tokens = block(tokens)
            np.testing.assert_allclose(golden["blocks"][:, index], tokens.numpy(), rtol=0, atol=1e-5)


def test_the_record_of_parity(tmp_path: Path, photos: Path) -> None:
    assert run(encoder(tmp_path / "checkpoint"), tmp_path / "bundle", "--tokens", "visible", "--samples", photos) == 0
    parity = manifest_of(tmp_path / "bundle")["parity"]
    assert list(parity) == ["onnx-fp32"]
    record = parity["onnx-fp32"]
    assert (record["passed"], record["num_samples"], record["engine"], record["failures"]) == (
        True,
        11,
        "onnxruntime",
        [],
    )
    assert [row["name"] for row in record["outputs"]] == ["cls", "tokens", "pooled"]
    # Three orders of magnitude inside the gate: float32's own noise.
    assert all(row["cosine"] > 0.999999 and row["max_abs"] < 1e-5 and row["sqnr_db"] > 100 for row in record["outputs"])
    assert {row["check"] for row in record["invariances"]} >= {"run again", "permuted ids_keep", "sample alone"}
    assert {row["check"] for row in record["trials"]} == {"K=1", "K=15", "black, white, noise"}
    assert record["golden_db"].keys() == {
        f"{trial}{output}"
        for trial in ("", "K=1: ", "K=15: ", "black, white, noise: ")
        for output in ("cls", "tokens", "pooled")
    }
    assert all(row["passed"] for row in record["invariances"])


def test_the_chain_of_records(tmp_path: Path, photos: Path) -> None:
    checkpoint = classifier(tmp_path / "checkpoint")
    assert run(checkpoint, tmp_path / "bundle", "--samples", photos, "--seed", "3") == 0
    provenance = manifest_of(tmp_path / "bundle")["provenance"]
    assert provenance["checkpoint"] == {
        "path": str(checkpoint),
        "sha256": hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest(),
        "kind": "classifier",
        "metrics": {"top1": 0.75},
        **LINEAGE,
    }
    assert (provenance["export"]["tokens"], provenance["export"]["seed"], provenance["export"]["samples"]) == (
        "full",
        3,
        str(photos),
    )


@pytest.mark.parametrize(
    ("licence", "said"),
    [
        ("own", ""),
        ("MIT", ""),
        (
            "CC-BY-NC-4.0",
            "licence: CC-BY-NC-4.0: these weights derive from a non-commercial release, and so does this bundle\n",
        ),
        (
            "MIT AND CC-BY-NC-4.0",
            (
                "licence: MIT AND CC-BY-NC-4.0: these weights derive from a non-commercial release, and so does this"
                " bundle\n"
            ),
        ),
        (
            "unspecified",
            (
                "licence: unspecified: pass --license to 'mae-deploy import' to record what these weights may be used"
                " for\n"
            ),
        ),
    ],
)
def test_the_licence_goes_into_the_bundle_and_is_said_aloud(
    tmp_path: Path, photos: Path, licence: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        run(encoder(tmp_path / "checkpoint", licence=licence), tmp_path / "bundle", "--samples", photos, "--json") == 0
    )
    captured = capsys.readouterr()
    assert "".join(line for line in captured.err.splitlines(keepends=True) if line.startswith("licence")) == said
    assert json.loads(captured.out)["licence"] == licence
    assert Bundle.load(tmp_path / "bundle").licence == licence


def test_for_people(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a[/x]"
    assert run(encoder(tmp_path / "checkpoint"), out, "--samples", photos) == 0
    captured = capsys.readouterr()
    # The title is broken to the width of the terminal.
    assert "".join(
        f"{out}: full tokens, fp32 on onnxruntime, parity with PyTorch on 11 images of {photos}".split()
    ) in "".join(captured.out.split())
    assert [row[0] for row in cells(captured.out)] == ["cls", "tokens", "pooled"]
    assert "checked" in captured.err


# --- what can be exported --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", ["dynamic", "5"])
@pytest.mark.parametrize("tokens", ["full", "visible", "visible:7"])
@pytest.mark.parametrize("kind", ["encoder", "mae", "avg", "cls"])
def test_every_kind_passes_and_runs(tmp_path: Path, photos: Path, kind: str, tokens: str, batch: str) -> None:
    models: dict[str, Callable[[], Encoder]] = {
        "encoder": tiny_encoder,
        "mae": tiny_mae,
        "avg": lambda: tiny_classifier("avg"),
        "cls": lambda: tiny_classifier("cls"),
    }
    checkpoint = write_checkpoint(tmp_path / "checkpoint", models[kind]())
    assert run(checkpoint, tmp_path / "bundle", "--tokens", tokens, "--batch", batch, "--samples", photos) == 0
    bundle = Bundle.load(tmp_path / "bundle")
    assert verify_bundle(bundle, options=EngineOptions(threads=1)).passed
    assert bundle.manifest["kind"] == ("classifier" if kind in ("avg", "cls") else "encoder")
    with Backbone.load(tmp_path / "bundle", threads=1) as backbone:
        found = backbone(np.zeros((3, 17, 13, 3), np.uint8), keep=None if tokens == "full" else [3, 1, 4, 0, 9, 2, 6])
    assert {len(array) for array in found.values()} == {3}
    assert ("logits" in found) == (kind in ("avg", "cls"))


def test_chosen_outputs(tmp_path: Path, photos: Path) -> None:
    assert (
        run(classifier(tmp_path / "checkpoint"), tmp_path / "bundle", "--samples", photos, "--outputs", "pooled") == 0
    )
    bundle = Bundle.load(tmp_path / "bundle")
    assert bundle.output_names == ("pooled",)
    extremes = {f"black, white, noise/{name}" for name in ("images", "pooled")}
    assert set(bundle.golden()) == {"images", "pooled", "blocks", "frame", "frame_image", "exported", *extremes}
    assert [row["name"] for row in manifest_of(tmp_path / "bundle")["parity"]["onnx-fp32"]["outputs"]] == ["pooled"]


def test_another_image_size_interpolates_the_positions(tmp_path: Path, photos: Path) -> None:
    model = tiny_mae()
    checkpoint = write_checkpoint(tmp_path / "checkpoint", model)
    assert run(checkpoint, tmp_path / "bundle", "--samples", photos, "--image-size", "14,8") == 0
    bundle = Bundle.load(tmp_path / "bundle")
    assert (bundle.model["image_size"], bundle.num_patches, bundle.preprocess.image_size) == ([14, 8], 28, (14, 8))
    larger = Encoder(EncoderConfig(**{**to_dict(ENCODER), "image_size": (14, 8)})).eval()
    tensors = {name: model.state_dict()[name] for name in larger.state_dict()}
    larger.load_state_dict(
        {**tensors, "pos_embed": interpolate_position_embedding(tensors["pos_embed"], (3, 5), (7, 4))}
    )
    golden = {name: values.copy() for name, values in bundle.golden().items()}  # torch warns of read-only arrays
    with torch.no_grad():
        expected = larger(torch.from_numpy(golden["images"]))
    # The same operations on a batch of the same size.
    np.testing.assert_allclose(golden["cls"], expected[:, 0].numpy(), rtol=0, atol=1e-6)
    assert verify_bundle(bundle, options=EngineOptions(threads=1)).passed


def test_a_crop_mode_goes_into_the_bundle_its_samples_and_its_record(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = {"provenance": {"stage": "import", "preprocess_from": "guessed"}}
    checkpoint = classifier(tmp_path / "checkpoint", **told)
    bundles = {}
    for name, options in {"as it is": [], "squash": ["--crop-mode", "squash"]}.items():
        arguments = ["--samples", str(photos), "--num-samples", "4", *options]
        assert main(["export", str(checkpoint), "--out", str(tmp_path / name), *arguments]) == 0
        bundles[name] = Bundle.load(tmp_path / name)
    said = capsys.readouterr().err
    assert "preprocessing: guessed. Predictions depend on it" in said
    assert "preprocessing: crop mode squash by export, center in the checkpoint" in said
    manifest = bundles["as it is"].manifest
    assert "crop_mode" not in manifest["preprocess"]  # which older versions read
    assert manifest["provenance"]["preprocess_from"] == "guessed"
    squash = bundles["squash"]
    assert (squash.preprocess.crop_mode, squash.preprocess.crop_pct) == ("squash", 1.0)
    changed = "guessed; crop mode squash by export, center in the checkpoint"
    assert squash.manifest["provenance"]["preprocess_from"] == changed
    first = read_image(find_images(photos)[0])
    np.testing.assert_allclose(squash.golden()["images"][:1], squash.preprocess([first]), atol=1e-6)
    assert np.abs(squash.golden()["images"] - bundles["as it is"].golden()["images"]).max() > 0.1


def test_the_same_image_size_changes_nothing(tmp_path: Path, photos: Path) -> None:
    checkpoint = encoder(tmp_path / "checkpoint")
    assert run(checkpoint, tmp_path / "one", "--samples", photos) == 0
    assert run(checkpoint, tmp_path / "two", "--samples", photos, "--image-size", "6,10") == 0
    assert (tmp_path / "one" / "encoder.onnx").read_bytes() == (tmp_path / "two" / "encoder.onnx").read_bytes()


def test_a_weights_file_of_the_original(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = fill(Classifier(EncoderConfig(name="vit_nano_patch4", image_size=(12, 12)), num_classes=CLASSES))
    source = write_original(tmp_path / "mae_finetuned_vit_base.pth", model.state_dict())
    assert run(source, tmp_path / "bundle", "--samples", photos) == 0
    assert "non-commercial" in capsys.readouterr().err
    bundle = Bundle.load(tmp_path / "bundle")
    assert (bundle.licence, bundle.output_names, bundle.class_names) == ("CC-BY-NC-4.0", ("logits", "pooled"), None)
    assert bundle.manifest["provenance"]["checkpoint"]["source"] == "mae_finetuned_vit_base.pth"


def test_large_weights_go_to_a_file_of_their_own(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_builder, "INLINE_LIMIT", 1)
    assert run(encoder(tmp_path / "checkpoint"), tmp_path / "bundle", "--samples", photos) == 0
    written = {"README.md", "manifest.json", "encoder.onnx", "encoder.onnx.data", "golden.npz"}
    assert left_in(tmp_path / "bundle") == written
    manifest = manifest_of(tmp_path / "bundle")
    content = (tmp_path / "bundle" / "encoder.onnx.data").read_bytes()
    assert manifest["files"]["encoder.onnx.data"] == {
        "sha256": hashlib.sha256(content).hexdigest(),
        "size": len(content),
    }
    (tmp_path / "bundle").rename(tmp_path / "moved")
    assert verify_bundle(Bundle.load(tmp_path / "moved"), options=EngineOptions(threads=1)).passed
    open_session(tmp_path / "moved" / "encoder.onnx")


def test_seeds_choose_the_visible_patches(tmp_path: Path, photos: Path) -> None:
    checkpoint, chosen = encoder(tmp_path / "checkpoint"), []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert run(checkpoint, tmp_path / name, "--tokens", "visible:4", "--samples", photos, "--seed", seed) == 0
        chosen.append(Bundle.load(tmp_path / name).golden()["ids_keep"])
    np.testing.assert_array_equal(chosen[0], chosen[1])
    assert (chosen[0] != chosen[2]).any()


# --- samples ---------------------------------------------------------------------------------------------------------


def test_broken_samples_are_named_and_left_out(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(photos / "04.png")
    (photos / "05.png").write_bytes(b"")
    assert run(encoder(tmp_path / "checkpoint"), tmp_path / "bundle", "--samples", photos) == 0
    err = capsys.readouterr().err
    assert f"skipped {photos / '04.png'}: " in err
    assert f"skipped {photos / '05.png'}: the file is empty\n" in err
    manifest = manifest_of(tmp_path / "bundle")
    assert manifest["golden"]["source"] == f"9 images of {photos}"
    assert manifest["parity"]["onnx-fp32"]["num_samples"] == 9


def test_the_data_of_the_checkpoint_is_the_default(tmp_path: Path, photos: Path) -> None:
    checkpoint = encoder(tmp_path / "checkpoint", provenance={"stage": "pretrain", "config": {"data": str(photos)}})
    assert run(checkpoint, tmp_path / "bundle") == 0
    assert manifest_of(tmp_path / "bundle")["golden"]["source"] == f"11 images of {photos}"


def test_without_images_synthetic_ones_are_said_aloud_and_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(encoder(tmp_path / "checkpoint"), tmp_path / "bundle", "--json", "--num-samples", "3") == 0
    captured = capsys.readouterr()
    assert captured.err.startswith(
        "no images at hand: parity is checked on synthetic ones; pass --samples FOLDER for real ones\n"
    )
    source = "3 synthetic images with a 1/f spectrum"
    assert json.loads(captured.out)["samples"] == source
    assert manifest_of(tmp_path / "bundle")["golden"] == {"file": "golden.npz", "source": source, "num_samples": 3}


# --- nothing is left behind ------------------------------------------------------------------------------------------

Tensors = dict[str, Tensor]


def without_scale(tensors: Tensors) -> Tensors:
    """As if the graph forgot to divide q by the root of the head dim, 2."""
    factor = torch.ones(60, 1)
    factor[:20] = 2
    qkv = {
        name: tensor * (factor if tensor.ndim == 2 else factor[:, 0])
        for name, tensor in tensors.items()
        if ".qkv." in name
    }
    return {**tensors, **qkv}


FLAWS: dict[str, Callable[[Tensors], Tensors]] = {
    "scale": without_scale,
    "positions": lambda tensors: {**tensors, "pos_embed": tensors["pos_embed"].roll(1, dims=1)},
    "pixels": lambda tensors: {
        **tensors,
        "patch_embed.proj.weight": tensors["patch_embed.proj.weight"].transpose(2, 3),
    },
    "channels": lambda tensors: {**tensors, "patch_embed.proj.weight": tensors["patch_embed.proj.weight"].flip(1)},
    "one weight by 0.01": lambda tensors: {**tensors, "norm.bias": tensors["norm.bias"] + 0.01 * torch.eye(20)[7]},
}


@pytest.mark.parametrize("tokens", ["full", "visible"])
@pytest.mark.parametrize("flaw", FLAWS)
def test_a_wrong_graph_is_1_and_leaves_nothing(
    tmp_path: Path,
    photos: Path,
    flaw: str,
    tokens: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def flawed(metadata: Metadata, tensors: Tensors, spec: GraphSpec) -> GraphBuilder:
        return build_graph(metadata, FLAWS[flaw](tensors), spec)

    checkpoint, place = encoder(tmp_path / "checkpoint"), tmp_path / "place"
    place.mkdir()
    monkeypatch.setattr(job, "build_graph", flawed)
    assert run(checkpoint, place / "bundle", "--samples", photos, "--tokens", tokens, "--json") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    error, hint = captured.err.splitlines()[-2:]
    assert error.startswith("error: the exported fp32 graph misses parity with PyTorch: cls: ")
    assert re.findall("(cls|tokens|pooled): ", error) == ["cls", "tokens", "pooled"]  # of each the first miss
    assert hint.startswith("hint: nothing was written; ")
    assert left_in(place) == set()


def test_every_sample_is_judged_not_the_golden_ones_alone(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def off_in_the_tenth(reference: Reference, *arguments: Any) -> dict[str, Array]:
        expected = outputs(reference, *arguments)
        expected["pooled"][9:10, 3] += 1e-3
        return expected

    outputs = Reference.outputs
    checkpoint = encoder(tmp_path / "checkpoint")
    monkeypatch.setattr(Reference, "outputs", off_in_the_tenth)
    assert run(checkpoint, tmp_path / "place" / "bundle", "--samples", photos) == 1
    assert (
        "misses parity with PyTorch: pooled: max_abs 0.001 is above 0.0001 and max_relative " in capsys.readouterr().err
    )
    assert left_in(tmp_path / "place") == set()


@pytest.mark.parametrize("tokens", ["visible", "ragged"])
@pytest.mark.parametrize("wrong_at", [1, 15])
def test_a_dynamic_k_is_judged_at_both_its_ends(
    tmp_path: Path,
    photos: Path,
    wrong_at: int,
    tokens: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    outputs = Reference.outputs

    def off_at_one_end(reference: Reference, inputs: dict[str, Array], names: tuple[str, ...]) -> dict[str, Array]:
        expected = outputs(reference, inputs, names)
        if len(inputs["images"]) == 2 and inputs["ids_keep"].shape[1] == wrong_at:
            expected["pooled"][0, 3] += 1e-3
        return expected

    checkpoint = encoder(tmp_path / "checkpoint")
    monkeypatch.setattr(Reference, "outputs", off_at_one_end)
    assert run(checkpoint, tmp_path / "place" / "bundle", "--samples", photos, "--tokens", tokens) == 1
    assert (
        f"misses parity with PyTorch: K={wrong_at}: pooled: max_abs 0.001 is above 0.0001 and max_relative "
        in capsys.readouterr().err
    )


def refuse(*_: Any, **__: Any) -> None:
    raise onnx.checker.ValidationError("Bad node spec\nfor node 3")


def break_off(path: Path, weights: dict[str, Any]) -> None:
    path.write_bytes(b"half of the weights")
    raise OSError(28, "No space left on device")


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("place", "name", "failure", "code", "said"),
    [
        (
            onnx.checker,
            "check_model",
            refuse,
            1,
            "error: the exported graph is not valid ONNX: Bad node spec for node 3",
        ),
        (onnx_builder, "_write_external", break_off, 1, ": No space left on device"),
        (export, "check_parity", interrupt, 130, ""),
        (Reference, "blocks", interrupt, 130, ""),
    ],
    ids=["checker", "disk", "interrupted while it is proven", "interrupted while it is written"],
)
def test_a_failure_on_the_way_leaves_nothing(
    tmp_path: Path,
    photos: Path,
    place: Any,
    name: str,
    failure: Callable[..., None],
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint, out = encoder(tmp_path / "checkpoint"), tmp_path / "place" / "bundle"
    monkeypatch.setattr(onnx_builder, "INLINE_LIMIT", 1)
    monkeypatch.setattr(place, name, failure)
    assert run(checkpoint, out, "--samples", photos) == code
    assert said in capsys.readouterr().err
    assert left_in(out.parent) == set()


def test_what_is_there_is_not_overwritten(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, out = encoder(tmp_path / "checkpoint"), tmp_path / "bundle"
    out.mkdir()
    (out / "mine").write_text("kept")
    assert run(checkpoint, out, "--samples", photos) == 2
    assert (
        capsys.readouterr().err
        == f"error: --out {out} already exists\nhint: choose another --out, or remove it first\n"
    )
    assert left_in(out) == {"mine"}
    (out / "mine").unlink()
    assert run(checkpoint, out, "--samples", photos) == 0, "an empty folder holds nothing to lose"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tokens", "visible:0"], "--tokens 'visible:0' is not full, visible, ragged, reconstruct or cached"),
        (["--tokens", "visible:9999"], "K 9999 is more than the 15 patches of this model"),
        (["--tokens", "ragged:16"], "K 16 is more than the 15 patches of this model"),
        (["--tokens", "bogus"], "--tokens 'bogus' is not full, visible, ragged, reconstruct or cached"),
        (["--tokens", "reconstruct"], "--tokens reconstruct needs a decoder, and this checkpoint is of kind encoder"),
        (["--batch", "0"], "--batch '0' is not a whole number of at least 1, or dynamic"),
        (["--outputs", "bogus"], "this model has no output 'bogus' with --tokens full"),
        (["--outputs", "cls,cls"], "--outputs cls,cls must name each once"),
        (["--outputs", "logits"], "this model has no output 'logits' with --tokens full"),
        (["--outputs", "pixels"], "this model has no output 'pixels' with --tokens full"),
        (["--outputs", "p2"], "this model has no output 'p2' with --tokens full"),
        (
            ["--tokens", "cached", "--pyramid", "random"],
            "--tokens cached gives no p2, which is of the whole frame: it has the recomputed patches",
        ),
        (
            ["--tokens", "cached:3", "--outputs", "feature_map"],
            "--tokens cached:3 gives no feature_map, which is of the whole frame: it has the recomputed patches",
        ),
        (["--layers", "2"], "this model has no output 'block_2' with --tokens full"),
        (["--layers", "1,1"], "--layers 1,1 must name each once"),
        (["--layers", "-1"], "each of --layers must be at least 0, got -1"),
        (["--pyramid", "nowhere.pth"], "no pyramid weights at nowhere.pth"),
        (["--image-size", "7,10"], "--image-size 7,10 is not a multiple of the patch size, 2"),
        (["--samples", "nowhere"], "no such file or folder: nowhere"),
        (["--num-samples", "0"], "--num-samples must be at least 1, got 0"),
        (["--threads", "0"], "--threads must be at least 1 and at most 4096, got 0"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--images", "float16"], "--images float16 needs --precision fp16, not fp32"),
        (
            ["--features", "float16", "--precision", "bf16"],
            "--features float16 needs --precision fp16, not bf16",
        ),
        (["--pixels", "image"], "--pixels image needs --tokens reconstruct, not full"),
        (["--profile", "B:8,1,32"], "--profile 'B:8,1,32' is not min,opt,max"),
        (["--profile", "K:1,2,3"], "--profile 'K:1,2,3': a graph of all patches has no K"),
        (["--profile", "B:1,2,3", "--batch", "2"], "--profile 'B:1,2,3' gives a range for B, which is fixed to 2"),
        (
            ["--profile", "K:1,2,3", "--tokens", "visible:2"],
            "--profile 'K:1,2,3' gives a range for K, which is fixed to 2",
        ),
        (["--profile", "K:1,2,16", "--tokens", "visible"], "K 16 is more than the 15 patches of this model"),
        (["--fp32-ops", "gelu"], "--fp32-ops gelu: with --precision fp32 --typing weak these are FP32 already"),
        (
            ["--precision", "bf16", "--typing", "strong"],
            "--precision bf16 --typing strong: ONNX Runtime has no BF16 arithmetic on the CPU",
        ),
        (["--max-drop", "1"], "--max-drop 1.0 with --precision fp32"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_2_with_one_line(
    tmp_path: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, out = encoder(tmp_path / "checkpoint"), tmp_path / "place" / "bundle"
    out.parent.mkdir()
    assert run(checkpoint, out, *arguments) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert lines[0] == f"error: {said}"
    assert all(line.startswith("hint: ") for line in lines[1:])
    assert len(lines) <= 2
    assert captured.out == ""
    assert left_in(out.parent) == set()


def test_a_checkpoint_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "nowhere", tmp_path / "bundle") == 2
    assert capsys.readouterr().err.startswith(f"error: no weights at {tmp_path / 'nowhere'}")
    assert left_in(tmp_path) == set()


def test_no_such_device(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    checkpoint, out = encoder(tmp_path / "checkpoint"), tmp_path / "place" / "bundle"
    out.parent.mkdir()
    assert run(checkpoint, out, "--samples", photos, "--device", "cuda") == 3
    assert "error: --device cuda, but torch sees no CUDA device\n" in capsys.readouterr().err
    assert left_in(out.parent) == set()
    assert run(checkpoint, out, "--samples", photos, "--device", "auto") == 0
