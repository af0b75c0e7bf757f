"""What is to be embedded, by which bundle and to where: all that a worker on another machine has to be told."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mae_deploy.data.config import Columns
from mae_deploy.embedding.images import Collection, open_collection
from mae_deploy.errors import ConfigError
from mae_deploy.files import read_json
from mae_deploy.runtime.bundle import Bundle

JOB_FILE = "_embed.json"
"""In the folder of features, whose readers leave out what begins with an underscore: what they are features of."""

UNREADABLE = "_unreadable"
"""The folder beside the features with tables of the images that have none, and why."""

PREFIX, SUFFIX = "features-", ".parquet"

Store = Literal["fp32", "fp16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One call of `mae-deploy embed`."""

    data: str
    image_column: str | None
    every: int | None
    bundle: Path
    engine: str
    device: str
    threads: int | None
    """Of each engine."""
    outputs: tuple[str, ...]
    store: Store
    batch_size: int
    shard_images: int
    max_pixels: int | None
    out: Path
    folder: Path
    """Where the call was made, from which relative names are meant."""
    identity: dict[str, Any]
    """What the features are a function of, in plain JSON values; see `identity_of`."""

    def collection(self) -> Collection:
        """The images."""
        return open_collection(
            self.data, Columns(image=self.image_column), every=self.every, shard_images=self.shard_images
        )

    def shard(self, part: int, number: int, *, sequential: bool) -> Path:
        """The file of a part's features; of those that are read from front to back, that of so many-th ones."""
        return self.out / f"{PREFIX}{part:06d}{f'-{number:06d}' if sequential else ''}{SUFFIX}"


def unreadable_beside(shard: Path) -> Path:
    """The table of the images that cannot be read, which belongs to a shard of features; absent where all can."""
    return shard.parent / UNREADABLE / shard.name


def features_in(folder: Path) -> list[Path]:
    """The finished shards in order.

    Raises:
        ConfigError: one is no file.
    """
    shards = sorted(folder.glob(f"{PREFIX}*{SUFFIX}"))
    if other := next((shard for shard in shards if not shard.is_file()), None):
        raise ConfigError(f"{other} is no file", hint="embed again")
    return shards


def bundle_hash(bundle: Bundle) -> str:
    """Of what decides a bundle's features: the hashes of its files but those built for one machine, and what is done to
    images before.
    """
    files = bundle.manifest["files"]
    kept = {name: entry["sha256"] for name, entry in files.items() if not name.startswith("engines/")}
    text = json.dumps([kept, bundle.manifest["preprocess"]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def row_shapes(bundle: Bundle, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The shape of an image's row of each output, where all patches are seen."""
    keep = bundle.fixed_keep or bundle.num_patches
    shapes = {
        entry["name"]: tuple(keep if isinstance(size, str) else size for size in entry["shape"][1:])
        for entry in bundle.manifest["graph"]["outputs"]
    }
    return {name: shapes[name] for name in names}


def row_bytes(bundle: Bundle, names: Sequence[str], store: Store) -> int:
    """Bytes of an image's features."""
    return sum(math.prod(shape) for shape in row_shapes(bundle, names).values()) * (4 if store == "fp32" else 2)


def check_begun(folder: Path, identity: dict[str, Any]) -> bool:
    """Whether a folder holds what an earlier call of the same job has finished.

    Raises:
        ConfigError: of another one, or something else.
    """
    if not (folder / JOB_FILE).is_file():
        if folder.is_file() or any(not entry.name.startswith(".") for entry in folder.glob("*")):
            raise ConfigError(f"--out {folder} already exists", hint="choose another --out, or remove it first")
        return False
    begun = read_json(folder / JOB_FILE)
    if not isinstance(begun, dict):
        raise ConfigError(f"{folder / JOB_FILE} is no record of a job", hint="choose another --out, or remove it first")
    before, now = begun, json.loads(json.dumps(identity))
    if differing := [key for key in {**before, **now} if before.get(key) != now.get(key)]:
        said = "; ".join(f"{key}: {_short(before.get(key))} -> {_short(now.get(key))}" for key in differing)
        raise ConfigError(f"{folder} was begun otherwise: {said}", hint="repeat the same call, or choose another --out")
    return True


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
