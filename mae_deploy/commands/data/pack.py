"""`mae-deploy data pack`: folders and Hugging Face data sets as tar shards, smaller and without duplicates on
request.
"""

from __future__ import annotations

import io
import tarfile
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mae_deploy.commands.data.config import PackConfig
from mae_deploy.commands.data.drop import without
from mae_deploy.commands.data.survey import Seen, Survey, difference_hash, pixel_hash, surveying
from mae_deploy.config import fixed_settings
from mae_deploy.data.decode import decode
from mae_deploy.data.sources.base import UNLABELLED, ImageSource
from mae_deploy.data.sources.open import beside_splits, labelled_images, split_names, unlabelled_images
from mae_deploy.data.sources.pixels import check_pixels
from mae_deploy.data.sources.shards import CLASSES, FORMAT, INDEX
from mae_deploy.data.sources.splits import announce
from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.files import (
    atomic_path,
    read_json,
    refuse_to_overwrite,
    refuse_within,
    remove,
    sha256,
    write_json,
    write_text,
)
from mae_deploy.images.arrays import resize_and_cut
from mae_deploy.images.find import is_image_name
from mae_deploy.images.geometry import Placement
from mae_deploy.images.read import Array, UnreadableImage, is_image, suffix_of
from mae_deploy.progress import Bar, notice, progress
from mae_deploy.seeding import derive_seed

_WORK = ".pack"
"""Folder in OUT with what is known of the finished shards, until all are."""

_HEADER = tarfile.BLOCKSIZE
"""Bytes before a member's content, as its name is short."""


class _Packed(NamedTuple):
    """One image, ready to be written."""

    content: bytes
    suffix: str
    pixels: str
    perceptual_hash: int
    error: str | None = None


def run_pack(config: PackConfig) -> dict[str, Any]:
    """Write the shards that are not there yet, then their index.

    Raises:
        ConfigError: OUT holds something else.
        CheckFailed: too many unreadable images, or nothing is left.
    """
    refuse_within(config.out, Path(config.source), option="OUT")
    splits = _splits(config)
    dropped = 0
    if config.drop_like is not None:
        before = sum(map(len, splits.values()))
        splits = without(splits, config.drop_like)
        dropped = before - sum(map(len, splits.values()))
    for source in splits.values():
        check_pixels(source, config.in_chans, config.pixel_max)
    job = {
        "settings": fixed_settings(config),
        "source": {name: source.fingerprint() for name, source in splits.items()},
    }
    work = config.out / _WORK
    if (work / "job.json").is_file():
        if read_json(work / "job.json") != job:
            raise ConfigError(
                f"{config.out} was begun with other data or settings",
                hint="repeat the same options, or choose another OUT",
            )
    else:
        remove(work)  # of a kill before its first file
        refuse_to_overwrite(config.out, option="OUT", filled=True)
        write_json(work / "job.json", job)
    seen, records = Seen(near=config.dedup == "near"), dict[str, list[dict[str, Any]]]()
    with progress("pack", sum(map(len, splits.values()))) as bar:
        for name, source in splits.items():
            records[name] = _Packer(config, name, source, seen, bar, work).run()
    return {**_finish(config, splits, records, job), "dropped": dropped}


class _Packer:
    """Writes the shards of one split."""

    def __init__(self, config: PackConfig, name: str, source: ImageSource, seen: Seen, bar: Bar, work: Path) -> None:
        self.config = config
        self.name = name
        self.source = source
        self.seen = seen
        self.bar = bar
        self.work = work
        self.folder = config.out / name
        self.unreadable = 0
        self.started, self.images = time.monotonic(), 0

    def run(self) -> list[dict[str, Any]]:
        """The record of each shard."""
        order = np.random.default_rng(derive_seed(self.config.seed, "pack")).permutation(len(self.source))
        parts = [
            order[first : first + self.config.shard_images].tolist()
            for first in range(0, len(order), self.config.shard_images)
        ]
        with surveying(partial(_convert, self.source, self.config), self.config.num_workers) as survey:
            return [self._shard(number, part, survey) for number, part in enumerate(parts)]

    def _shard(self, number: int, part: list[int], survey: Survey[_Packed]) -> dict[str, Any]:
        record_path = self.work / f"{self.name or 'all'}-{number:06d}.json"
        if record_path.is_file():
            record: dict[str, Any] = read_json(record_path)
            for name, pixels, perceptual_hash in record["hashes"]:
                self.seen.add(name, pixels, perceptual_hash)
            self.bar.advance(len(part), "there already")
        else:
            record = self._write(f"shard-{number:06d}.tar", part, survey)
            write_json(record_path, record)
        self.unreadable += sum(kind == "unreadable" for kind, _ in record["dropped"])
        if self.unreadable > self.config.max_corrupt:
            raise CheckFailed(
                f"{self.unreadable} unreadable images in {self.source.name}",
                hint=f"mend them, or allow more than --max-corrupt {self.config.max_corrupt}",
            )
        return record

    def _write(self, name: str, part: list[int], survey: Survey[_Packed]) -> dict[str, Any]:
        members: list[tuple[str, int, int, int]] = []
        hashes: list[tuple[str, str, int]] = []
        dropped: list[tuple[str, str]] = []
        with atomic_path(self.folder / name) as aside:
            with tarfile.open(aside, "w", format=tarfile.USTAR_FORMAT) as tar:
                for index, packed in zip(part, survey(part), strict=True):
                    self._advance()
                    key = self.source.key(index)
                    if packed.error is not None:
                        notice("left out", packed.error)
                        dropped.append(("unreadable", packed.error))
                        continue
                    if self.config.dedup != "no":
                        if (first := self.seen.add(key, packed.pixels, packed.perceptual_hash)) is not None:
                            dropped.append(("duplicate", f"{key} = {first}"))
                            continue
                        hashes.append((key, packed.pixels, packed.perceptual_hash))
                    label = self.source.labels[index]
                    member = f"{index:08d}{packed.suffix}"
                    members.append((member, tar.offset + _HEADER, len(packed.content), label))
                    _add(tar, member, packed.content)
                    if label != UNLABELLED:
                        _add(tar, f"{index:08d}.cls", str(label).encode())
            digest = sha256(aside)
            size = aside.stat().st_size
        if not members:
            remove(self.folder / name)
        names, offsets, sizes, labels = ([row[place] for row in members] for place in range(4))
        entry = {
            "name": name,
            "bytes": size,
            "images": len(members),
            "sha256": digest,
            "names": names,
            "offsets": offsets,
            "sizes": sizes,
            "labels": labels,
        }
        return {"entry": entry, "hashes": hashes, "dropped": dropped}

    def _advance(self) -> None:
        self.images += 1
        self.bar.advance(1, f"{self.images / (time.monotonic() - self.started):.0f} images/s")


def _splits(config: PackConfig) -> dict[str, ImageSource]:
    """The images to pack, by split; evaluation comes first, so that it is training that loses what both have. One
    without a name: no splits.
    """
    names = split_names(config.source)
    if not names:
        images = unlabelled_images(config.source, config.columns)
        announce(config.source, {"": images})
        return {"": images}
    train = labelled_images(config.source, "train", columns=config.columns)
    others = {
        name: labelled_images(config.source, name, train.class_names, config.columns)
        for name in names
        if name != "train"
    }
    splits = {**others, "train": train}
    announce(config.source, splits, beside_splits(config.source, splits))
    return splits


def _finish(
    config: PackConfig, splits: dict[str, ImageSource], records: dict[str, list[dict[str, Any]]], job: dict[str, Any]
) -> dict[str, Any]:
    """Write the indices and the list of what was left out; returns the summary."""
    entries = {
        name: [record["entry"] for record in found if record["entry"]["images"]] for name, found in records.items()
    }
    dropped = [(kind, what) for found in records.values() for record in found for kind, what in record["dropped"]]
    for name, source in splits.items():
        if not entries[name]:
            raise CheckFailed(f"no image of {source.name} is left to pack")
        index = {
            "format": FORMAT,
            "images": sum(entry["images"] for entry in entries[name]),
            "made_from": {**job, "source": job["source"][name]},
        }
        write_json(config.out / name / INDEX, {**index, "shards": entries[name]})
    names = next(iter(splits.values())).class_names
    if names is not None:
        write_json(config.out / CLASSES, list(names))
    if dropped:
        write_text(config.out / "left_out.txt", "".join(f"{kind}: {what}\n" for kind, what in dropped))
    remove(config.out / _WORK)
    shards = [entry for found in entries.values() for entry in found]
    return {
        "out": str(config.out),
        "images": sum(entry["images"] for entry in shards),
        "shards": len(shards),
        "bytes": sum(entry["bytes"] for entry in shards),
        "duplicates": sum(kind == "duplicate" for kind, _ in dropped),
        "unreadable": sum(kind == "unreadable" for kind, _ in dropped),
        "classes": None if names is None else len(names),
    }


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _convert(source: ImageSource, config: PackConfig, index: int) -> _Packed:
    """Decode an image, so that none is packed that cannot be read, and encode it where it changes."""
    key = source.key(index)
    try:
        content = source.raw(index)
        image = decode(key, content, config.in_chans, config.pixel_max)
    except UnreadableImage as error:
        return _Packed(b"", "", "", 0, str(error))
    pixels, perceptual_hash = (
        (pixel_hash(image), difference_hash(image) if config.dedup == "near" else 0)
        if config.dedup != "no"
        else ("", 0)
    )
    small = _resized(image, config.short_side)
    suffix = Path(key).suffix.lower() if is_image_name(key) else suffix_of(content)
    if config.encoding != "keep" or small is not image:
        content, suffix = _encoded(small, config, suffix)
    return _Packed(content, suffix, pixels, perceptual_hash)


def _resized(image: Image.Image | Array, short_side: int | None) -> Image.Image | Array:
    """With this short side, where it is longer."""
    width, height = image.size if is_image(image) else (image.shape[1], image.shape[0])
    if short_side is None or min(width, height) <= short_side:
        return image
    factor = short_side / min(width, height)
    size = max(short_side, round(width * factor)), max(short_side, round(height * factor))
    if is_image(image):
        return image.resize(size, Image.Resampling.BICUBIC)
    whole = Placement(part=(0, 0, width, height), size=size, box=(0, 0, *size))
    resized = resize_and_cut(image, whole, "bicubic", fill=(0,) * image.shape[2])
    if image.dtype.kind in "ui":
        limits = np.iinfo(image.dtype)
        resized = resized.round().clip(limits.min, limits.max) if resized.dtype != image.dtype else resized
    return resized.astype(image.dtype)


def _encoded(image: Image.Image | Array, config: PackConfig, suffix: str) -> tuple[bytes, str]:
    """Bytes and suffix; of --encoding keep, JPEG stays JPEG and others lose nothing."""
    stays = "jpeg" if suffix in (".jpg", ".jpeg") and config.in_chans in (1, 3) else "png"
    encoding = config.encoding if config.encoding != "keep" else stays
    buffer = io.BytesIO()
    if encoding == "npy" or not is_image(image):
        np.save(buffer, np.asarray(image))
        return buffer.getvalue(), ".npy"
    image.save(buffer, encoding.upper(), **({"quality": config.quality} if encoding == "jpeg" else {}))
    return buffer.getvalue(), ".jpg" if encoding == "jpeg" else ".png"
