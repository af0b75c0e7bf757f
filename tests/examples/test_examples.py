"""Every program of `examples/` runs, on small data that is made here, and does what its first lines say."""

from __future__ import annotations

import http.client
import importlib.util
import json
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pyarrow.parquet as pq
import pytest
from onnx import numpy_helper
from PIL import Image

from mae_deploy.cli import main
from mae_deploy.runtime import Backbone, Bundle
from tests.data.image_folders import spoil, write_classes

EXAMPLES = Path(__file__).parents[2] / "examples"
SIDE = 32

SMALL = (
    f"--model vit_nano_patch4 --image-size {SIDE} --epochs 1 --batch-size 4 --num-workers 0 --decoder-depth 1".split()
)


def example(name: str) -> Any:
    """The module of this name."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with labelled images, and an encoder that was pretrained on them by the example."""
    folder = tmp_path_factory.mktemp("examples")
    write_classes(folder / "labelled", train=4, val=2)
    arguments = [str(folder / "labelled" / "train"), "--out", str(folder / "mae"), *SMALL]
    assert example("pretrain_and_look").main(arguments) == 0
    return folder


def exported(work: Path, name: str, *options: str, checkpoint: str = "mae") -> Path:
    """A bundle, made once."""
    out = work / "bundles" / name
    if not out.exists():
        words = ["export", str(work / checkpoint), "--out", str(out), "--samples", str(work / "labelled" / "val")]
        assert main([*words, *options]) == 0
    return out


def test_all_are_short_and_in_the_readme() -> None:
    programs = {path.name: path.read_text(encoding="utf-8") for path in EXAMPLES.glob("*.py")}
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert len(programs) >= 8
    for name, text in programs.items():
        assert len(text.splitlines()) < 60, name
        assert f"({name})" in readme, name
    for notebook in (EXAMPLES / "notebooks").glob("*.ipynb"):
        assert f"(notebooks/{notebook.name})" in readme, notebook.name


def test_pretrain_and_look(work: Path) -> None:
    rows, gap = 6, 4
    for percent in (50, 75, 90):
        with Image.open(work / "mae" / f"hidden-{percent}.png") as picture:
            side = 3 * SIDE  # small images are enlarged
            assert picture.size == (3 * (side + gap) - gap, rows * (side + gap) - gap)


def test_camera(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = exported(work, "cached", "--tokens", "cached")
    capsys.readouterr()
    example("camera").main([str(bundle), "--frames", "3", "--region", "0,0.25,1,0.75"])
    first, *others = capsys.readouterr().out.splitlines()
    N = (SIDE // 4) ** 2
    assert first == f"frame 0: {N} of {N} patches, cost 1.00  first frame"
    assert [line.split(":")[0] for line in others] == ["frame 1", "frame 2"]
    assert all(0 < int(line.split()[2]) < N for line in others)


def test_features_to_parquet(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos, out = work / "some", work / "features.parquet"
    write_classes(photos, train=3, val=1)
    bad = spoil(photos / "train" / "dark" / "01.png")
    bundle = exported(work, "visible", "--tokens", "visible")
    capsys.readouterr()
    example("features_to_parquet").main([str(bundle), str(photos), "--out", str(out), "--batch-size", "3"])
    assert f"left out: {bad}" in capsys.readouterr().out
    table = pq.read_table(out)
    assert table.num_rows == 2 * (3 + 1) - 1
    row = table.slice(2, 1).to_pylist()[0]
    assert (row["folder"], row["bytes"]) == (Path(row["path"]).parent.name, Path(row["path"]).stat().st_size)
    with Backbone.load(bundle) as backbone:
        np.testing.assert_allclose(row["pooled"], backbone(backbone.read(row["path"])).pooled[0], atol=1e-5)


def test_service(work: Path) -> None:
    service = example("service")
    photos = sorted((work / "labelled" / "val").rglob("*.png"))
    answers: dict[Path, tuple[int, Any]] = {}
    with Backbone.load(exported(work, "visible", "--tokens", "visible"), threads=1) as backbone:
        expected = {photo: backbone(backbone.read(photo)).pooled[0] for photo in photos}
        with service.server(backbone, 0) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()

            def ask(photo: Path, body: bytes) -> None:
                connection = http.client.HTTPConnection(*server.server_address)
                connection.request("POST", "/", body)
                response = connection.getresponse()
                answers[photo] = response.status, json.loads(response.read())
                connection.close()

            threads = [threading.Thread(target=ask, args=(photo, photo.read_bytes())) for photo in photos]
            threads.append(threading.Thread(target=ask, args=(Path("no image"), b"not an image")))
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            server.shutdown()
    assert answers.pop(Path("no image"))[0] == 400
    assert set(answers) == set(photos)
    for photo, (status, answer) in answers.items():
        assert status == 200
        np.testing.assert_allclose(answer["pooled"], expected[photo], atol=1e-5)


def test_service_names_classes(work: Path) -> None:
    with Backbone.load(exported(work, "classifier", checkpoint=classifier(work).name)) as backbone:
        photo = next((work / "labelled" / "val").rglob("*.png"))
        answer = example("service").answer(backbone, backbone(backbone.read(photo)))
    assert sorted(answer["classes"]) == ["dark", "light"]


def test_segmenter(work: Path) -> None:
    images, masks = work / "images", work / "masks"
    for folder in (images, masks):
        folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(10):
        pixels, mask = rng.integers(0, 60, (SIDE, SIDE, 3), np.uint8), np.zeros((SIDE, SIDE), np.uint8)
        top, left = 4 * rng.integers(0, 4, 2)
        pixels[top : top + 16, left : left + 16] += 150
        mask[top : top + 16, left : left + 16] = 255
        Image.fromarray(pixels).save(images / f"{number}.png")
        Image.fromarray(mask).save(masks / f"{number}.png")
    bundle, out = exported(work, "dense", "--outputs", "feature_map"), work / "segmenter.npz"
    assert example("segmenter").main([str(bundle), str(images), str(masks), "--out", str(out)]) > 0.8
    assert set(np.load(out)) == {"weight", "bias", "mean", "std"}


def test_detector(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = work / "detector.safetensors"
    example("detector").main([str(work / "mae"), "--out", str(weights), "--steps", "1"])
    assert "step 1/1  loss " in capsys.readouterr().out
    bundle = exported(work, "pyramid", "--pyramid", str(weights), "--outputs", "p2,p3,p4,p5")
    assert Bundle.load(bundle).output_names == ("p2", "p3", "p4", "p5")


def test_distil_for_a_device(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labelled, out = str(work / "labelled"), work / "device"
    arguments = [labelled, "--teacher", str(classifier(work)), "--students", "vit_nano_patch4", "--out", str(out)]
    chosen = example("distil_for_a_device").main([*arguments, "--epochs", "1", "--batch-size", "4"])
    rows = json.loads((out / "report" / "report.json").read_text())["rows"]
    assert chosen in [row[key] for row in rows for key in ("fp32_bundle", "int8_bundle") if key in row]
    assert capsys.readouterr().out.endswith(f"Next: mae-deploy verify {chosen}\n")


def classifier(work: Path) -> Path:
    """A fine-tuned run."""
    out = work / "classifier-run"
    if not out.exists():
        words = ["finetune", str(work / "labelled"), "--init", str(work / "mae"), "--out", str(out)]
        assert main([*words, "--epochs", "1", "--batch-size", "4"]) == 0
    return out


def test_verify_their_onnx(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = exported(work, "full")
    theirs = onnx.load(bundle / "encoder.onnx")
    for node in theirs.graph.node:  # other names, as another exporter would give
        node.input[:] = ["pixel_values" if name == "images" else name for name in node.input]
        node.output[:] = ["last_hidden" if name == "tokens" else name for name in node.output]
        node.input[:] = ["last_hidden" if name == "tokens" else name for name in node.input]
    theirs.graph.input[0].name = "pixel_values"
    next(output for output in theirs.graph.output if output.name == "tokens").name = "last_hidden"
    onnx.save(theirs, tmp_path / "theirs.onnx")
    verify = example("verify_their_onnx").main
    assert verify([str(bundle), str(tmp_path / "theirs.onnx")]) == 0
    assert "last_hidden as tokens: cosine 1.0000000" in capsys.readouterr().out
    norm = next(tensor for tensor in theirs.graph.initializer if tensor.name == "norm.weight")
    norm.CopyFrom(numpy_helper.from_array(1.1 * numpy_helper.to_array(norm), norm.name))
    onnx.save(theirs, tmp_path / "theirs.onnx")
    assert verify([str(bundle), str(tmp_path / "theirs.onnx")]) == 1
    assert "cls: max_abs" in capsys.readouterr().out
