"""`mae-deploy search` as it is typed: neighbours, what to clean, tables that `data pack` takes, and pictures."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
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


def table_of(shard: Path) -> Any:
    """With all of the file's words."""
    words = {key: value for key, value in pq.read_metadata(shard).metadata.items() if key != b"ARROW:schema"}
    return pq.read_table(shard).replace_schema_metadata(words)


def rewritten(table: Any, name: str, values: Any) -> Any:
    """A column in place of another."""
    place = table.schema.get_field_index(name)
    return table.set_column(place, name, values).replace_schema_metadata(table.schema.metadata)


def said(table: Any, **words: bytes) -> Any:
    return table.replace_schema_metadata({**table.schema.metadata, **{k.encode(): v for k, v in words.items()}})


HOSTILE: dict[str, tuple[Any, str]] = {
    "no keys": (lambda table: table.drop_columns(["key"]), "has the columns"),
    "ids of text": (lambda table: rewritten(table, "id", pa.array(["x"] * len(table))), "has the columns"),
    "ids that are absent": (lambda table: rewritten(table, "id", pa.nulls(len(table), pa.int64())), "without an id"),
    "keys of numbers": (lambda table: rewritten(table, "key", pa.array([1] * len(table))), "has the columns"),
    "features of text": (lambda table: rewritten(table, "pooled", pa.array(["x"] * len(table))), "no vectors 'pooled'"),
    "features of any length": (lambda table: rewritten(table, "pooled", pa.array([[1.0]] * len(table))), "no vectors"),
    "features that are absent": (
        lambda table: rewritten(table, "pooled", pa.nulls(len(table), pa.list_(pa.float32(), D))),
        "without an id, a key or features",
    ),
    "features of NaN": (
        lambda table: rewritten(table, "pooled", pa.array([[np.nan] * D] * len(table), pa.list_(pa.float32(), D))),
        "infinite or no numbers",
    ),
    "features of no width": (
        lambda table: rewritten(table, "pooled", pa.array([[]] * len(table), pa.list_(pa.float32(), 0))),
        "no vectors",
    ),
    "words that are no JSON": (lambda table: said(table, mae_deploy=b"{"), "says in no JSON"),
    "words that are deep": (lambda table: said(table, mae_deploy=b"[" * 50_000 + b"]" * 50_000), "says in no JSON"),
    "words that are a list": (lambda table: said(table, mae_deploy=b"[1]"), "says no 'folder'"),
    "a folder that is a number": (lambda table: said(table, mae_deploy=b'{"folder": 5}'), "says no 'folder'"),
    "a job that is a list": (
        lambda table: said(table, mae_deploy=b'{"folder": "", "bundle": {"path": "", "preprocess": {}}, "job": []}'),
        "says no 'job.bundle'",
    ),
    "a part that is a number": (lambda table: said(table, mae_deploy_shard=b"5"), "which part"),
    "no words": (lambda table: table.replace_schema_metadata({}), "does not say what"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_tables_that_are_no_features(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    change, message = HOSTILE[name]
    folder = Path(shutil.copytree(root / "features", tmp_path / "features"))
    (shard,) = [path for path in folder.glob("*.parquet") if "unreadable" not in path.name]
    pq.write_table(change(table_of(shard)), shard)
    assert main(["search", str(folder), "--duplicates", "--output", "pooled"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "MAE_DEPLOY_DEBUG" not in said


def test_features_cut_off_or_longer_than_the_file(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(root / "features", tmp_path / "features"))
    (shard,) = [path for path in folder.glob("*.parquet") if "unreadable" not in path.name]
    content = shard.read_bytes()
    table = table_of(shard)
    wide = pa.array([[0.0] * 100_000] * len(table), pa.list_(pa.float32(), 100_000))
    pq.write_table(rewritten(table, "pooled", wide), shard, compression="zstd")
    assert main(["search", str(folder), "--duplicates", "--output", "pooled"]) == 2
    assert "tells of 4300000 numbers and has" in capsys.readouterr().err
    shard.write_bytes(content[:4] + bytes(len(content) // 2) + content[4 + len(content) // 2 :])
    assert main(["search", str(folder), "--duplicates", "--output", "pooled"]) == 2
    assert "cannot read" in capsys.readouterr().err
