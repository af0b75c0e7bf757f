"""`mae-deploy predict` as it is typed: classes on the terminal, features in a file, and no hour of work lost at its
end.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mae_deploy.cli import main
from mae_deploy.images.find import find_images
from mae_deploy.images.read import Array, read_image
from mae_deploy.runtime import Backbone, Features
from mae_deploy.runtime.predict import top_k
from tests.data.image_folders import spoil
from tests.export.tiny_exports import CLASS_NAMES
from tests.reporting.printed import cells
from tests.runtime.tiny_bundle import write_bundle
from tests.test_cli import TRAINING, run_without


def predict(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    """The result of a command that succeeds."""
    assert main(["predict", *map(str, arguments), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def arrays_of(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


# --- classes ---------------------------------------------------------------------------------------------------------


def test_top_classes_in_json(exported: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = predict(capsys, exported / "classifier", photos, "--top-k", "3")
    paths = find_images(photos)
    logits = Backbone.load(exported / "classifier")([read_image(path) for path in paths]).logits
    expected = top_k(logits, CLASS_NAMES, 3)
    assert {key: found[key] for key in ("images", "unreadable", "outputs", "out")} == {
        "images": 5,
        "unreadable": [],
        "outputs": {"logits": [5, 11]},
        "out": None,
    }
    assert [row["path"] for row in found["predictions"]] == [str(path) for path in paths]
    for row, classes in zip(found["predictions"], expected, strict=True):
        assert [entry["class"] for entry in row["classes"]] == [name for name, _ in classes]
        # Probabilities are rounded to six digits.
        assert [entry["probability"] for entry in row["classes"]] == pytest.approx(
            [share for _, share in classes], abs=1e-6
        )


def test_top_classes_for_people(
    exported: Path, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["predict", str(exported / "classifier"), str(photos), "--top-k", "2"]) == 0
    captured = capsys.readouterr()
    rows = cells(captured.out)
    assert [row[0] for row in rows] == [str(path) for path in find_images(photos)]
    assert rows[-1][0].endswith("/a[/x].png")
    for _, first_class, second_class in rows:
        (first, share), (second, less) = first_class.split(), second_class.split()
        assert {first, second} < set(CLASS_NAMES)
        assert float(share.rstrip("%")) >= float(less.rstrip("%"))
    assert "skipped" not in captured.err


def test_one_image_and_five_classes_by_default(
    exported: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = predict(capsys, exported / "classifier", photos / "02.png")
    assert [row["path"] for row in found["predictions"]] == [str(photos / "02.png")]
    assert len(found["predictions"][0]["classes"]) == 5


def test_images_by_name_pattern_and_list(
    exported: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = predict(capsys, exported / "classifier", photos)["predictions"]
    assert predict(capsys, exported / "classifier", *find_images(photos, say=False))["predictions"] == whole
    assert predict(capsys, exported / "classifier", photos / "0*.png")["predictions"] == whole[:4]
    (tmp_path / "list.txt").write_text("".join(f"{row['path']}\n" for row in reversed(whole)))
    named = predict(capsys, exported / "classifier", f"@{tmp_path / 'list.txt'}")["predictions"]
    assert [row["path"] for row in named] == [row["path"] for row in reversed(whole)]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(os.fsencode(photos))))
    assert predict(capsys, exported / "classifier", "-")["predictions"] == whole


def test_the_batch_size_does_not_matter(exported: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, single = (
        predict(capsys, exported / "classifier", photos, "--batch-size", size)["predictions"] for size in ("5", "2")
    )
    for one, other in zip(whole, single, strict=True):
        assert one["path"] == other["path"]
        shares = ([entry["probability"] for entry in row["classes"]] for row in (one, other))
        # Sums in another order, rounded to six digits.
        assert next(shares) == pytest.approx(next(shares), abs=2e-6)


# --- features --------------------------------------------------------------------------------------------------------


def test_an_encoder_without_out_gives_shapes_and_leaves_the_tokens_where_they_are(
    exported: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = predict(capsys, exported / "encoder", photos)
    assert found == {"images": 5, "unreadable": [], "outputs": {"cls": [5, 20], "pooled": [5, 20]}, "out": None}
    assert main(["predict", str(exported / "encoder"), str(photos)]) == 0
    assert "outputs  cls 5,20, pooled 5,20\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("outputs", "fetched"),
    [
        (("tokens", "block_0", "cls", "feature_map", "pixels"), {"cls": [5, 13]}),
        (("pixels",), {"pixels": [5, 21, 12]}),
        (("feature_map", "tokens"), {"feature_map": [5, 13, 3, 7]}),
    ],
)
def test_large_outputs_are_neither_fetched_nor_kept_where_nothing_is_written(
    tmp_path: Path,
    photos: Path,
    outputs: tuple[str, ...],
    fetched: dict[str, list[int]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle = write_bundle(tmp_path / "bundle", token_mode="reconstruct", outputs=outputs)
    asked: list[tuple[str, ...]] = []
    start = Backbone.start_cropped

    def spy(backbone: Backbone, pixels: Array, keep: Any, *, outputs: tuple[str, ...]) -> Callable[[], Features]:
        asked.append(outputs)
        return start(backbone, pixels, keep, outputs=outputs)

    monkeypatch.setattr(Backbone, "start_cropped", spy)
    assert predict(capsys, bundle, photos, "--num-keep", "4")["outputs"] == fetched
    assert asked == [tuple(fetched)]


def test_npz(exported: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "features.npz"
    found = predict(capsys, exported / "encoder", photos, "--out", out, "--outputs", "cls,tokens,pooled")
    assert (found["out"], found["outputs"]) == (str(out), {"cls": [5, 20], "tokens": [5, 15, 20], "pooled": [5, 20]})
    stored = arrays_of(out)
    assert stored["paths"].tolist() == [str(path) for path in find_images(photos)]
    expected = Backbone.load(exported / "encoder")([read_image(path) for path in find_images(photos)])
    assert set(stored) == {"paths", *expected}
    for name, array in expected.items():
        # The same session on a batch of the same size.
        np.testing.assert_allclose(stored[name], array, rtol=0, atol=1e-6)
    assert [path.name for path in out.parent.iterdir()] == ["features.npz"]


def test_vectors_are_written_and_the_size_is_said(
    exported: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(exported / "encoder"), str(photos), "--out", str(tmp_path / "f.npz")]) == 0
    assert set(arrays_of(tmp_path / "f.npz")) == {"paths", "cls", "pooled"}
    said = "writing: cls, pooled of 5 images, 800 B; not tokens (6 kB) without --outputs\n"
    assert said in capsys.readouterr().err


def test_without_vectors_all_is_written(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = write_bundle(tmp_path / "bundle", outputs=("feature_map", "tokens"))
    predict(capsys, bundle, photos, "--num-keep", "4", "--out", tmp_path / "f.npz")
    assert set(arrays_of(tmp_path / "f.npz")) == {"paths", "feature_map", "tokens"}


def test_a_disk_without_room_is_noticed_before_computing(
    exported: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10_000, 8_401, 1_599))
    out = tmp_path / "new" / "f.npz"
    assert main(["predict", str(exported / "encoder"), str(photos), "--out", str(out)]) == 2
    said = f"error: --out {out} takes 1.6 kB while it is written, and {tmp_path} has 1.6 kB left\n"
    assert said in capsys.readouterr().err
    assert not out.parent.exists()


@pytest.mark.parametrize("broken", [False, True])
def test_a_killed_run_goes_on(
    exported: Path,
    photos: Path,
    tmp_path: Path,
    broken: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if broken:
        (photos / "01.png").write_bytes(b"")
    call = (exported / "classifier", photos, "--batch-size", "2", "--out")
    whole = predict(capsys, *call, tmp_path / "whole.npz")
    start, calls = Backbone.start_cropped, 0

    def killed(backbone: Backbone, pixels: Array, keep: Any, *, outputs: tuple[str, ...]) -> Callable[[], Features]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return start(backbone, pixels, keep, outputs=outputs)

    out = tmp_path / "f.npz"
    with monkeypatch.context() as patch:
        patch.setattr(Backbone, "start_cropped", killed)
        assert main(["predict", *map(str, call), str(out)]) not in (0, 2)
    assert not out.exists()
    done = 3 if broken else 2
    kept = f"{done} of 5 images"
    assert f"kept: {kept} in {out}.partial; the same call goes on there\n" in capsys.readouterr().err
    assert main(["predict", *map(str, call), str(out), "--outputs", "pooled"]) == 2
    assert f"{out}.partial has rows of a call with other outputs\n" in capsys.readouterr().err
    assert main(["predict", *map(str, call), str(out), "--json"]) == 0
    captured = capsys.readouterr()
    assert f"going on: {kept} are in {out}.partial\n" in captured.err
    assert json.loads(captured.out) == {**whole, "out": str(out)}
    first, second = arrays_of(tmp_path / "whole.npz"), arrays_of(out)
    assert first.keys() == second.keys()
    for name, array in first.items():
        np.testing.assert_array_equal(second[name], array)
    assert not Path(f"{out}.partial").exists()


def test_many_images_are_printed_line_by_line(
    exported: Path, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mae_deploy.commands.predict._TABLE", 4)
    assert main(["predict", str(exported / "classifier"), str(photos), "--top-k", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [str(path) for path in find_images(photos)]
    assert all(re.fullmatch(r".*  \S+ \d+\.\d%", line) for line in lines)


def test_a_classifier_writes_features_and_prints_classes(
    exported: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = predict(capsys, exported / "classifier", photos, "--out", tmp_path / "f.npz")
    assert set(arrays_of(tmp_path / "f.npz")) == {"paths", "logits", "pooled"}
    assert len(found["predictions"]) == 5


def test_parquet(exported: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    predict(capsys, exported / "encoder", photos, "--out", tmp_path / "f.parquet", "--outputs", "pooled")
    predict(capsys, exported / "encoder", photos, "--out", tmp_path / "f.npz", "--outputs", "pooled")
    table, stored = parquet.read_table(tmp_path / "f.parquet"), arrays_of(tmp_path / "f.npz")
    assert table.column_names == ["paths", "pooled"]
    assert table["paths"].to_pylist() == stored["paths"].tolist()
    np.testing.assert_array_equal(np.array(table["pooled"].to_pylist(), np.float32), stored["pooled"])


@pytest.mark.parametrize("outputs", ["pooled", "tokens,cls", "cls,pooled,cls"])
def test_chosen_outputs(
    exported: Path, photos: Path, tmp_path: Path, outputs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    predict(capsys, exported / "encoder", photos, "--out", tmp_path / "f.npz", "--outputs", outputs)
    assert set(arrays_of(tmp_path / "f.npz")) == {"paths", *outputs.split(",")}


def test_given_patches(exported: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = predict(
        capsys, exported / "encoder", photos, "--out", tmp_path / "f.npz", "--keep", "7,0,11", "--outputs", "tokens"
    )
    assert found["outputs"]["tokens"] == [5, 3, 20]
    expected = Backbone.load(exported / "encoder")([read_image(path) for path in find_images(photos)], keep=[7, 0, 11])
    np.testing.assert_allclose(arrays_of(tmp_path / "f.npz")["tokens"], expected.tokens, rtol=0, atol=1e-6)  # as above


def test_patches_as_a_range_or_a_mask(
    exported: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = np.zeros((3, 5), bool)
    mask[0, 1:4] = True
    np.save(tmp_path / "mask.npy", mask)
    whole = predict(capsys, exported / "encoder", photos, "--out", tmp_path / "a.npz", "--keep", "1,2,3")
    for name, given in (("b", ("--keep", "1-3")), ("c", ("--keep-mask", tmp_path / "mask.npy"))):
        predict(capsys, exported / "encoder", photos, "--out", tmp_path / f"{name}.npz", *given)
        for output in whole["outputs"]:
            np.testing.assert_array_equal(
                arrays_of(tmp_path / f"{name}.npz")[output], arrays_of(tmp_path / "a.npz")[output]
            )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (np.ones((5, 3), bool), "the mask has the shape (5, 3)"),
        (np.ones((2, 15), bool), "has a mask for each of 2 images"),
        (np.ones(15, np.float32), "is no array of booleans"),
        (None, "is not a .npy file"),
    ],
)
def test_masks_that_cannot_be_taken(
    exported: Path,
    photos: Path,
    tmp_path: Path,
    content: Array | None,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "mask.npy").write_text("no mask") if content is None else np.save(tmp_path / "mask.npy", content)
    assert main(["predict", str(exported / "encoder"), str(photos), "--keep-mask", str(tmp_path / "mask.npy")]) == 2
    assert said in capsys.readouterr().err


def test_random_patches_follow_the_seed(
    exported: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        out, more = tmp_path / f"{name}.npz", ("--num-keep", "4", "--seed", seed, "--outputs", "tokens")
        predict(capsys, exported / "encoder", photos, "--out", out, *more)
    a, b, c = (arrays_of(tmp_path / f"{name}.npz")["tokens"] for name in "abc")
    assert a.shape == (5, 4, 20)
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 0.1


# --- files that cannot be read or written ----------------------------------------------------------------------------


def test_unreadable_files_are_named_and_left_out(
    exported: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = spoil(photos / "a[" / "x].png")
    (photos / "01.png").write_bytes(b"")
    assert main(["predict", str(exported / "classifier"), str(photos), "--out", str(tmp_path / "f.npz"), "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["images"] == 3
    assert [entry["path"] for entry in found["unreadable"]] == [str(photos / "01.png"), str(broken)]
    assert found["unreadable"][0]["reason"] == "the file is empty"
    assert f"skipped {photos / '01.png'}: the file is empty\n" in captured.err
    assert f"skipped {broken}: " in captured.err
    readable = [str(photos / name) for name in ("00.png", "02.png", "03.png")]
    assert arrays_of(tmp_path / "f.npz")["paths"].tolist() == readable
    assert [row["path"] for row in found["predictions"]] == readable


def test_no_readable_image_is_1_and_writes_nothing(
    exported: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in find_images(photos):
        spoil(path)
    out = tmp_path / "new" / "f.npz"
    assert main(["predict", str(exported / "classifier"), str(photos), "--out", str(out)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"error: none of 5 images could be read; the first: {photos / '00.png'}: " in captured.err
    assert not out.parent.exists()


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """No engine may be loaded: the mistake must be found before anything is computed."""
    monkeypatch.setattr(Backbone, "load", lambda *_, **__: pytest.fail("the bundle was loaded first"))


@pytest.mark.usefixtures("idle")
def test_a_missing_pyarrow_is_noticed_before_computing(
    exported: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main(["predict", str(exported / "encoder"), str(photos), "--out", str(tmp_path / "f.parquet")]) == 3
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: this needs the package 'pyarrow', which cannot be imported")
    assert hint == "hint: pip install 'mae-deploy[parquet]'"


@pytest.mark.usefixtures("idle")
def test_what_is_there_is_not_overwritten(
    exported: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a[x].npz"
    out.write_text("kept")
    assert main(["predict", str(exported / "encoder"), str(photos), "--out", str(out)]) == 2
    assert (
        capsys.readouterr().err
        == f"error: --out {out} already exists\nhint: choose another --out, or remove it first\n"
    )
    assert out.read_text() == "kept"


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("name", ["f.csv", "f", "f.npz.txt"])
def test_a_suffix_that_is_not_written(
    exported: Path, photos: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(exported / "encoder"), str(photos), "--out", str(tmp_path / name)]) == 2
    assert capsys.readouterr().err == f"error: --out {tmp_path / name} must end in .npz or .parquet\n"


# --- usage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("classifier", ["--top-k", "0"], "--top-k must be at least 1, got 0"),
        ("classifier", ["--keep", "0,1"], "this bundle's graph takes every patch, so keep cannot be used"),
        ("classifier", ["--num-keep", "3"], "this bundle's graph takes every patch, so num_keep cannot be used"),
        ("classifier", ["--outputs", "tokens"], "no output 'tokens'"),
        ("encoder", ["--keep", "0,15"], "keep has the patch 15"),
        ("encoder", ["--keep", "4,4"], "keep has the patch 4 twice for one image"),
        ("encoder", ["--keep", "0", "--num-keep", "3"], "--keep and --num-keep exclude one another"),
        ("encoder", ["--num-keep", "16"], "num_keep 16 cannot be used"),
        ("encoder", ["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        ("encoder", ["--engine", "abacus"], "unknown engine 'abacus'"),
        ("nowhere", [], "no bundle at {exported}/nowhere: there is no manifest.json"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else value[:10],
)
def test_mistakes_are_2(
    exported: Path, photos: Path, name: str, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(exported / name), str(photos), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    error, *hints = [line for line in captured.err.splitlines() if line != f"data: {photos}: 5 images"]
    assert error == f"error: {said.format(exported=exported)}"
    assert len(hints) <= 1


def test_a_fixed_number_of_patches_must_be_given(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = write_bundle(tmp_path / "bundle", keep=4)
    assert main(["predict", str(bundle), str(photos)]) == 2
    assert "error: this bundle's graph takes 4 of 21 patches\n" in capsys.readouterr().err
    assert main(["predict", str(bundle), str(photos), "--num-keep", "4"]) == 0


def test_nothing_to_look_at(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a[").mkdir()
    (tmp_path / "a[" / "x]").mkdir()
    for folder, said in (
        (tmp_path / "nowhere", "no such file or folder: "),
        (tmp_path / "a[" / "x]", "no images below "),
    ):
        assert main(["predict", str(exported / "encoder"), str(folder)]) == 2
        assert capsys.readouterr().err.startswith(f"error: {said}{folder}\n")


def test_without_the_training_packages(exported: Path, photos: Path, tmp_path: Path) -> None:
    done = run_without(
        TRAINING, "predict", str(exported / "classifier"), str(photos), "--out", str(tmp_path / "f.npz"), "--json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"] == 5
    assert set(arrays_of(tmp_path / "f.npz")) == {"paths", "logits", "pooled"}
