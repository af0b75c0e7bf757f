"""`mae-deploy search` as it is typed: neighbours, what to clean, tables that `data pack` takes, and pictures."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mae_deploy.cli import main
from mae_deploy.embedding.pictures import CELL
from mae_deploy.embedding.vectors import Vectors
from mae_deploy.images.read import read_image
from mae_deploy.runtime import Backbone
from tests.data.image_folders import write_noise
from tests.runtime.tiny_bundle import D, write_bundle
from tests.runtime.video.tiny_video import write_video


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`photos` with 43 images, of which `copy-N.png` repeat N; `bundle`; `features` of them."""
    root = tmp_path_factory.mktemp("search")
    write_noise(root / "photos", 40)
    for number in (3, 5, 7):
        shutil.copyfile(root / "photos" / f"{number:02d}.png", root / "photos" / f"copy-{number}.png")
    write_bundle(root / "bundle", outputs=("cls", "tokens", "pooled"))
    assert main(["embed", str(root / "photos"), str(root / "bundle"), "--out", str(root / "features")]) == 0
    return root


def search(capsys: pytest.CaptureFixture[str], *arguments: str | Path | int | float) -> dict[str, Any]:
    """The result of a command that succeeds."""
    assert main(["search", *map(str, arguments), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def colours(path: Path) -> int:
    """How many there are in a picture."""
    with Image.open(path) as picture:
        return len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0))


def test_an_image_of_the_collection_is_its_own_neighbour(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = root / "photos" / "11.png"
    found = search(capsys, root / "features", "--image", image, "--k", 9, "--out", tmp_path / "out")
    assert (found["images"], found["output"], found["method"]) == (43, "pooled", "exact")
    first, *others = found["neighbours"]
    assert (first["rank"], first["id"], first["key"]) == (1, 11, str(image))
    assert first["cosine"] == pytest.approx(1, abs=1e-4)  # batches of other sizes, in float32
    assert [row["cosine"] for row in others] == sorted((row["cosine"] for row in others), reverse=True)
    assert len(others) == 8
    with Image.open(tmp_path / "out" / "neighbours.png") as picture:
        assert picture.width > 8 * CELL
        assert picture.height > 2 * CELL
    assert colours(tmp_path / "out" / "neighbours.png") > 500  # of 6 x 14 pixels of noise each
    assert "data:image/png;base64," in (tmp_path / "out" / "neighbours.html").read_text()
    assert main(["search", str(root / "features"), "--image", str(image), "--out", str(tmp_path / "out")]) == 2


def test_vectors_are_whitened(root: Path) -> None:
    found = Vectors.read(root / "features", "cls")
    assert found.rows.shape == (43, D)
    np.testing.assert_allclose(np.linalg.norm(found.rows, axis=1), 1, rtol=1e-5)
    with Backbone.load(root / "bundle") as backbone:
        features = backbone([read_image(Path(found.keys[7]))]).cls
    np.testing.assert_allclose(found.whitened(features)[0], found.rows[7], atol=1e-4)  # of batches of other sizes


def test_duplicates_are_left_out_by_pack(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = search(capsys, root / "features", "--duplicates", "--out", tmp_path / "out", "--threshold", 0.999)
    pairs = {(Path(row["key"]).name, Path(row["like_key"]).name) for row in found["duplicates"]}
    assert pairs == {(f"copy-{number}.png", f"{number:02d}.png") for number in (3, 5, 7)}
    table = tmp_path / "out" / "duplicates.csv"
    with table.open(newline="") as file:
        assert {row["key"] for row in csv.DictReader(file)} == {row["key"] for row in found["duplicates"]}
    assert colours(tmp_path / "out" / "duplicates.png") > 150
    call = ["data", "pack", str(root / "photos"), str(tmp_path / "packed"), "--drop-like", str(table), "--json"]
    assert main(call) == 0
    packed = json.loads(capsys.readouterr().out)
    assert (packed["images"], packed["dropped"]) == (40, 3)
    write_noise(tmp_path / "others", 2)
    call[2:4] = [str(tmp_path / "others"), str(tmp_path / "none")]
    assert main(call) == 2
    assert "none of its 3 images is in" in capsys.readouterr().err
    table.write_text("name\na\n")
    assert main(call) == 2
    assert "has no column 'key'" in capsys.readouterr().err


def test_outliers(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = search(capsys, root / "features", "--outliers", "--count", 5, "--out", tmp_path / "out")
    with (tmp_path / "out" / "outliers.csv").open(newline="") as file:
        assert [len(found["outliers"]), len(list(csv.DictReader(file)))] == [5, 5]
    distances = [row["distance"] for row in found["outliers"]]
    assert distances == sorted(distances, reverse=True)


def test_the_recall_of_an_index_is_said(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("usearch", reason="usearch is in the extra [search]")
    image = root / "photos" / "11.png"
    assert main(["search", str(root / "features"), "--image", str(image), "--method", "approximate", "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["method"] == "approximate"
    assert 0.9 < found["recall"] <= 1  # of 43 rows, nearly all of which an index links
    assert "recall: " in captured.err
    assert found["neighbours"][0]["id"] == 11


def test_what_cannot_be_searched(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: str | Path, code: int = 2) -> str:
        assert main(["search", *map(str, arguments)]) == code
        return capsys.readouterr().err

    assert "nothing to search for" in refused(root / "features")
    assert "no features in" in refused(tmp_path, "--outliers")
    assert "no vectors 'tokens'" in refused(root / "features", "--outliers", "--output", "tokens")
    other = write_bundle(tmp_path / "other", outputs=("cls", "tokens", "pooled"), weights_seed=1)
    image = root / "photos" / "11.png"
    said = refused(root / "features", "--image", image, "--bundle", other, code=1)
    assert "is not the bundle that computed the features" in said
    (tmp_path / "bad.png").write_bytes(b"")
    assert "bad.png: the file is empty" in refused(root / "features", "--image", tmp_path / "bad.png", code=1)


def test_pictures_need_the_collection(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_noise(tmp_path / "photos", 6)
    assert main(["embed", str(tmp_path / "photos"), str(root / "bundle"), "--out", str(tmp_path / "features")]) == 0
    (tmp_path / "photos").rename(tmp_path / "moved")
    capsys.readouterr()
    call = ["search", str(tmp_path / "features"), "--outliers"]
    assert main([*call, "--out", str(tmp_path / "a")]) == 0
    assert "no pictures:" in capsys.readouterr().err
    assert not (tmp_path / "a" / "outliers.png").exists()
    assert main([*call, "--out", str(tmp_path / "b"), "--data", str(tmp_path / "moved")]) == 0
    assert colours(tmp_path / "b" / "outliers.png") > 300


def test_frames_are_shown(root: Path, tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", [np.full((24, 32, 3), 30 * number, np.uint8) for number in range(8)])
    call = ["embed", str(tmp_path / "clip.mp4"), str(root / "bundle"), "--out", str(tmp_path / "features")]
    assert main([*call, "--every", "2"]) == 0
    assert main(["search", str(tmp_path / "features"), "--outliers", "--out", str(tmp_path / "out")]) == 0
    with Image.open(tmp_path / "out" / "outliers.png") as picture:
        grey = np.bincount(np.asarray(picture.convert("L")).reshape(-1), minlength=256)
    # Frames 0, 2, 4 and 6, each a large square of its own grey; a codec changes it by a few levels.
    assert all(grey[max(0, level - 6) : level + 7].sum() >= CELL * CELL // 3 for level in (0, 60, 120, 180))


def test_what_is_written_is_there_as_a_whole_or_not_at_all(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> str:
        raise OSError(28, "No space left on device")

    call = ["search", str(root / "features"), "--outliers", "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr("mae_deploy.commands.search.run.as_html", fails)  # the table is written before the page
        assert main(call) == 1
    assert capsys.readouterr().err.endswith(f"error: {tmp_path / 'out'}: No space left on device\n")
    assert list(tmp_path.iterdir()) == []
    assert main(call) == 0


def test_names_that_are_not_utf8(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = tmp_path / os.fsdecode(b"\xff")
    write_noise(odd / "photos", 6)
    assert main(["embed", str(odd / "photos"), str(root / "bundle"), "--out", str(odd / "features")]) == 0
    call = ["search", str(odd / "features"), "--outliers", "--k", "2"]
    assert main([*call, "--image", str(odd / "photos" / "03.png"), "--out", str(odd / "out")]) == 0
    assert {path.suffix for path in (odd / "out").iterdir()} == {".csv", ".html", ".png"}
    assert main([*call, "--method", "approximate"]) == 2
    assert "whose name is not UTF-8" in capsys.readouterr().err
