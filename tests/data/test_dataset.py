"""A sample depends on the seed, the epoch and the file and on nothing else; broken files are named, not fatal."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mae_deploy.data.config import CropConfig
from mae_deploy.data.dataset import Batch, ImageDataset, Sample, collate, eval_loader
from mae_deploy.data.order import Key, RunSlice
from mae_deploy.data.sources.base import UNLABELLED
from mae_deploy.data.sources.files import ImageList
from mae_deploy.data.sources.files import image_files as unlabelled_images
from mae_deploy.data.sources.open import labelled_images
from mae_deploy.data.transforms import eval_transform, train_transform
from mae_deploy.errors import ConfigError
from mae_deploy.images.preprocess import default_preprocess
from tests.data.image_folders import SIZE, spoil, write_classes, write_noise


def dataset_of(
    images: ImageList, *, seed: int = 3, replace_unreadable: bool = True, cache: bool = False
) -> ImageDataset:
    transform = train_transform(default_preprocess((10, 15)), CropConfig(), auto_augment="rand-m9-mstd0.5-inc1")
    return ImageDataset(images, transform, seed=seed, replace_unreadable=replace_unreadable, cache=cache)


def image_of(sample: Sample) -> Tensor:
    assert sample.image is not None
    return sample.image


# --- samples ---------------------------------------------------------------------------------------------------------


def test_a_sample_depends_on_seed_epoch_and_item_alone(images: Path) -> None:
    found = unlabelled_images(images)
    dataset = dataset_of(found)
    first = image_of(dataset[Key(2, 5)])
    assert (first.shape, first.dtype) == ((3, 10, 15), torch.uint8)
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    _ = dataset[Key(0, 1)]
    assert torch.equal(image_of(dataset[Key(2, 5)]), first)
    assert torch.equal(image_of(dataset_of(found, cache=True)[Key(2, 5)]), first)
    assert not torch.equal(image_of(dataset[Key(3, 5)]), first)
    assert not torch.equal(image_of(dataset[Key(2, 6)]), first)
    assert not torch.equal(image_of(dataset_of(found, seed=4)[Key(2, 5)]), first)


def test_an_image_and_one_before_it_are_augmented_alike(tmp_path: Path) -> None:
    """Each image is of one level of grey, so that a pair tells which two they are, and the crop which part."""
    for number in range(9):
        ramp = np.broadcast_to(np.arange(20, dtype=np.uint8)[None, :, None], (15, 20, 3)) + 25 * number
        Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / f"{number}.png")
    found = unlabelled_images(tmp_path)
    transform = train_transform(default_preprocess((10, 15)), CropConfig())
    pairs = ImageDataset(found, transform, seed=3, replace_unreadable=True, earlier=3)
    alone = ImageDataset(found, transform, seed=3, replace_unreadable=True)
    before = set()
    for epoch in range(8):
        for item in range(9):
            pair = image_of(pairs[Key(epoch, item)])
            assert torch.equal(pair[1], image_of(alone[Key(epoch, item)]))
            (distance,) = set((pair[1].int() - pair[0].int()).flatten().tolist())
            before.add((item, distance // 25))
    assert before == {(item, back if back <= item else 0) for item in range(9) for back in (1, 2, 3)}
    spoil(tmp_path / "4.png")
    pair = image_of(ImageDataset(found, transform, seed=3, replace_unreadable=True, earlier=1)[Key(0, 5)])
    assert torch.equal(pair[0], pair[1])


def test_the_cache_keeps_what_it_decoded(images: Path) -> None:
    found = unlabelled_images(images)
    dataset = dataset_of(found, cache=True)
    first = image_of(dataset[Key(0, 5)])
    found.paths[5].unlink()
    assert torch.equal(image_of(dataset[Key(0, 5)]), first)
    assert dataset_of(found, cache=True)[Key(0, 5)].unreadable != ()


def test_in_training_the_next_readable_image_takes_the_place(images: Path) -> None:
    found = unlabelled_images(images)
    labels = tuple(range(100, 111))
    found = ImageList(found.root, found.paths, labels)
    broken = [spoil(found.paths[10]), spoil(found.paths[0])]
    sample = dataset_of(found)[Key(0, 10)]
    assert sample.label == 101
    assert [line.partition(":")[0] for line in sample.unreadable] == [str(path) for path in broken]
    assert image_of(sample).shape == (3, 10, 15)


def test_in_evaluation_it_is_left_out(images: Path) -> None:
    found = unlabelled_images(images)
    spoil(found.paths[3])
    dataset = dataset_of(found, replace_unreadable=False)
    assert dataset[Key(0, 3)].image is None
    batch = collate([dataset[Key(0, index)] for index in range(2, 6)])
    assert batch.images.shape == (3, 3, 10, 15)
    assert torch.equal(batch.images[1], image_of(dataset[Key(0, 4)]))
    assert batch.labels.tolist() == [UNLABELLED] * 3
    assert len(batch.unreadable) == 1


def test_all_unreadable(images: Path) -> None:
    found = unlabelled_images(images)
    for path in found.paths:
        spoil(path)
    sample = dataset_of(found)[Key(0, 3)]
    assert sample.image is None
    assert len(sample.unreadable) == 11
    batch = collate([sample])
    assert (len(batch.images), len(batch.labels), len(batch.unreadable)) == (0, 0, 11)


# --- fixed views -----------------------------------------------------------------------------------------------------


def views_of(images: ImageList, fixed_views: int, *, repeated: int = 1) -> ImageDataset:
    dataset = dataset_of(images)
    return ImageDataset(
        images, dataset.transform, seed=3, replace_unreadable=True, views=repeated, fixed_views=fixed_views
    )


def test_fixed_views_come_again(images: Path) -> None:
    found = unlabelled_images(images)
    free, fixed = dataset_of(found), views_of(found, 3)
    for epoch in range(7):
        sample = fixed[Key(epoch, 5)]
        assert (sample.item, sample.view) == (5, epoch % 3)
        assert torch.equal(image_of(sample), image_of(free[Key(epoch % 3, 5)]))  # and are those of the first epochs
    assert len({image_of(fixed[Key(epoch, 5)]).numpy().tobytes() for epoch in range(7)}) == 3
    assert (free[Key(4, 6)].item, free[Key(4, 6)].view) == (6, 0)


def test_a_batch_takes_fixed_views_in_turn(images: Path) -> None:
    """With repeated augmentation, too, all of them come up."""
    fixed = views_of(unlabelled_images(images), 3, repeated=2)
    assert [[fixed[Key(epoch, 1, view)].view for view in range(2)] for epoch in range(3)] == [[0, 1], [2, 0], [1, 2]]
    with pytest.raises(ConfigError, match="--fixed-views 2 is less than --repeated-aug 3"):
        views_of(unlabelled_images(images), 2, repeated=3)


def test_in_the_place_of_a_broken_image_stands_a_view_of_the_next(images: Path) -> None:
    """The same as in its own place, so that what is known of it holds in both."""
    found = unlabelled_images(images)
    spoil(found.paths[10])
    fixed = views_of(found, 2)
    for epoch in range(2):
        instead, own = fixed[Key(epoch, 10)], fixed[Key(epoch, 0)]
        assert (instead.item, instead.view) == (own.item, own.view) == (0, epoch)
        assert torch.equal(image_of(instead), image_of(own))


def test_batches_say_which_images_and_views_they_hold(images: Path) -> None:
    fixed = views_of(unlabelled_images(images), 2)
    where = RunSlice(batch_size=4, batches_per_epoch=2, start=0, stop=6)
    batches = list(fixed.stream(where, seed=1, num_workers=0, pin_memory=False))
    assert [batch.views.tolist() for batch in batches] == [[view] * 4 for view in (0, 0, 1, 1, 0, 0)]
    seen = [torch.cat([first.items, second.items]) for first, second in zip(batches[::2], batches[1::2], strict=True)]
    assert all(items.unique().numel() == 8 for items in seen)
    for batch in batches:
        assert batch.items.dtype == batch.views.dtype == torch.int64
        for image, item, view in zip(batch.images, batch.items.tolist(), batch.views.tolist(), strict=True):
            assert torch.equal(image, image_of(fixed[Key(view, item)]))


# --- lists of files --------------------------------------------------------------------------------------------------


def test_unlabelled_images_of_a_tree_and_of_one_file(images: Path) -> None:
    found = unlabelled_images(images)
    assert found.root == images
    assert [path.relative_to(images).as_posix() for path in found.paths] == [f"a/{n:02d}.png" for n in range(7)] + [
        f"b/{n:02d}.png" for n in range(7, 11)
    ]
    assert found.labels == (UNLABELLED,) * 11
    one = unlabelled_images(images / "a" / "03.png")
    assert (one.root, one.paths) == (images / "a", (images / "a" / "03.png",))


def test_labels_follow_the_class_names(tmp_path: Path) -> None:
    write_classes(tmp_path, train=3)
    (tmp_path / "train" / ".hidden").mkdir()
    (tmp_path / "train" / "README.txt").touch()
    train = labelled_images(tmp_path, "train")
    assert train.class_names == ("dark", "light")
    assert isinstance(train, ImageList)
    assert train.labels == (0, 0, 0, 1, 1, 1)
    assert [path.parent.name for path in train.paths] == ["dark"] * 3 + ["light"] * 3
    assert labelled_images(tmp_path, "train", ("light", "other", "dark")).labels == (2, 2, 2, 0, 0, 0)


def test_a_class_without_validation_images_keeps_its_number(tmp_path: Path) -> None:
    write_noise(tmp_path / "val" / "light", 2)
    val = labelled_images(tmp_path, "val", ("dark", "light"))
    assert (val.labels, val.class_names) == ((1, 1), ("dark", "light"))


def test_labelled_data_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no train in .*, where there is: nothing") as caught:
        labelled_images(tmp_path, "train")
    assert caught.value.hint is not None
    assert "DATA/train/<class>" in caught.value.hint
    write_noise(tmp_path / "train", 1)
    with pytest.raises(ConfigError, match=r"no class folders with images in .*: 1 images in no class folder such as"):
        labelled_images(tmp_path, "train")
    (tmp_path / "train" / "dark").mkdir()
    with pytest.raises(ConfigError, match=r"1 class folders without images such as dark"):
        labelled_images(tmp_path, "train")


def test_a_class_that_training_did_not_have(tmp_path: Path) -> None:
    write_classes(tmp_path)
    write_noise(tmp_path / "val" / "grey", 1)
    with pytest.raises(ConfigError, match="grey is not one of the 2 classes: dark, light"):
        labelled_images(tmp_path, "val", ("dark", "light"))


# --- fingerprint -----------------------------------------------------------------------------------------------------


def test_the_fingerprint_sees_names_sizes_and_labels(images: Path) -> None:
    found = unlabelled_images(images)
    before = found.fingerprint()
    assert before["images"] == 11
    assert unlabelled_images(images).fingerprint() == before
    assert ImageList(found.root, found.paths, (0,) * 11).fingerprint() != before
    moved = images / "a" / "0.png"
    found.paths[0].rename(moved)
    renamed = unlabelled_images(images).fingerprint()
    assert renamed != before
    moved.rename(found.paths[0])
    assert unlabelled_images(images).fingerprint() == before
    with found.paths[0].open("ab") as file:
        file.write(b"\0")
    assert unlabelled_images(images).fingerprint() != before


def test_the_fingerprint_does_not_depend_on_the_place(tmp_path: Path) -> None:
    write_noise(tmp_path / "here", 2)
    write_noise(tmp_path / "there" / "deep", 2)
    assert (
        unlabelled_images(tmp_path / "here").fingerprint()
        == unlabelled_images(tmp_path / "there" / "deep").fingerprint()
    )


def test_the_fingerprint_of_broken_links_and_odd_names(tmp_path: Path) -> None:
    """Both are reported when they are read; a crash before the first step would hide which file it was."""
    write_noise(tmp_path, 1)
    before = unlabelled_images(tmp_path).fingerprint()
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    Image.new("L", (1, 1)).save(tmp_path / os.fsdecode(b"\xff.png"))
    after = unlabelled_images(tmp_path).fingerprint()
    assert after["images"] == 3
    assert after["sha256"] != before["sha256"]


# --- repeated augmentation, names ------------------------------------------------------------------------------------


def test_repeated_views_follow_one_another_and_are_decoded_once(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    read = ImageList.read

    def counted(self: ImageList, index: int, *more: Any) -> Any:
        reads.append(index)
        return read(self, index, *more)

    monkeypatch.setattr(ImageList, "read", counted)
    dataset = ImageDataset(
        unlabelled_images(images),
        train_transform(default_preprocess((10, 15)), CropConfig()),
        seed=3,
        replace_unreadable=True,
        views=3,
    )
    batches = list(dataset.stream(RunSlice(5, 2, 0, 2), seed=0, num_workers=0, pin_memory=False))
    names = [name for batch in batches for name in batch.names]
    assert [len(set(names[first : first + 3])) for first in (0, 3, 6)] == [1, 1, 1]
    assert len(set(names)) == len(reads) == 4
    assert not torch.equal(batches[0].images[0], batches[0].images[1])
    assert len(dataset) == 11


def test_names_are_of_the_images_that_were_read(images: Path) -> None:
    found = unlabelled_images(images)
    spoil(found.paths[2])
    batch = collate([dataset_of(found)[Key(0, index)] for index in (1, 2)])
    assert batch.names == (str(found.paths[1]), str(found.paths[3]))


# --- loaders ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")  # where there is one core
def test_any_number_of_workers_gives_the_same_samples(images: Path) -> None:
    def batches(num_workers: int) -> list[Batch]:
        spec = default_preprocess((10, 15))
        transform = train_transform(spec, CropConfig(), auto_augment="rand-m9-mstd0.5-inc1")
        dataset = ImageDataset(unlabelled_images(images), transform, seed=5, replace_unreadable=True)
        return list(dataset.stream(RunSlice(5, 2, 1, 4), seed=5, num_workers=num_workers, pin_memory=False))

    alone, shared = batches(0), batches(2)
    assert len(alone) == len(shared) == 3
    assert all(torch.equal(a.images, b.images) for a, b in zip(alone, shared, strict=True))


def test_evaluation_takes_each_image_once_in_order(images: Path) -> None:
    found = unlabelled_images(images)
    dataset = ImageDataset(found, eval_transform(default_preprocess(SIZE)), seed=0, replace_unreadable=False)
    alone = torch.cat([batch.images for batch in eval_loader(dataset, batch_size=4, num_workers=0)])
    assert torch.equal(
        alone, torch.stack([image for index in range(11) if (image := dataset[Key(0, index)].image) is not None])
    )
    shares = [
        torch.cat(
            [batch.images for batch in eval_loader(dataset, batch_size=4, num_workers=0, rank=rank, world_size=3)]
        )
        for rank in range(3)
    ]
    assert [len(share) for share in shares] == [4, 4, 3]
    assert all(torch.equal(share, alone[rank::3]) for rank, share in enumerate(shares))
