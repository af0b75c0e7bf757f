"""What is trained on and validated with, and the line that says it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mae_deploy.data.config import ValidationConfig
from mae_deploy.data.sources.splits import announce, labelled_splits
from mae_deploy.errors import ConfigError
from tests.data.image_folders import write_classes, write_noise
from tests.data.sources.tiny_shards import write_shard


def test_one_line_says_what_was_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_classes(tmp_path)
    write_noise(tmp_path / "test" / "dark", 1)
    write_noise(tmp_path / "train", 1)
    (tmp_path / "train" / "dark" / "x.heic").touch()
    train, val = labelled_splits(tmp_path, ValidationConfig(), seed=0)
    assert (len(train), len(val)) == (12, 6)
    assert capsys.readouterr().err == (
        f"data: {tmp_path}: train 12 images of 2 classes (dark: 6, light: 6), val 6 images of 2 classes"
        " (dark: 3, light: 3); left out: 1 images in no class folder such as 00.png, 1 .heic (pip install pillow-heif)"
        " such as x.heic; not used: test\n"
    )


def test_many_classes_are_summed_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(9):
        write_noise(tmp_path / "train" / f"c{number}", number + 1)
    labelled_splits(tmp_path, ValidationConfig(val_share=0.5), seed=0)
    assert capsys.readouterr().err == (
        f"data: {tmp_path}: train 23 images of 9 classes (from 1 of c0 to 5 of c8), val 22 images of 8 of 9 classes"
        " (c1: 1, c2: 2, c3: 2, c4: 2, c5: 3, c6: 4, c7: 4, c8: 4)\n"
    )


def test_only_the_first_process_speaks(
    images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mae_deploy.data.sources.open import unlabelled_images

    monkeypatch.setenv("RANK", "1")
    announce(images, {"": unlabelled_images(images)})
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    announce(images, {"": unlabelled_images(images)})
    assert capsys.readouterr().err == f"data: {images}: 11 images\n"


def test_validation_with_another_split(tmp_path: Path) -> None:
    write_classes(tmp_path)
    (tmp_path / "val").rename(tmp_path / "held")
    _, val = labelled_splits(tmp_path, ValidationConfig(val_split="held"), seed=0)
    assert (len(val), val.class_names) == (6, ("dark", "light"))
    with pytest.raises(ConfigError, match=r"no test in .*: held/, train/"):
        labelled_splits(tmp_path, ValidationConfig(val_split="test"), seed=0)


@pytest.mark.parametrize("below", ["", "train"])
def test_validation_with_a_share_of_training(tmp_path: Path, below: str) -> None:
    for name in ("dark", "light"):
        write_noise(tmp_path / below / name, 10)
    with pytest.raises(ConfigError, match="no val in" if below else "no train in") as caught:
        labelled_splits(tmp_path, ValidationConfig(), seed=0)
    assert "--val-share 0.1" in str(caught.value.hint)
    train, val = labelled_splits(tmp_path, ValidationConfig(val_share=0.2), seed=0)
    assert sorted(val.labels) == [0, 0, 1, 1]
    assert len(train) == 16
    seeds = [labelled_splits(tmp_path, ValidationConfig(val_share=0.2), seed=seed)[1].fingerprint() for seed in (0, 1)]
    assert seeds[0] == val.fingerprint() != seeds[1]


def test_one_class_teaches_nothing(tmp_path: Path) -> None:
    write_noise(tmp_path / "train" / "images", 4)
    write_noise(tmp_path / "val" / "images", 2)
    with pytest.raises(ConfigError, match=r"all 4 images of .*train are of one class, images") as caught:
        labelled_splits(tmp_path, ValidationConfig(), seed=0)
    assert "images without classes are for pretrain" in str(caught.value.hint)
    for name, count in (("cat", 3), ("dog", 5)):
        write_noise(tmp_path / "train" / "images" / name, count)
    with pytest.raises(ConfigError, match=r"all 12 images of .*train are of one class, images") as caught:
        labelled_splits(tmp_path, ValidationConfig(), seed=0)
    assert "below" in str(caught.value.hint)
    assert "cat (3 images), dog (5 images)" in str(caught.value.hint)


def test_one_class_of_many_in_shards(images: Path, tmp_path: Path) -> None:
    png = next(images.rglob("*.png")).read_bytes()
    labelled = [(f"{number}.png", png) for number in range(3)] + [(f"{number}.cls", b"1") for number in range(3)]
    write_shard(tmp_path / "train" / "a.tar", labelled)
    (tmp_path / "classes.json").write_text('["cat", "dog"]')
    with pytest.raises(ConfigError, match=r"all 3 images of .* are of one class, dog"):
        labelled_splits(tmp_path, ValidationConfig(), seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val_share": 0.0}, "--val-share must be above 0 and below 1, got 0.0"),
        ({"val_share": 1.0}, "--val-share must be above 0 and below 1, got 1.0"),
        ({"val_share": 0.1, "val_split": "test"}, "--val-split test does not go with --val-share 0.1"),
        ({"val_split": "train"}, "--val-split train"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, float | str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ValidationConfig(**settings)  # type: ignore[arg-type]
