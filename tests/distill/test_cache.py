"""The cache gives what the teacher gives, to FP16's rounding, whatever is on the disk; the teacher answers only what is
not.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mae_deploy.data.dataset import ImageDataset
from mae_deploy.distill.cache import CachedTeacher
from mae_deploy.distill.config import CacheConfig
from mae_deploy.errors import ConfigError
from mae_deploy.models.masking import random_masking
from mae_deploy.models.taps import Tap, Taps
from tests.distill.patch_teacher import CROP, SPEC, N, PatchTeacher, ViewMasks, batch_of, dataset_of, mask, opened

HALF = 2**-11
"""Rounding to 11 bits."""


@pytest.fixture
def dataset(images: Path) -> ImageDataset:
    """Eleven images in two views."""
    return dataset_of(images)


def assert_close(found: Taps, expected: Taps) -> None:
    assert found.keys() == expected.keys()
    for tap, value in expected.items():
        assert found[tap].dtype == torch.float32
        torch.testing.assert_close(found[tap], value, rtol=HALF, atol=2**-24)


def assert_equal(found: Taps, expected: Taps) -> None:
    assert found.keys() == expected.keys()
    assert [tap for tap in expected if not torch.equal(found[tap], expected[tap])] == []


# --- answers ---------------------------------------------------------------------------------------------------------


def test_the_second_answer_is_the_first_without_the_teacher(dataset: ImageDataset, tmp_path: Path) -> None:
    teacher = PatchTeacher()
    cached = opened(teacher, dataset, tmp_path)
    batches = [batch_of(3, 7, 0), batch_of(3, 10, 7, view=1)]
    first = [cached(batch, mask(batch), whole=False) for batch in batches]
    assert teacher.shown == [3, 3]
    for batch, taps in zip(batches, first, strict=True):
        assert taps[Tap("tokens", 2)].shape == (3, 1 + 6, 12)
        assert_close(taps, PatchTeacher()(batch, mask(batch), whole=False))
    for again in (cached, opened(teacher, dataset, tmp_path)):
        for batch, taps in zip(batches, first, strict=True):
            assert_equal(again(batch, mask(batch), whole=False), taps)
    assert teacher.shown == []
    assert (cached.read, cached.computed) == (6, 6)


def test_only_what_is_not_there_is_computed(dataset: ImageDataset, tmp_path: Path) -> None:
    teacher = PatchTeacher()
    cached = opened(teacher, dataset, tmp_path)
    first = cached(batch_of(4, 2), mask(batch_of(4, 2)), whole=False)
    mixed = batch_of(9, 2, 0, 4, 6)
    found = cached(mixed, mask(mixed), whole=False)
    assert teacher.shown == [2, 3]
    assert_close(found, PatchTeacher()(mixed, mask(mixed), whole=False))
    assert_equal({tap: value[[3, 1]] for tap, value in found.items()}, first)
    assert_equal(cached(mixed, mask(mixed), whole=False), found)
    assert teacher.shown == [2, 3]


def test_a_damaged_answer_is_computed_again(dataset: ImageDataset, tmp_path: Path) -> None:
    teacher = PatchTeacher()
    cached, batch = opened(teacher, dataset, tmp_path), batch_of(1, 8, 5)
    first = cached(batch, mask(batch), whole=False)
    (file,) = tmp_path.rglob("rows-*.bin")
    content = bytearray(file.read_bytes())
    content[8 * cached.store.stride + 33] ^= 1
    file.write_bytes(content)
    for shown in ([3, 1], [3, 1]):  # and kept
        assert_equal(cached(batch, mask(batch), whole=False), first)
        assert teacher.shown == shown


def test_patches_that_each_step_draws_are_picked_of_the_whole_image(dataset: ImageDataset, tmp_path: Path) -> None:
    teacher = PatchTeacher()
    cached, batch = opened(teacher, dataset, tmp_path, masks=ViewMasks(each_step=True), whole=True), batch_of(1, 8, 5)
    for ratio in (0.2, 0.8, 0.5):
        masking = random_masking(torch.rand(3, N, generator=torch.Generator().manual_seed(int(10 * ratio))), ratio)
        assert_close(cached(batch, masking, whole=True), PatchTeacher()(batch, masking, whole=True))
    assert cached(batch, None, whole=True)[Tap("tokens", 2)].shape == (3, 1 + N, 12)
    assert teacher.shown == [3]


def test_numbers_beyond_half_precision_are_limited(dataset: ImageDataset, tmp_path: Path) -> None:
    teacher = PatchTeacher()
    cached, batch = opened(teacher, dataset, tmp_path), batch_of(1)
    teacher.factor = 1e9
    expected = teacher(batch, None, whole=True)[Tap("logits")].sign() * 65504
    for _ in range(2):
        assert torch.equal(cached(batch, mask(batch), whole=False)[Tap("logits")], expected)


def test_a_disk_that_fills_up_ends_the_cache_and_not_the_run(
    dataset: ImageDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = PatchTeacher()
    cached = opened(teacher, dataset, tmp_path)
    (cached.store.folder / "rows-00000.bin").symlink_to("/dev/full")
    batch = batch_of(1, 8, 5)
    for _ in range(2):
        assert_close(cached(batch, mask(batch), whole=False), PatchTeacher()(batch, mask(batch), whole=False))
    assert teacher.shown == [3, 3]
    cached.close()
    said = [line for line in capsys.readouterr().err.splitlines() if "cannot write to" in line]
    assert len(said) == 1
    assert "No space left on device" in said[0]


# --- folders ---------------------------------------------------------------------------------------------------------


def test_answers_to_something_else_lie_in_another_folder(images: Path, tmp_path: Path) -> None:
    folder, dataset = tmp_path / "cache", dataset_of(images)
    whole = opened(PatchTeacher(), dataset, folder).store.folder
    others: list[CachedTeacher] = [
        opened(PatchTeacher("b"), dataset, folder),
        opened(PatchTeacher(), dataset_of(images, seed=6), folder),
        opened(PatchTeacher(), dataset, folder, augment=replace(CROP, hflip=0.0)),
        opened(PatchTeacher(), dataset, folder, masks=ViewMasks(0.4)),
        opened(PatchTeacher(), dataset, folder, whole=True),
    ]
    (images / "00.png").unlink()
    others.append(opened(PatchTeacher(), dataset_of(images), folder))
    dataset.transform = replace(dataset.transform, spec=replace(SPEC, mean=(0.1, 0.2, 0.3)))
    others.append(opened(PatchTeacher(), dataset, folder))
    assert len({whole, *(other.store.folder for other in others)}) == 8


def test_the_folder_says_what_it_holds(dataset: ImageDataset, tmp_path: Path) -> None:
    cached = opened(PatchTeacher(), dataset, tmp_path)
    index = json.loads((cached.store.folder / "index.json").read_text(encoding="utf-8"))
    assert index["taps"] == [
        {"kind": "logits", "block": 0, "shape": [2]},
        {"kind": "tokens", "block": 2, "shape": [7, 12]},
    ]
    assert (index["of"]["teacher"], index["of"]["seed"], index["of"]["masks"]) == ("a", 5, {"mask_ratio": 0.6})
    assert cached.store.stride == 8 + 2 * (2 + 7 * 12)
    # Without it, or with half of it, the teacher is asked once more.
    (cached.store.folder / "index.json").write_text('{"of":', encoding="utf-8")
    assert opened(PatchTeacher(), dataset, tmp_path).parts == cached.parts


def test_the_size_is_said_before_the_start_and_the_use_at_the_end(
    dataset: ImageDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cached = opened(PatchTeacher(), dataset, tmp_path)
    assert "teacher cache: 22 answers of 180 B: 3.96 kB, 0 B of it in " in capsys.readouterr().err
    for batch in (batch_of(1, 2, 3), batch_of(2, 4)):
        cached(batch, mask(batch), whole=False)
    cached.close()
    assert "teacher cache: 1 answers read, 4 computed; " in capsys.readouterr().err
    opened(PatchTeacher(), dataset, tmp_path, main=False)
    assert capsys.readouterr().err == ""


def test_no_room_on_the_disk(dataset: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3959))
    with pytest.raises(
        ConfigError, match=r"22 answers of 180 B take 3\.96 kB, 0 B are there, 3\.96 kB are free"
    ) as caught:
        opened(PatchTeacher(), dataset, tmp_path)
    assert "fewer --fixed-views" in str(caught.value.hint)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3960))
    opened(PatchTeacher(), dataset, tmp_path)


def test_a_folder_that_is_a_file(dataset: ImageDataset, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"--teacher-cache .*cache: .*Not a directory"):
        opened(PatchTeacher(), dataset, tmp_path / "cache")
    assert (tmp_path / "cache").read_text(encoding="utf-8") == "mine"


def test_files_that_cannot_be_opened_end_the_cache_and_not_the_run(
    dataset: ImageDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cached, batch = opened(PatchTeacher(), dataset, tmp_path), batch_of(1, 8, 5)
    (cached.store.folder / "rows-00000.bin").mkdir()
    assert_close(cached(batch, mask(batch), whole=False), PatchTeacher()(batch, mask(batch), whole=False))
    assert "cannot write to" in capsys.readouterr().err


def test_visible_patches_that_each_step_draws_cannot_be_kept(dataset: ImageDataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--keep-ratio draws others in each step"):
        opened(PatchTeacher(), dataset, tmp_path, masks=ViewMasks(each_step=True))
    opened(PatchTeacher(), dataset, tmp_path, masks=ViewMasks(ever=False))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fixed_views": -1}, "--fixed-views must be at least 0, got -1"),
        ({"teacher_cache": Path("cache")}, "without --fixed-views every epoch has views of its own"),
    ],
)
def test_impossible_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CacheConfig(**values)


def test_views_of_an_image_have_masks_of_their_own() -> None:
    """And the same ones each time, whatever else is in the batch."""
    ids: list[Tensor] = [mask(batch_of(3, 7, view=view)).ids_keep for view in (0, 1)]
    assert not torch.equal(ids[0], ids[1])
    assert not torch.equal(ids[0][0], ids[0][1])
    assert torch.equal(mask(batch_of(2, 7, 3)).ids_keep[[2, 1]], ids[0])
