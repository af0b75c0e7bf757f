"""From what the user typed as DATA to the images that a run trains on."""

from __future__ import annotations

from mae_deploy.data.config import DataConfig
from mae_deploy.data.dataset import ImageDataset
from mae_deploy.data.sources.base import ImageSource
from mae_deploy.data.sources.open import unlabelled_images
from mae_deploy.data.sources.patterns import is_streamed
from mae_deploy.data.sources.splits import announce, announce_line
from mae_deploy.data.streams import ShardStream
from mae_deploy.data.transforms import Transform


def open_training(data: str, transform: Transform, config: DataConfig, *, seed: int) -> ImageDataset | ShardStream:
    """Unlabelled images to train on: a folder, shards, a Hugging Face data set, or shards streamed from URLs and pipes.

    Raises:
        ConfigError: nothing is there, or a stream whose epoch nobody has counted.
    """
    if is_streamed(data):
        stream = ShardStream(data, transform, config, seed=seed)
        announce_line(f"{data}: {len(stream.urls)} streamed shards, {len(stream)} images an epoch")
        stream.check_pixels()
        return stream
    images = unlabelled_images(data, config.columns)
    announce(data, {"": images})
    return train_dataset(images, transform, config, seed=seed)


def train_dataset(
    images: ImageSource, transform: Transform, config: DataConfig, *, seed: int, fixed_views: int = 0, earlier: int = 0
) -> ImageDataset:
    """Images that can be read in any order, as a run trains on them.

    Args:
        fixed_views: see `ImageDataset`, as of
        earlier:
    """
    return ImageDataset(
        images,
        transform,
        seed=seed,
        replace_unreadable=True,
        cache=config.cache,
        views=config.repeated_aug,
        fixed_views=fixed_views,
        earlier=earlier,
    )
