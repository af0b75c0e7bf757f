"""The server over HTTP: the same numbers as the bundle gives, and every kind of bad request refused in one line."""

from __future__ import annotations

import base64
import io
import json
import socket
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mae_deploy.images.arrays import Array
from mae_deploy.images.read import read_image
from mae_deploy.runtime import Backbone, top_k
from mae_deploy.seeding import random_patches
from tests.commands.serve.serving import Answer, Client, form, serving, settings, wait_for
from tests.runtime.tiny_bundle import CLASS_NAMES, MEAN, STD, H, N, W, write_bundle

MOST_BYTES, MOST_PIXELS = 50_000, 90_000


def png(width: int, height: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


PICTURE = png(31, 17)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    write_bundle(folder / "classifier")
    write_bundle(folder / "encoder", token_mode="full", outputs=("cls", "tokens", "pooled"))
    write_bundle(
        folder / "mae",
        token_mode="reconstruct",
        outputs=("pixels",),
        change=lambda manifest: manifest["provenance"].update(export={"pixels": "normalised"}),
    )
    write_bundle(folder / "ragged", token_mode="ragged")
    (folder / "photos").mkdir()
    (folder / "photos" / "a.png").write_bytes(PICTURE)
    (folder / "secret.png").write_bytes(PICTURE)
    (folder / "photos" / "link.png").symlink_to(folder / "secret.png")
    return folder


@pytest.fixture(scope="module")
def client(root: Path) -> Iterator[Client]:
    bundles = [root / name for name in ("classifier", "encoder", "mae", "ragged")]
    limits = {"max_bytes": MOST_BYTES, "max_pixels": MOST_PIXELS, "max_images": 5}
    with serving(settings(*bundles, requests={**limits, "images": str(root / "photos")})) as found:
        yield found


def expected(root: Path, name: str, keep: Array | None = None) -> dict[str, Array]:
    with Backbone.load(root / name) as backbone:
        return dict(backbone(backbone.read(PICTURE), keep))


# --- what is computed ------------------------------------------------------------------------------------------------


def test_predict(client: Client, root: Path) -> None:
    answer = client.post("classifier/predict?top_k=3", PICTURE, content_type="image/png")
    assert answer.status == 200
    (row,) = answer.json["results"]
    (wanted,) = top_k(expected(root, "classifier")["logits"], CLASS_NAMES, 3)
    assert [one["name"] for one in row["classes"]] == [name for name, _ in wanted]
    assert [one["probability"] for one in row["classes"]] == pytest.approx([share for _, share in wanted])
    assert (row["keep"], row["error"]) == (None, None)
    for stage in ("decode", "queue", "engine"):
        assert f"{stage};dur=" in answer.headers["Server-Timing"]


@pytest.mark.parametrize("name", ["classifier", "ragged"])
def test_some_patches(client: Client, root: Path, name: str) -> None:
    keep = random_patches(N, 5, [0], 7)[0]
    for query in ("num_keep=5&seed=7", f"keep={','.join(map(str, keep))}"):
        (row,) = client.post(f"{name}/embed?outputs=tokens,cls&{query}", PICTURE).json["results"]
        assert row["keep"] == keep.tolist()
        wanted = expected(root, name, keep)
        for output in ("tokens", "cls"):
            np.testing.assert_allclose(row["outputs"][output], wanted[output][0], rtol=1e-5)  # sums in another order


def test_vectors_are_what_embed_gives_unless_it_is_told(client: Client, root: Path) -> None:
    (row,) = client.post("encoder/embed", PICTURE).json["results"]
    assert set(row["outputs"]) == {"cls", "pooled"}


def test_several_of_which_one_is_no_image(client: Client, root: Path) -> None:
    body, kind = form(("a.png", PICTURE), ("b.txt", b"a note"), ("c.png", png(9, 31, seed=1)))
    rows = client.post("classifier/predict", body, content_type=kind).json["results"]
    assert [row["name"] for row in rows] == ["a.png", "b.txt", "c.png"]
    assert [len(row["classes"]) for row in rows] == [5, 0, 5]
    assert rows[1]["error"] == "6 bytes: cannot identify image file"
    answer = client.post("classifier/embed?outputs=pooled&num_keep=3&format=npz", body, content_type=kind)
    with np.load(io.BytesIO(answer.body), allow_pickle=False) as archive:
        assert archive["name"].tolist() == ["a.png", "c.png"]
        assert archive["left_out"].tolist() == [["b.txt", "6 bytes: cannot identify image file"]]
        assert archive["pooled"].shape == (2, 13)
        # Each image has patches of its own, by its place in the request.
        assert archive["keep"].tolist() == random_patches(N, 3, [0, 2], 0).tolist()


def test_a_list(client: Client, root: Path) -> None:
    text = base64.b64encode(PICTURE).decode()
    body = json.dumps({"images": [text, f"data:image/png;base64,{text}"], "paths": ["a.png"]})
    rows = client.post("classifier/predict", body, content_type="application/json").json["results"]
    assert [row["name"] for row in rows] == ["images[0]", "images[1]", "a.png"]
    assert rows[0]["classes"] == rows[1]["classes"] == rows[2]["classes"] != []


@pytest.mark.parametrize(
    "path", ["../secret.png", "link.png", "/etc/hostname", ".", "b.png", "a\0.png", "\ud800.png", "x" * 5000]
)
def test_paths_lead_nowhere_else(client: Client, path: str) -> None:
    answer = client.post("classifier/predict", json.dumps({"paths": [path]}), content_type="application/json")
    assert (answer.status, "there is no file" in answer.error) == (404, True)


def test_reconstruct(client: Client, root: Path) -> None:
    keep = random_patches(N, N // 4, [0], 3)[0]
    answer = client.post("mae/reconstruct?seed=3", PICTURE)
    assert answer.headers["Content-Type"] == "image/png"
    shown = np.asarray(Image.open(io.BytesIO(answer.body)))
    assert shown.shape == (H, W, 3)
    with Backbone.load(root / "mae") as backbone:
        pixels = backbone.preprocess.crop(read_image(Path("a.png"), content=PICTURE))
        predicted = backbone(pixels, keep)["pixels"][0]
    grid = pixels.reshape(H // 2, 2, W // 2, 2, 3).swapaxes(1, 2).reshape(N, -1)
    values = predicted * np.tile(STD, 4) + np.tile(MEAN, 4)
    wanted = (values.clip(0, 1) * 255 + 0.5).astype(np.uint8)
    wanted[keep] = grid[keep]
    np.testing.assert_array_equal(shown.reshape(H // 2, 2, W // 2, 2, 3).swapaxes(1, 2).reshape(N, -1), wanted)
    found = client.post("mae/reconstruct?seed=3&format=json", PICTURE).json
    assert found["keep"] == keep.tolist()
    assert base64.b64decode(found["picture"].partition(",")[2]) == answer.body


def test_view(client: Client, root: Path) -> None:
    shown = np.asarray(Image.open(io.BytesIO(client.post("classifier/view", PICTURE).body)))
    with Backbone.load(root / "classifier") as backbone:
        np.testing.assert_array_equal(shown, backbone.preprocess.crop(backbone.read(PICTURE)))


def test_a_hundred_clients(client: Client, root: Path) -> None:
    """Each gets the answer to its own picture."""
    wanted = {}
    with Backbone.load(root / "classifier") as backbone:
        for seed in range(100):
            wanted[seed] = backbone(backbone.read(png(20, 20, seed))).pooled[0]
    found: dict[int, Answer] = {}

    def ask(seed: int) -> None:
        found[seed] = client.post("classifier/embed?outputs=pooled", png(20, 20, seed))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, answer in found.items():
        assert answer.status == 200
        np.testing.assert_allclose(answer.json["results"][0]["outputs"]["pooled"], wanted[seed], rtol=1e-4)
    assert len(found) == 100
    text = client.get("/metrics").body.decode()
    largest = [
        line for line in text.splitlines() if 'mae_deploy_batch_images_bucket{le="1.0",model="classifier"}' in line
    ]
    total = [line for line in text.splitlines() if 'mae_deploy_batch_images_count{model="classifier"}' in line]
    assert float(largest[0].split()[-1]) < float(total[0].split()[-1])  # some were computed together


# --- what is refused -------------------------------------------------------------------------------------------------


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(*chunks: tuple[bytes, bytes], side: int = 10) -> bytes:
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(31 * 10))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", rows), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


BAD: dict[str, tuple[Any, dict[str, str], int, str]] = {
    "nothing": (b"", {}, 400, "there is no image"),
    "text": (b"hello", {}, 415, "cannot identify image file"),
    "cut short": (PICTURE[:200], {}, 415, "truncated|cannot identify|broken"),
    "too large by its length": (
        bytes(MOST_BYTES + 1),
        {},
        413,
        f"{MOST_BYTES + 1} bytes is more than the {MOST_BYTES}",
    ),
    "too large as it comes": (iter([bytes(30_000)] * 50), {}, 413, f"more than the {MOST_BYTES} of --max-bytes"),
    "no length": (b"x", {"content_length": "minus"}, 400, ""),
    "too many pixels": (png_of(side=1000), {}, 413, "1000x1000 are 1000000 pixels, more than 90000"),
    "a bomb by its header": (png_of(side=60_000), {}, 413, "3600000000 pixels"),
    "a bomb in its text": (png_of((b"zTXt", b"a\0\0" + zlib.compress(bytes(9**7)))), {}, 415, "too large"),
    "a bomb in its profile": (png_of((b"iCCP", b"a\0\0" + zlib.compress(bytes(9**7)))), {}, 415, "too large"),
    "no JSON": (b"{", {"content_type": "application/json"}, 400, "this is no JSON"),
    "deep JSON": (b"[" * 40_000, {"content_type": "application/json"}, 400, "this is no JSON"),
    "another list": (b'{"urls": []}', {"content_type": "application/json"}, 400, 'give {"images"'),
    "a list of numbers": (b'{"images": [1]}', {"content_type": "application/json"}, 400, 'give {"images"'),
    "no base64": (b'{"images": ["%"]}', {"content_type": "application/json"}, 400, "is not base64"),
    "no boundary": (b"x", {"content_type": "multipart/form-data"}, 400, "this is no form"),
    "too many files": (
        form(*[("a", b"x")] * 6)[0],
        {"content_type": form()[1]},
        413,
        "6 images are more than the 5 of --max-images|Too many files",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_requests(client: Client, kind: str) -> None:
    body, headers, status, message = BAD[kind]
    answer = client.post("classifier/predict", body, **headers)
    assert answer.status == status
    if message:
        assert any(part in answer.error for part in message.split("|"))
        assert "\n" not in answer.error
    assert client.post("classifier/predict", PICTURE).status == 200


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("nobody/predict", 404, "no bundle is called nobody: there are classifier, encoder, mae, ragged"),
        ("encoder/predict", 400, "encoder has no classes"),
        ("encoder/reconstruct", 400, "encoder has no decoder"),
        ("encoder/embed?num_keep=3", 400, "takes every patch"),
        ("classifier/embed?num_keep=22", 400, "num_keep 22 cannot be used"),
        ("classifier/embed?keep=3,3", 400, "patch 3 twice"),
        ("classifier/embed?keep=3&num_keep=2", 400, "exclude one another"),
        ("classifier/embed?keep=x", 400, "not a list of patches"),
        ("classifier/embed?outputs=nothing", 400, "no output 'nothing'"),
        ("classifier/predict?num_keep=x", 400, "num_keep: "),
        ("classifier/predict?top_k=0", 400, "top_k: "),
        ("classifier/unknown", 404, "Not Found"),
    ],
)
def test_bad_options(client: Client, path: str, status: int, message: str) -> None:
    answer = client.post(path, PICTURE)
    assert (answer.status, message in answer.error) == (status, True), answer.error


def test_one_that_stops_half_way(root: Path) -> None:
    head = b"POST /v1/models/classifier/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 40000\r\n\r\n"
    with serving(settings(root / "classifier", requests={"timeout": "1s"})) as client:
        with socket.create_connection(("127.0.0.1", client.port)) as gone:
            gone.sendall(head + bytes(20_000))
            wait_for(lambda: client.server.uploads.held == 20_000)
        wait_for(lambda: client.server.uploads.held == 0)  # its bytes are free at once
        with socket.create_connection(("127.0.0.1", client.port), timeout=20) as silent:
            silent.sendall(head + bytes(20_000))
            said = silent.recv(1000).decode()
        assert said.startswith("HTTP/1.1 408 ")
        wait_for(lambda: client.server.uploads.held == 0)
        assert client.get("/health/ready").status == 200


def test_too_much_at_once(root: Path) -> None:
    """Nothing is computed for a minute: what fills the queue is answered in time, what comes then at once."""
    limits = {"max_bytes": 9_000, "max_held": 9_000, "timeout": "1s"}
    batches = {"max_queue": 1, "max_delay": "1min"}
    with serving(settings(root / "classifier", batches=batches, requests=limits)) as client:
        answers: list[Answer] = []
        first = threading.Thread(target=lambda: answers.append(client.post("classifier/predict", PICTURE)))
        first.start()
        wait_for(lambda: client.server.models["classifier"].now.batcher.full)
        full = client.post("classifier/predict", PICTURE)
        assert (full.status, full.error, full.headers["Retry-After"]) == (503, "1 images wait already", "1")
        first.join()
        assert (answers[0].status, answers[0].error) == (503, "there was no answer within 1s")
        with socket.create_connection(("127.0.0.1", client.port)) as slow:
            slow.sendall(
                b"POST /v1/models/classifier/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 9000\r\n\r\n" + bytes(8_500)
            )
            wait_for(lambda: client.server.uploads.held == 8_500)
            held = client.post("classifier/predict", PICTURE)
            assert (held.status, "are being read already" in held.error) == (503, True)


def test_keys(root: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# of the cameras\nfirst\n\nsecond\n")
    with serving(settings(root / "classifier", requests={"api_keys": str(tmp_path / "keys")})) as client:
        for headers in ({}, {"Authorization": "Bearer third"}, {"Authorization": "Basic first"}, {"Authorization": ""}):
            answer = client.ask("POST", "/v1/models/classifier/predict", PICTURE, headers)
            assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
            assert client.get("/metrics", **headers).status == 401
        for key in ("first", "second"):
            assert client.post("classifier/predict", PICTURE, Authorization=f"Bearer {key}").status == 200
            assert client.get("/v1/models", Authorization=f"Bearer {key}").status == 200
        for path in ("/", "/health/live", "/health/ready", "/openapi.json"):
            assert client.get(path).status == 200


# --- what is said of it ----------------------------------------------------------------------------------------------


def test_models_and_health(client: Client) -> None:
    found = {model["name"]: model for model in client.get("/v1/models").json}
    assert list(found) == ["classifier", "encoder", "mae", "ragged"]
    assert found["classifier"] == client.get("/v1/models/classifier").json
    assert found["classifier"]["grid"] == [3, 7]
    assert found["classifier"]["keep_range"] == [1, N]
    assert found["classifier"]["classes"] == CLASS_NAMES
    assert found["encoder"]["classes"] == CLASS_NAMES or found["encoder"]["outputs"] == ["cls", "tokens", "pooled"]
    ready = client.get("/health/ready").json
    assert ready == {"status": "ready", "models": {name: model["revision"] for name, model in found.items()}}
    assert client.get("/health/live").json == {"status": "live"}
    for path in ("/health/live", "/health/ready", "/"):
        head = client.ask("HEAD", path, None, {})
        assert (head.status, head.body) == (200, b"")


def test_metrics(client: Client) -> None:
    client.post("classifier/predict", PICTURE)
    for path in ("/nowhere/1", "/nowhere/2"):
        client.get(path)
    client.post("nobody-1/predict", PICTURE)
    text = client.get("/metrics").body.decode()
    assert 'mae_deploy_requests_total{model="classifier",route="/v1/models/{name}/predict",status="200"}' in text
    assert 'mae_deploy_stage_seconds_count{model="classifier",stage="engine"}' in text
    assert 'mae_deploy_bundle_info{engine="onnxruntime ' in text
    assert 'mae_deploy_queued_images{model="mae"} 0.0' in text
    assert "mae_deploy_held_bytes 0.0" in text
    assert "nowhere" not in text
    assert "nobody" not in text


def test_openapi(client: Client) -> None:
    found = client.get("/openapi.json").json
    names = {path for path in found["paths"] if path.startswith("/v1/models")}
    steps = {"predict", "embed", "reconstruct", "view"}
    assert names == {"/v1/models", "/v1/models/{name}", *(f"/v1/models/{{name}}/{step}" for step in steps)}
    predict = found["paths"]["/v1/models/{name}/predict"]["post"]
    assert set(predict["requestBody"]["content"]) > {"image/*", "multipart/form-data", "application/json"}
    assert {parameter["name"] for parameter in predict["parameters"]} == {"name", "top_k", "keep", "num_keep", "seed"}
    assert {"200", "400", "401", "408", "413", "415", "503"} <= set(predict["responses"])
    assert found["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
