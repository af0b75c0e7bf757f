"""Bundles for streams in `benchmark`, `info` and `predict`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mae_deploy.cli import main
from mae_deploy.runtime.flops import flops_per_image
from tests.data.image_folders import write_noise
from tests.export.tiny_exports import write_checkpoint
from tests.models.tiny_models import ENCODER, tiny_encoder

N = ENCODER.num_patches


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`cached`, `fixed` (K = 4) and `full`."""
    root = tmp_path_factory.mktemp("streams")
    checkpoint = write_checkpoint(root / "checkpoint", tiny_encoder(), licence="own")
    for name, tokens in {"cached": "cached", "fixed": "cached:4", "full": "full"}.items():
        assert main(["export", str(checkpoint), "--out", str(root / name), "--tokens", tokens]) == 0
    return root


def test_an_update_is_timed(bundles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_noise(tmp_path / "photos", 3)
    paths = [str(bundles / name) for name in ("full", "cached", "fixed")]
    options = ["--keep", f"4,{N}", "--repeats", "2", "--warmup", "1", "--images", str(tmp_path / "photos")]
    capsys.readouterr()
    assert main(["benchmark", *paths, *options, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["tokens"], row["patches"]) for row in rows] == [
        ("full", N),
        ("cached", 4),
        ("cached", N),
        ("cached", 4),
    ]
    assert all(row["p50_ms"] > 0 and row["peak_mib"] > 0 for row in rows)
    cosines = [row["cosine"] for row in rows]
    assert cosines[2] == pytest.approx(cosines[0], abs=1e-6)
    assert cosines[1] == pytest.approx(cosines[3], abs=1e-6) != pytest.approx(1, abs=1e-6)


def test_attention_to_the_whole_frame_is_counted(bundles: Path) -> None:
    manifest = json.loads((bundles / "cached" / "manifest.json").read_text())
    D, T, S = ENCODER.width, 5, 1 + N
    attention = 2 * T * (S - T) * D * ENCODER.blocks
    visible: Any = {**manifest, "token_mode": "visible"}
    few = flops_per_image(visible, 4)
    assert few is not None
    assert flops_per_image(manifest, 4) == few + 2 * attention


def test_info_says_what_a_stream_remembers(bundles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["info", str(bundles / "cached")]) == 0
    assert "keys and values in float32, 6.33 kB a stream with its tokens" in " ".join(capsys.readouterr().out.split())


def test_images_are_predicted_as_first_frames(
    bundles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_noise(tmp_path / "photos", 3)
    photos = str(tmp_path / "photos")
    assert main(["predict", str(bundles / "cached"), photos, "--out", str(tmp_path / "features.npz")]) == 0
    capsys.readouterr()
    assert main(["predict", str(bundles / "cached"), photos, "--keep", "4"]) == 2
    assert "without earlier frames has to be given all" in capsys.readouterr().err
    assert main(["predict", str(bundles / "fixed"), photos]) == 2
