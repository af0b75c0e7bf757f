"""Encoders side by side: read from the command line, judged by the same probes, timm's own arithmetic for timm's
models.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data import resolve_data_config

from mae_deploy.cli import main
from mae_deploy.data.sources.open import labelled_images
from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.evaluation.compare import read_entries
from mae_deploy.evaluation.config import FeaturesConfig
from mae_deploy.evaluation.features import extract
from mae_deploy.evaluation.timm_features import TimmFeatures
from tests.export.tiny_exports import write_checkpoint
from tests.models.tiny_models import random_tensor, tiny_encoder


@pytest.fixture(scope="module")
def timm_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of timm's smallest ViT, with a head for eleven classes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("timm") / "weights.safetensors"
    save_file(timm.create_model("test_vit", pretrained=False, num_classes=11).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder of random numbers, 20 wide: enough to tell dark from light."""
    return write_checkpoint(tmp_path_factory.mktemp("pretrained") / "checkpoint", tiny_encoder(), licence="own")


# --- the command line ------------------------------------------------------------------------------------------------


def test_entries(tmp_path: Path) -> None:
    run, odd = tmp_path / "runs" / "mae", tmp_path / "a=b@c"
    run.mkdir(parents=True)
    odd.mkdir()
    entries = read_entries(
        (str(run), f"other={run}", f"dino={run}@vit_small_patch14_dinov2", str(odd), "random", "chance=random")
    )
    assert [(entry.name, entry.path, entry.architecture, entry.kind) for entry in entries] == [
        ("mae", run, None, "checkpoint"),
        ("other", run, None, "checkpoint"),
        ("dino", run, "vit_small_patch14_dinov2", "timm"),
        ("a=b@c", odd, None, "checkpoint"),
        ("random", None, None, "random"),
        ("chance", None, None, "random"),
    ]


def test_entries_that_mean_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs encoders"):
        read_entries(())
    with pytest.raises(ConfigError, match="no encoder at missing"):
        read_entries(("a=missing",))
    with pytest.raises(ConfigError, match="two encoders are called 'a'"):
        read_entries((f"a={tmp_path}", "a=random"))
    with pytest.raises(ConfigError, match="names no architecture"):
        read_entries((f"a={tmp_path}@",))


# --- comparing -------------------------------------------------------------------------------------------------------


def compare(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    assert main(["compare", *map(str, arguments), "--num-workers", "0", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_ours_random_and_timm_on_the_same_probes(
    classes: Path, pretrained: Path, timm_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report"
    encoders = (f"mae={pretrained}", f"vit={timm_weights}@test_vit", "random")
    found = compare(
        capsys,
        *encoders,
        "--data",
        classes,
        "--k",
        "1,3",
        "--linear",
        "ridge",
        "--seeds",
        "0,4",
        "--seed",
        "1",
        "--out",
        out,
    )
    assert [(row["name"], row["kind"]) for row in found["encoders"]] == [
        ("mae", "checkpoint"),
        ("vit", "timm"),
        ("random", "random"),
    ]
    assert (found["train_images"], found["val_images"], found["classes"], found["seeds"]) == (12, 6, 2, [1, 5])
    for row in found["encoders"]:
        # Anything tells dark from light.
        assert (row["knn1_top1"], row["knn3_top1"], row["linear_top1"], row["linear_top5"]) == (100.0,) * 4
        assert row["linear_top1_by_seed"] == [100.0, 100.0]
        assert row["images_per_second"] > 0
    mae, vit, chance = found["encoders"]
    assert (mae["dim"], mae["parameters"]) == (chance["dim"], chance["parameters"]) == (20, chance["parameters"])
    assert vit["parameters"] == sum(
        parameter.numel() for parameter in timm.create_model("test_vit", num_classes=0).parameters()
    )
    assert json.loads((out / "compare.json").read_text())["encoders"] == found["encoders"]
    page = (out / "compare.md").read_text()
    assert "| vit | timm test_vit at 160x160, cls | 0.31 | 64 | 100.00 | 100.00 |" in page
    assert f"--data {classes}" in page
    assert (out / "compare.png").read_bytes()[:4] == b"\x89PNG"
    assert main(["compare", *encoders, "--data", str(classes), "--out", str(out)]) == 2  # never overwritten


def test_random_weights_are_drawn_for_each_seed(
    classes: Path, pretrained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    from mae_deploy.evaluation import compare as module

    def watched(config: Any, train: Any, val: Any, num_classes: int, seed: int) -> dict[str, float]:
        seen.append(val.features)
        return {"linear_top1": float(seed), **{f"knn{k}_top1": 0.0 for k in config.k}}

    monkeypatch.setattr(module, "probe", watched)
    found = compare(capsys, pretrained, "random", "--data", classes, "--seeds", "0,1")
    own, chance = (seen[index : index + 2] for index in (0, 2))
    assert torch.equal(own[0], own[1])
    assert not torch.equal(chance[0], chance[1])
    row = found["encoders"][1]
    assert (row["linear_top1"], row["linear_top1_range"], row["linear_top1_by_seed"]) == (0.5, [0.0, 1.0], [0.0, 1.0])


def test_what_cannot_be_opened_is_said_first(
    classes: Path,
    pretrained: Path,
    timm_weights: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mae_deploy.evaluation.compare.extract", lambda *_, **__: pytest.fail("work was done"))
    assert main(["compare", str(pretrained), f"vit={timm_weights}@test_vitt", "--data", str(classes)]) == 2
    assert "has no model 'test_vitt'" in capsys.readouterr().err


def test_random_needs_a_network(classes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "random", "--data", str(classes)]) == 2
    assert "random has no network" in capsys.readouterr().err


# --- timm ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["cls", "avg"])
def test_timm_features_are_timms(classes: Path, timm_weights: Path, pool: str) -> None:
    config = FeaturesConfig(pool=pool, num_workers=0)  # type: ignore[arg-type]
    source = TimmFeatures(timm_weights, "test_vit", config, "cpu")
    model: Any = timm.create_model("test_vit", pretrained=False, num_classes=11).eval()
    model.load_state_dict(load_file(timm_weights))
    images = random_tensor(2, 3, 160, 160)
    with torch.no_grad():
        tokens = model.forward_features(images)
        found = source._pooled(images)
    assert torch.equal(found, tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(dim=1))
    assert extract(source, labelled_images(classes, "val"), config).features.shape == (6, 64)
    # timm's own preprocessing.
    wanted = resolve_data_config({}, model=model)
    assert (source.spec.mean, source.spec.crop_pct, source.spec.interpolation) == (
        wanted["mean"],
        wanted["crop_pct"],
        wanted["interpolation"],
    )


def test_another_size_of_a_timm_model(timm_weights: Path) -> None:
    source = TimmFeatures(timm_weights, "test_vit", FeaturesConfig(image_size=(64, 96)), "cpu")
    assert source.spec.image_size == (64, 96)
    assert source(torch.zeros(1, 3, 64, 96, dtype=torch.uint8)).shape == (1, 64)


def test_timm_weights_must_fit(timm_weights: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no model 'test_vitt'"):
        TimmFeatures(timm_weights, "test_vitt", FeaturesConfig(), "cpu")
    with pytest.raises(CheckFailed, match="missing"):
        TimmFeatures(timm_weights, "test_resnet", FeaturesConfig(), "cpu")
    tensors = timm.create_model("test_vit", pretrained=False).state_dict()
    more, less = tmp_path / "more.safetensors", tmp_path / "less.safetensors"
    save_file({**tensors, "blocks.0.extra": torch.zeros(3)}, more)
    save_file({name: tensor for name, tensor in tensors.items() if name != "blocks.0.norm1.bias"}, less)
    for path, what in ((more, "unexpected: blocks.0.extra"), (less, "missing: blocks.0.norm1.bias")):
        with pytest.raises(CheckFailed, match=what):
            TimmFeatures(path, "test_vit", FeaturesConfig(), "cpu")
    # timm itself would resample patch embeddings of another size.
    save_file({**tensors, "patch_embed.proj.weight": torch.zeros(64, 3, 8, 8)}, more)
    with pytest.raises(CheckFailed, match=r"patch_embed.proj.weight has the shape \(64, 3, 8, 8\)"):
        TimmFeatures(more, "test_vit", FeaturesConfig(), "cpu")


def test_a_network_without_tokens(tmp_path: Path) -> None:
    model: Any = timm.create_model("test_resnet", pretrained=False).eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    source = TimmFeatures(tmp_path / "weights.safetensors", "test_resnet", FeaturesConfig(), "cpu")
    images = random_tensor(1, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(source._pooled(images), model.forward_head(model.forward_features(images), pre_logits=True))
    with pytest.raises(ConfigError, match="--pool cls"):
        TimmFeatures(tmp_path / "weights.safetensors", "test_resnet", FeaturesConfig(pool="cls"), "cpu")
