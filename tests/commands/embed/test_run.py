"""`mae-deploy embed` as it is typed: every image once, whatever is killed or broken, and nothing of another job."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mae_deploy.cli import main
from mae_deploy.embedding.job import features_in
from mae_deploy.errors import CheckFailed
from mae_deploy.files import take_lock
from mae_deploy.images.find import find_images
from mae_deploy.images.read import read_image
from mae_deploy.runtime import Backbone
from tests.data.image_folders import spoil, write_noise
from tests.data.sources.tiny_shards import shards_of
from tests.runtime.tiny_bundle import D, write_bundle
from tests.runtime.video.tiny_video import write_video
from tests.test_cli import TRAINING, run_without


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle") / "tiny", outputs=("cls", "tokens", "pooled"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Eleven images, of which number 3 is cut in half and number 7 is empty."""
    write_noise(tmp_path / "photos", 11)
    spoil(tmp_path / "photos" / "03.png")
    (tmp_path / "photos" / "07.png").write_bytes(b"")
    return tmp_path / "photos"


def embed(capsys: pytest.CaptureFixture[str], *arguments: str | Path | int) -> dict[str, Any]:
    """The result of a command that succeeds."""
    assert main(["embed", *map(str, arguments), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path | int, code: int = 2) -> str:
    """What a command that fails says."""
    assert main(["embed", *map(str, arguments)]) == code
    return capsys.readouterr().err


def content(out: Path) -> dict[str, bytes]:
    """All tables of a folder of features."""
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*.parquet"))}


def test_every_image_is_there_once_with_what_predict_computes(
    bundle: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = embed(capsys, photos, bundle, "--out", tmp_path / "out", "--shard-images", 4, "--batch-size", 3)
    assert (found["images"], found["unreadable"], found["shards"]) == (9, 2, 3)
    assert found["outputs"] == {"cls": [D], "pooled": [D]}
    table = pq.read_table(tmp_path / "out")  # a reader of the folder sees the features alone
    readable = [path for path in find_images(photos) if path.name not in ("03.png", "07.png")]
    assert table["id"].to_pylist() == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert table["key"].to_pylist() == list(map(str, readable))
    assert table.schema.field("pooled").type == pa.list_(pa.field("element", pa.float32(), nullable=False), D)
    with Backbone.load(bundle) as backbone:
        expected = backbone([read_image(path) for path in readable])
    # Sums in another order, as the batches are others.
    np.testing.assert_allclose(np.array(table["pooled"].to_pylist()), expected.pooled, rtol=0, atol=1e-5)
    left_out = pq.read_table(tmp_path / "out" / "_unreadable").to_pylist()
    assert [(row["id"], row["key"]) for row in left_out] == [(3, str(photos / "03.png")), (7, str(photos / "07.png"))]
    assert left_out[1]["reason"] == "the file is empty"
    assert photos.name not in left_out[0]["reason"]
    about = json.loads(pq.read_metadata(features_in(tmp_path / "out")[0]).metadata[b"mae_deploy"])
    assert about["bundle"]["licence"] == json.loads((bundle / "manifest.json").read_text())["licence"]
    assert about["job"]["fingerprint"]["images"] == 11


def test_a_killed_call_goes_on_with_the_same_bytes(
    bundle: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (photos, bundle, "--shard-images", 2, "--store", "fp16")
    embed(capsys, *options, "--out", tmp_path / "whole")

    class Killed(BaseException):
        pass

    computed: list[str] = []
    replace, kills = os.replace, [1, 4]

    def killed_sometimes(source: Any, target: Any) -> None:
        if (name := Path(target).name).startswith("features") and Path(target).parent.name == "out":
            computed.append(name)
            if kills and len(computed) == kills[0]:
                kills.pop(0)
                raise Killed
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed_sometimes)
    for _ in range(2):
        with pytest.raises(Killed):
            main(["embed", *map(str, options), "--out", str(tmp_path / "out")])
    found = embed(capsys, *options, "--out", tmp_path / "out")
    assert (found["images"], found["unreadable"]) == (9, 2)
    # What was renamed into place is not computed again: only the two shards that a kill took away.
    assert len(computed) == len(features_in(tmp_path / "out")) + 2
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert [path.name for path in (tmp_path / "out").glob(".partial*")] == []
    assert embed(capsys, *options, "--out", tmp_path / "out")["new"] == 0
    assert pq.read_schema(features_in(tmp_path / "out")[0]).field("cls").type.value_type == pa.float16()


def test_another_job_is_not_mixed_in(
    bundle: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    embed(capsys, photos, bundle, "--out", out)
    before = content(out)
    assert "store: fp32 -> fp16" in refused(capsys, photos, bundle, "--out", out, "--store", "fp16")
    other = write_bundle(tmp_path / "other", outputs=("cls", "tokens", "pooled"), weights_seed=1)
    assert "bundle: " in refused(capsys, photos, other, "--out", out)
    write_noise(photos, 1, first=50)
    assert "fingerprint: " in refused(capsys, photos, bundle, "--out", out)
    (photos / "50.png").unlink()
    lock = take_lock(out / ".lock", busy="", hint="")
    assert f"another process is writing {out}" in refused(capsys, photos, bundle, "--out", out)
    lock.release()
    assert f"--out {photos} lies within" in refused(capsys, photos, bundle, "--out", photos)
    assert f"--out {bundle} already exists" in refused(capsys, photos, bundle, "--out", bundle)
    assert "id is the name of a column" in refused(capsys, photos, bundle, "--out", out, "--outputs", "id")
    assert content(out) == before


def test_several_processes_write_the_same_bytes(
    bundle: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (photos, bundle, "--shard-images", 3)
    embed(capsys, *options, "--out", tmp_path / "one")
    found = embed(capsys, *options, "--out", tmp_path / "two", "--engine-workers", 2)
    assert (found["images"], found["unreadable"], found["new"]) == (9, 2, 11)
    assert content(tmp_path / "two") == content(tmp_path / "one")


def test_no_image_at_all(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "0.png").write_bytes(b"no image")
    assert "none of 1 images could be read" in refused(
        capsys, tmp_path / "bad", bundle, "--out", tmp_path / "out", code=1
    )
    assert pq.read_table(tmp_path / "out" / "_unreadable").num_rows == 1
    assert pq.read_table(tmp_path / "out").num_rows == 0


def test_what_fails_before_the_first_feature_leaves_nothing(
    bundle: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_engine(*_: Any, **__: Any) -> Backbone:
        raise CheckFailed("the engine does not start")

    monkeypatch.setattr(Backbone, "load", no_engine)
    assert "the engine does not start" in refused(capsys, photos, bundle, "--out", tmp_path / "out", code=1)
    assert not (tmp_path / "out").exists()


def test_features_that_do_not_fit(
    bundle: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Backbone.start_cropped

    def spoilt(self: Backbone, *arguments: Any, **options: Any) -> Callable[[], Any]:
        features = whole(self, *arguments, **options)()
        features["cls"][0, 0], features["cls"][1, 1] = np.nan, 1e6
        return lambda: features

    monkeypatch.setattr(Backbone, "start_cropped", spoilt)
    found = embed(capsys, photos, bundle, "--out", tmp_path / "fp16", "--store", "fp16", "--batch-size", 9)
    assert (found["images"], found["unreadable"]) == (7, 4)
    rows = pq.read_table(tmp_path / "fp16" / "_unreadable").to_pylist()
    assert [row["id"] for row in rows] == [0, 1, 3, 7]
    assert "NaN" in rows[0]["reason"]
    assert embed(capsys, photos, bundle, "--out", tmp_path / "fp32", "--batch-size", 9)["unreadable"] == 3


def test_shards_and_tables_of_images(
    bundle: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = shards_of(photos, tmp_path / "shards", per_shard=4)
    found = embed(capsys, shards, bundle, "--out", tmp_path / "of-shards")
    assert (found["images"], found["unreadable"]) == (9, 2)
    rows = [{"image": {"bytes": path.read_bytes(), "path": path.name}} for path in sorted(photos.iterdir())]
    (tmp_path / "tables").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "tables" / "data.parquet")
    found = embed(capsys, tmp_path / "tables", bundle, "--out", tmp_path / "of-tables")
    assert (found["images"], found["unreadable"]) == (9, 2)
    one, other = (pq.read_table(tmp_path / name)["pooled"] for name in ("of-shards", "of-tables"))
    assert one == other


def test_streamed_shards(bundle: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = shards_of(photos, tmp_path / "shards", per_shard=4)
    served = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(shards)))
    Thread(target=served.serve_forever, daemon=True).start()
    data = f"http://127.0.0.1:{served.server_port}/shard-{{0..2}}.tar"
    options = (data, bundle, "--shard-images", 2)
    try:
        found = embed(capsys, *options, "--out", tmp_path / "out")
        # Two, two; two, two; two, one.
        assert (found["images"], found["unreadable"], found["shards"]) == (9, 2, 6)
        tables = [
            pq.read_table(folder)["id"].to_pylist() for folder in (tmp_path / "out", tmp_path / "out" / "_unreadable")
        ]
        places = [part << 32 | place for part, count in enumerate((4, 4, 3)) for place in range(count)]
        assert tables[1] == [3, 1 << 32 | 3]
        assert sorted(tables[0] + tables[1]) == places
        shutil.copytree(tmp_path / "out", tmp_path / "killed")
        for name in ("features-000001-000001.parquet", "features-000002-000000.parquet"):
            (tmp_path / "killed" / name).unlink()
        embed(capsys, *options, "--out", tmp_path / "killed")
        assert content(tmp_path / "killed") == content(tmp_path / "out")
    finally:
        served.shutdown()
        served.server_close()


def test_a_stream_that_breaks_off_is_no_loss_that_nobody_sees(
    bundle: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mae_deploy.embedding.embedder.time.sleep", lambda _: None)
    shards = shards_of(photos, tmp_path / "shards", per_shard=4)
    whole = (shards / "shard-1.tar").read_bytes()
    (shards / "shard-1.tar").write_bytes(whole[:1800])
    call = (f"pipe:cat {shards}/shard-{{0..2}}.tar", bundle, "--out", tmp_path / "out", "--shard-images", 1)
    said = refused(capsys, *call, code=1)
    assert "1 of 3 parts" in said
    assert f"pipe:cat {shards}/shard-1.tar breaks off after" in said
    (shards / "shard-1.tar").write_bytes(whole)
    assert embed(capsys, *call)["images"] == 9


def test_frames_of_videos(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "clips").mkdir()
    for name, frames in (("a.mp4", 7), ("b.mp4", 4)):
        write_video(
            tmp_path / "clips" / name, [np.full((24, 32, 3), 20 * number, np.uint8) for number in range(frames)]
        )
    (tmp_path / "clips" / "c.mp4").write_bytes(b"no video")
    options = (tmp_path / "clips", bundle, "--shard-images", 2, "--every", 2)
    found = embed(capsys, *options, "--out", tmp_path / "out")
    assert (found["images"], found["unreadable"]) == (6, 1)
    table = pq.read_table(tmp_path / "out")
    assert table["key"].to_pylist() == [
        f"{tmp_path / 'clips' / name}#{frame}"
        for name, frames in (("a.mp4", (0, 2, 4, 6)), ("b.mp4", (0, 2)))
        for frame in frames
    ]
    assert table["id"].to_pylist() == [0, 2, 4, 6, 1 << 32, 1 << 32 | 2]
    (left_out,) = pq.read_table(tmp_path / "out" / "_unreadable").to_pylist()
    assert left_out["key"] == str(tmp_path / "clips" / "c.mp4")
    shutil.copytree(tmp_path / "out", tmp_path / "killed")
    (tmp_path / "killed" / "features-000000-000001.parquet").unlink()
    assert embed(capsys, *options, "--out", tmp_path / "killed")["new"] == 2
    assert content(tmp_path / "killed") == content(tmp_path / "out")
    alone = embed(capsys, tmp_path / "clips" / "b.mp4", bundle, "--out", tmp_path / "alone")
    assert alone["images"] == 4
    write_noise(tmp_path / "photos", 1)
    assert "--every 3 is for videos" in refused(
        capsys, tmp_path / "photos", bundle, "--every", 3, "--out", tmp_path / "none"
    )


def test_a_cluster_writes_the_same_bytes(bundle: Path, photos: Path, tmp_path: Path) -> None:
    if os.environ.get("MAE_DEPLOY_TEST_RAY") != "1":
        pytest.skip("make cluster runs it: Ray takes half a minute to start")
    pytest.importorskip("ray", reason="Ray is in the extra [cluster]")
    call = [sys.executable, "-m", "mae_deploy", "embed", str(photos), str(bundle), "--shard-images", "3"]
    subprocess.run([*call, "--out", str(tmp_path / "one")], check=True)
    subprocess.run([*call, "--out", str(tmp_path / "ray"), "--ray", "local", "--engine-workers", "2"], check=True)
    assert content(tmp_path / "ray") == content(tmp_path / "one")


def test_without_the_training_packages(bundle: Path, photos: Path, tmp_path: Path) -> None:
    done = run_without(TRAINING, "embed", str(photos), str(bundle), "--out", str(tmp_path / "out"))
    assert (done.returncode, done.stdout.split()[3:6]) == (0, ["images", "9", "in"]), done.stderr


def test_without_pyarrow(bundle: Path, photos: Path, tmp_path: Path) -> None:
    done = run_without(("pyarrow",), "embed", str(photos), str(bundle), "--out", str(tmp_path / "out"))
    assert done.returncode == 3
    assert "pip install 'mae-deploy[parquet]'" in done.stderr
    assert not (tmp_path / "out").exists()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: Any) -> None: ...
