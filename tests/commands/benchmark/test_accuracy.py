"""What `mae-deploy benchmark` says that dropped patches cost, against the same arithmetic in NumPy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mae_deploy.cli import main
from mae_deploy.images.find import find_images
from mae_deploy.images.read import Array, read_image
from mae_deploy.runtime import Bundle
from mae_deploy.runtime.engines.base import Engine
from tests.data.image_folders import spoil, write_noise
from tests.runtime.tiny_bundle import N, golden_inputs, reference, write_bundle

Report = dict[str, Any]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Report]:
    """The report of a benchmark, and what it said on stderr as `said`."""

    def call(*arguments: str | Path) -> Report:
        assert main(["benchmark", *map(str, arguments), "--repeats", "1", "--warmup", "0", "--no-probe", "--json"]) == 0
        captured = capsys.readouterr()
        return {**json.loads(captured.out), "said": captured.err}

    return call


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Twelve images in the folders of three of the classes."""
    for label, (low, high) in {"class-0": (0, 60), "class-7": (200, 256), "class-10": (0, 256)}.items():
        write_noise(tmp_path / "labelled" / label, 4, first=int(label[6:]) * 10, low=low, high=high)
    return tmp_path / "labelled"


def patches(num_keep: int, num_images: int, seed: int = 0) -> Array:
    return np.stack([np.random.default_rng((seed, index)).permutation(N)[:num_keep] for index in range(num_images)])


def cosine(images: Array, num_keep: int, name: str = "pooled", seed: int = 0) -> float:
    """The mean cosine of some patches' features with all patches', in NumPy."""
    some, every = reference(images, patches(num_keep, len(images), seed))[name], reference(images)[name]
    return float(np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(some, every, strict=True)]))


def cosines(report: Report) -> list[float | None]:
    return [row["cosine"] for row in report["rows"]]


def test_cosine_on_the_golden_samples(tmp_path: Path, run: Callable[..., Report]) -> None:
    images = golden_inputs(visible=True)["images"]
    report = run(write_bundle(tmp_path / "bundle"), "--keep", "2,9,21", "--batch-size", "1,3", "--seed", "5")
    expected = [cosine(images, K, seed=5) for K in (2, 9, 21)]
    assert cosines(report) == pytest.approx(expected * 2, abs=1e-6)
    assert expected[0] < expected[1] < 0.999
    assert expected[2] == pytest.approx(1)
    assert (report["images"], {row["top1"] for row in report["rows"]}) == ("golden samples", {None})


@pytest.mark.parametrize(("outputs", "name"), [(["tokens", "cls"], "cls"), (["logits", "pooled", "cls"], "pooled")])
def test_the_features_that_a_graph_has(
    tmp_path: Path, outputs: list[str], name: str, run: Callable[..., Report]
) -> None:
    report = run(write_bundle(tmp_path / "bundle", outputs=outputs), "--keep", "3")
    assert cosines(report) == [pytest.approx(cosine(golden_inputs(visible=True)["images"], 3, name), abs=1e-6)]


def test_without_features(tmp_path: Path, labelled: Path, run: Callable[..., Report]) -> None:
    assert cosines(run(write_bundle(tmp_path / "tokens", outputs=["tokens"]))) == [None]
    report = run(write_bundle(tmp_path / "logits", outputs=["logits"]), "--images", labelled)
    assert cosines(report) == [None]
    assert report["rows"][0]["top1"] is not None


def test_a_graph_that_cannot_take_all_patches_is_compared_with_one_of_the_same_weights(
    tmp_path: Path, run: Callable[..., Report]
) -> None:
    def other_weights(manifest: dict[str, Any]) -> None:
        manifest["provenance"] = {"checkpoint": "another"}

    fixed, few = (
        write_bundle(tmp_path / "fixed", keep=6, batch=2),
        write_bundle(tmp_path / "few", profile_keep=(1, 4, 9)),
    )
    full = write_bundle(tmp_path / "full", token_mode="full")
    expected = pytest.approx(cosine(golden_inputs(visible=True)["images"], 6), abs=1e-6)
    assert cosines(run(fixed, few, full, "--keep", "6")) == [expected, expected, 1]
    assert cosines(run(fixed, few, "--keep", "6")) == [None, None]
    assert cosines(run(fixed, write_bundle(tmp_path / "stranger", token_mode="full", change=other_weights))) == [
        None,
        1,
    ]
    assert cosines(run(fixed, write_bundle(tmp_path / "int8", token_mode="full", precision="int8"))) == [expected, 1]
    assert cosines(run(fixed, write_bundle(tmp_path / "byte", token_mode="full", images="uint8"))) == [None, 1], (
        "other golden images"
    )


def test_the_features_of_fp32_are_what_all_are_compared_with(tmp_path: Path, run: Callable[..., Report]) -> None:
    coarse, fine = (
        write_bundle(tmp_path / "coarse", token_mode="full", precision="int8", bits=2),
        write_bundle(tmp_path / "fine"),
    )
    alone = cosines(run(coarse))
    assert alone == [1]
    for bundles in ((coarse, fine), (fine, coarse)):
        found = dict(zip(bundles, cosines(run(*bundles, "--keep", str(N))), strict=True))
        assert found[fine] == pytest.approx(1)
        assert (found[coarse] or 1) < 0.9999


def test_every_graph_sees_the_photos_as_it_takes_them(
    tmp_path: Path, labelled: Path, run: Callable[..., Report]
) -> None:
    bundles = [
        write_bundle(tmp_path / "float"),
        write_bundle(tmp_path / "byte", images="uint8"),
        write_bundle(tmp_path / "ragged", token_mode="ragged", keep=8),
        write_bundle(tmp_path / "fixed", keep=8, batch=5),
    ]
    preprocess = Bundle.load(bundles[0]).preprocess
    images = preprocess([read_image(path) for path in find_images(labelled)])
    report = run(*bundles, "--images", labelled, "--keep", "8")
    expected = pytest.approx(cosine(images, 8), abs=1e-6)
    assert cosines(report) == [expected] * 4
    assert report["images"] == f"12 images of {labelled}"


def test_top1(tmp_path: Path, labelled: Path, run: Callable[..., Report]) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    paths = find_images(labelled)
    labels = np.array([int(path.parent.name[6:]) for path in paths])
    images = Bundle.load(bundle).preprocess([read_image(path) for path in paths])
    # Labels that the network half agrees with, else nothing would be told apart.
    answers = reference(images, patches(N, 12))["logits"].argmax(1)
    for path, label, answer in list(zip(paths, labels, answers, strict=True))[::2]:
        (labelled / f"class-{answer}").mkdir(exist_ok=True)
        path.rename(labelled / f"class-{answer}" / f"{label}-{path.name}")
    paths = find_images(labelled)
    labels = np.array([int(path.parent.name[6:]) for path in paths])
    images = Bundle.load(bundle).preprocess([read_image(path) for path in paths])
    found = [row["top1"] for row in run(bundle, "--images", labelled, "--keep", "4,21")["rows"]]
    expected = [float((reference(images, patches(K, 12))["logits"].argmax(1) == labels).mean()) for K in (4, 21)]
    assert found == expected
    assert 0 < expected[0] < expected[1] < 1


def test_images_without_labels_or_of_other_classes(tmp_path: Path, labelled: Path, run: Callable[..., Report]) -> None:
    bundle, other = write_bundle(tmp_path / "bundle"), write_bundle(tmp_path / "other", token_mode="full")
    (labelled / "class-7").rename(labelled / "unicorn")
    report = run(bundle, other, "--images", labelled, "--keep", "3,4")
    assert {row["top1"] for row in report["rows"]} == {None}
    lines = [line for line in report["said"].splitlines() if line.startswith("no top-1: ")]
    assert lines == [
        f"no top-1: 'unicorn' of {labelled} is not named after a class of {path}" for path in (bundle, other)
    ]
    (photo, *_) = find_images(labelled)
    assert f"no top-1: '{photo.name}' of {photo.parent}" in run(bundle, "--images", photo.parent)["said"]
    assert "no top-1" not in run(bundle, "--images", photo)["said"]  # its folder is a class
    assert (
        "no top-1"
        not in run(
            write_bundle(tmp_path / "nameless", change=lambda manifest: manifest.update(class_names=None)),
            "--images",
            photo,
        )["said"]
    )


def test_some_of_the_images_spread_over_the_folder(
    tmp_path: Path, labelled: Path, run: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    original = Engine.run

    def spy(self: Engine, inputs: Any, outputs: Any = None) -> Any:
        if outputs is not None:
            seen.append(len(inputs["images"]))
        return original(self, inputs, outputs)

    monkeypatch.setattr(Engine, "run", spy)
    bundle = write_bundle(tmp_path / "bundle")
    spoil(labelled / "class-10" / "100.png")
    report = run(bundle, "--images", labelled, "--num-images", "3")
    assert report["images"] == f"3 images of {labelled}"
    assert report["said"].count("skipped ") == 1
    assert f"skipped {labelled / 'class-10' / '100.png'}: " in report["said"]
    preprocess = Bundle.load(bundle).preprocess
    images = preprocess([read_image(labelled / name) for name in ("class-0/00.png", "class-7/70.png")])
    assert cosines(report) == [pytest.approx(cosine(images, N // 4), abs=1e-6)]
    assert set(seen) == {8}, "calls are of eight images, the last one filled up"


def test_no_image_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_noise(tmp_path / "photos", 1)
    spoil(tmp_path / "photos" / "00.png")
    assert (
        main(["benchmark", str(write_bundle(tmp_path / "bundle")), "--images", str(tmp_path / "photos"), "--no-probe"])
        == 1
    )
    assert f"error: none of 1 images of {tmp_path / 'photos'} can be read\n" in capsys.readouterr().err


def test_features_that_are_no_numbers(tmp_path: Path, run: Callable[..., Report]) -> None:
    assert cosines(run(write_bundle(tmp_path / "bundle", flaw="nan"), "--keep", "3")) == [None]
