"""Change bytes of whole files, or what their structure has, and read them: protobuf, manifests, pickles, images.

Whatever ends in an error that is not ours, takes more than a second, or reads what is not there, is printed with the
seed that makes it again. Run: python -m tests.hostile.fuzz [--seconds 60] [--seed 0] [--target NAME]
"""

from __future__ import annotations

import argparse
import io
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load

from mae_deploy.data.config import Columns
from mae_deploy.data.sources.open import unlabelled_images
from mae_deploy.errors import MaeDeployError
from mae_deploy.file_kinds import look_at
from mae_deploy.images.npz_file import read_npz
from mae_deploy.images.read import UnreadableImage, read_image
from mae_deploy.recipe import read_recipe
from mae_deploy.runtime.bundle import Bundle, external_data
from mae_deploy.runtime.graph.check import GraphCheck
from mae_deploy.runtime.onnx_file import read_inputs, read_opset
from mae_deploy.weights.read.files import read_content
from tests.hostile.pictures import HARMLESS, PICTURES
from tests.hostile.run import FIXTURES
from tests.hostile.structured import CHANGES

_SLOW = 5.0
"""Seconds of one small file."""

_CHECKPOINT = FIXTURES / "checkpoints/mae/model.safetensors"
_BUNDLE = FIXTURES / "bundles/visible"


def _pickled(legacy: bool) -> bytes:
    written = io.BytesIO()
    torch.save({"model": load(_CHECKPOINT.read_bytes())}, written, _use_new_zipfile_serialization=not legacy)
    return written.getvalue()


def _graph(path: Path) -> None:
    for read in (read_inputs, read_opset, external_data, look_at):
        read(path)
    GraphCheck(path).follow({"images": (1, 3, 25, 10), "ids_keep": (1, 9)})


def _manifest(path: Path) -> None:
    path.replace(path.with_name("manifest.json"))
    Bundle.load(path.parent)


def _shard(path: Path) -> None:
    source = unlabelled_images(path, Columns())
    for index in range(len(source)):
        with suppress(UnreadableImage, MaeDeployError):
            read_image(path, content=source.raw(index))


TARGETS: dict[str, tuple[str, Callable[[], list[bytes]], Callable[[Path], object]]] = {
    "graph": ("a.onnx", lambda: [(_BUNDLE / "encoder.onnx").read_bytes()], _graph),
    "manifest": ("a.json", lambda: [(_BUNDLE / "manifest.json").read_bytes()], _manifest),
    "golden": ("a.npz", lambda: [(_BUNDLE / "golden.npz").read_bytes()], read_npz),
    "pickle": ("a.pth", lambda: [_pickled(False), _pickled(True)], read_content),
    "safetensors": ("a.safetensors", lambda: [_CHECKPOINT.read_bytes()], read_content),
    "tar": ("a.tar", lambda: [(FIXTURES / "shards/shard-000000.tar").read_bytes()], _shard),
    "recipe": ("a.yaml", lambda: [(FIXTURES / "recipes/pretrain.yaml").read_bytes()], read_recipe),
    "image": ("a", list, lambda path: read_image(path)),
}
"""A name, whole files, and what reads them."""


def changed(content: bytes, chance: random.Random) -> bytes:
    """With some bytes set, put in, left out or repeated."""
    found = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        at = chance.randrange(len(found) + 1)
        kind, length = chance.randrange(6), chance.choice((1, 1, 2, 4, 8, 64))
        if kind == 0:
            found[at : at + length] = chance.randbytes(length)
        elif kind == 1:
            found[at : at + length] = chance.choice((b"\xff", b"\0", b"\x80", b"\x7f")) * length
        elif kind == 2:
            found[at:at] = chance.randbytes(length)
        elif kind == 3:
            del found[at : at + length]
        elif kind == 4:
            found[at:at] = found[at : at + length] * chance.choice((2, 9))
        elif at < len(found):
            found[at] ^= 1 << chance.randrange(8)
    return bytes(found if chance.random() > 0.05 else found[: chance.randrange(len(found) + 1)])


def one(target: str, seed: int, contents: list[tuple[str, bytes]], folder: Path) -> str | None:
    """Read one changed file; returns what is wrong."""
    _, _, read = TARGETS[target]
    chance = random.Random(f"{target} {seed}")
    name, content = chance.choice(contents)
    path = folder / name
    change = chance.choice((changed, CHANGES.get(target, changed)))
    path.write_bytes(change(content, chance))
    started = time.process_time()
    try:
        with suppress(*refusals(target)):
            read(path)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    seconds = time.process_time() - started
    return f"{seconds:.1f} s" if seconds > _SLOW else None


def refusals(target: str) -> tuple[type[Exception], ...]:
    """What its reader raises of a file that is not well."""
    return (MaeDeployError, UnreadableImage, *((ValueError,) if target == "golden" else ()))


def contents_of(target: str, folder: Path) -> list[tuple[str, bytes]]:
    """The names and contents of whole files."""
    name, make, _ = TARGETS[target]
    if target != "image":
        return [(name, content) for content in make()]
    paths = [(kind, PICTURES[kind](folder)) for kind in PICTURES if kind.startswith(HARMLESS)]
    return [(path.name, path.read_bytes()) for _, path in paths]


def main() -> int:
    """Returns 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="for each target")
    parser.add_argument("--seed", type=int, default=0, help="the first file's")
    parser.add_argument("--target", choices=TARGETS, action="append")
    given = parser.parse_args()
    found = 0
    for target in given.target or TARGETS:
        with TemporaryDirectory() as folder:
            contents = contents_of(target, Path(folder))
            started, seed, wrong = time.monotonic(), given.seed, Counter[str]()
            while time.monotonic() - started < given.seconds:
                if (what := one(target, seed, contents, Path(folder))) is not None:
                    if not wrong[what.partition(":")[0]]:
                        print(json.dumps({"target": target, "seed": seed, "what": what[:300]}), flush=True)
                    wrong[what.partition(":")[0]] += 1
                seed += 1
        found += wrong.total()
        print(f"{target}: {seed - given.seed:,} files, {wrong.total()} wrong", flush=True)
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
