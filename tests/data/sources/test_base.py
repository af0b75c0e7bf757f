"""Numbers beside classes that are called by numbers; images that are held out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mae_deploy.data.sources.base import hold_out, match_classes
from mae_deploy.data.sources.open import labelled_images
from mae_deploy.errors import ConfigError
from tests.data.image_folders import write_noise
from tests.data.sources.tiny_shards import Member, write_shard

TWELVE = tuple(sorted(map(str, range(12))))
"""As folders are listed: 0, 1, 10, 11, 2, …"""


@pytest.mark.parametrize(
    ("wanted", "labels", "names"),
    [
        (TWELVE, [0, 2, 10, 11], ["0", "2", "10", "11"]),  # by name, which is also the place in the order of numbers
        (("00", "01", "02"), [2, 0], ["02", "00"]),
        (("0", "1", "10"), [10, 1], ["10", "1"]),
        (("1", "2", "3"), [0, 2], ["1", "3"]),  # there is no class 0: these are places
        (("3", "5", "7"), [5, 7], ["5", "7"]),  # there is no place 5
        (("2", "1", "0"), [0, 1], ["0", "1"]),
    ],
)
def test_numbers_are_the_names_of_classes(wanted: tuple[str, ...], labels: list[int], names: list[str]) -> None:
    found, classes = match_classes(np.array(labels), None, wanted, "set")
    assert classes == wanted
    assert [classes[label] for label in found] == names


@pytest.mark.parametrize(
    ("wanted", "labels"),
    [
        (("1", "2", "3"), [1, 2]),  # class 1, or the one at place 1
        (tuple(sorted(map(str, range(1, 13)))), [0, 11]),  # place 11 of the numbers is 12, of the folders 9
        (("1", "01", "2"), [1]),
    ],
)
def test_numbers_that_may_mean_two_classes(wanted: tuple[str, ...], labels: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"which may be the names or the places of the classes") as caught:
        match_classes(np.array(labels), None, wanted, "set")
    assert "classes.json" in str(caught.value.hint)


def test_numbers_that_no_class_has() -> None:
    with pytest.raises(ConfigError, match="label 7, but there are 3 classes"):
        match_classes(np.array([7]), None, ("0", "1", "2"), "set")
    with pytest.raises(ConfigError, match="class 0 of set is not one of the 2 classes: cat, dog"):
        match_classes(np.array([0]), None, ("cat", "dog"), "set")


def test_folders_and_shards_agree(images: Path, tmp_path: Path) -> None:
    members: list[Member] = []
    for number, path in enumerate(sorted(images.rglob("*.png"))):
        write_noise(tmp_path / "train" / str(number), 1)
        members += [(f"{number}.png", path.read_bytes()), (f"{number}.cls", str(number).encode())]
    write_shard(tmp_path / "val-0.tar", members)
    train = labelled_images(tmp_path, "train")
    val = labelled_images(tmp_path, "val", train.class_names)
    assert val.class_names is not None
    assert [val.class_names[label] for label in val.labels] == [str(number) for number in range(11)]


def test_of_each_class_the_share_is_held_out(tmp_path: Path) -> None:
    for name, count in (("a", 20), ("b", 3), ("c", 1)):
        write_noise(tmp_path / "train" / name, count)
    source = labelled_images(tmp_path, "train")
    rest, held = hold_out(source, 0.1, np.random.default_rng(5))
    assert (np.bincount(held.labels).tolist(), np.bincount(rest.labels).tolist()) == ([2, 1], [18, 2, 1])
    keys = [part.key(index) for part in (rest, held) for index in range(len(part))]
    assert sorted(keys) == [source.key(index) for index in range(24)]
    assert all(held.raw(index) == Path(held.key(index)).read_bytes() for index in range(3))
    again, other = (hold_out(source, 0.1, np.random.default_rng(seed))[1] for seed in (5, 6))
    assert again.fingerprint() == held.fingerprint() != other.fingerprint()
    assert held.fingerprint() != rest.fingerprint() != source.fingerprint()
    with pytest.raises(ConfigError, match=r"no class of .* has two images"):
        hold_out(hold_out(source, 0.99, np.random.default_rng(0))[0], 0.5, np.random.default_rng(0))
