"""Every kind of data trains: a run on shards has the losses of a run on the folder that they were packed from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mae_deploy.data.config import CropConfig, DataConfig
from mae_deploy.data.dataset import ImageDataset
from mae_deploy.data.sources.open import unlabelled_images
from mae_deploy.data.training_set import open_training
from mae_deploy.data.transforms import train_transform
from mae_deploy.images.preprocess import default_preprocess
from mae_deploy.pretrain.finetune import run_finetune
from mae_deploy.pretrain.run import run_pretrain
from tests.data.image_folders import write_classes
from tests.data.sources.tiny_shards import Member, shards_of, write_shard
from tests.training.tiny_runs import finetuning, losses_of, pretraining


def test_folders_and_shards_take_the_same_settings(images: Path, tmp_path: Path) -> None:
    transform = train_transform(default_preprocess((10, 15)), CropConfig())
    for data in (images, shards_of(images, tmp_path / "shards")):
        dataset = open_training(str(data), transform, DataConfig(repeated_aug=3), seed=1)
        assert isinstance(dataset, ImageDataset)
        assert (len(dataset), dataset.views, dataset.fingerprint()["images"]) == (11, 3, 11)
        assert [getattr(image, "size", None) for image in dataset.first(2)] == [(13, 17)] * 2


def test_pretraining_on_shards_and_streams(images: Path, tmp_path: Path) -> None:
    shards = shards_of(images, tmp_path / "shards")
    run_pretrain(pretraining(images, tmp_path / "folder"))
    run_pretrain(pretraining(shards, tmp_path / "packed"))
    assert losses_of(tmp_path / "packed") == losses_of(tmp_path / "folder")
    settings: dict[str, Any] = {"images": DataConfig(num_workers=0, epoch_images=11)}
    run_pretrain(pretraining(Path(f"pipe:cat {shards}/shard-{{0..2}}.tar"), tmp_path / "streamed", **settings))
    assert len(losses_of(tmp_path / "streamed")) == 4
    assert (tmp_path / "streamed" / "reconstruction-0002.png").is_file()


def test_fine_tuning_on_shards(tmp_path: Path, pretrained: Path) -> None:
    classes = write_classes(tmp_path / "classes")
    for split in ("train", "val"):
        members: list[Member] = [
            (f"{file.parent.name}/{file.name}", file.read_bytes()) for file in sorted((classes / split).rglob("*.png"))
        ]
        write_shard(tmp_path / "packed" / f"{split}-0.tar", members)
    for data in (classes, tmp_path / "packed"):
        run_finetune(finetuning(data, tmp_path / f"run-{data.name}", pretrained))
    assert losses_of(tmp_path / "run-packed") == losses_of(tmp_path / "run-classes")


def test_a_run_within_its_data_is_resumed(images: Path) -> None:
    """Its pictures are no images: the data is what it was when the run began."""
    first = pretraining(images, images / "runs" / "mae")
    run_pretrain(first)
    assert sorted((images / "runs" / "mae").glob("*.png")) != []
    assert run_pretrain(replace(first, resume=True))["steps"] == 4
    assert len(unlabelled_images(images)) == 11
