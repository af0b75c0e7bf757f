"""Calibration streams real images, refuses too few, and is done once for the same model and images."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.export.quantization.calibrate import Calibration, calibrate
from mae_deploy.export.samples import CalibrationImages
from mae_deploy.images import preprocess
from mae_deploy.images.find import find_images
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.images.read import Array, read_image
from mae_deploy.models.quantization.activations import Observer
from mae_deploy.models.quantization.rounding import eligible_linears
from mae_deploy.models.vit import Encoder
from tests.data.image_folders import spoil, write_noise
from tests.models.tiny_models import ENCODER, tiny_encoder, tiny_mae

SPEC = Preprocess(image_size=(6, 10))
COUNT = 19
"""Two batches of 8 and one of 3."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where calibrations are kept."""
    monkeypatch.setenv("MAE_DEPLOY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "calibration"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Nineteen images."""
    write_noise(tmp_path / "images", COUNT)
    return tmp_path / "images"


def images_of(folder: Path, **settings: Any) -> CalibrationImages:
    return CalibrationImages(folder, SPEC, **{"minimum": 5, **settings})


def files_read(images: CalibrationImages) -> list[str]:
    return [path.name for paths, _ in images.batches() for path in paths]


def run(
    folder: Path, model: Encoder | None = None, images: CalibrationImages | None = None, **settings: Any
) -> Calibration:
    model = model or tiny_encoder()
    return calibrate(model, images or images_of(folder), eligible_linears(model), **settings)


def same(one: Calibration, other: Calibration) -> bool:
    """Whether the figures are equal, to the last bit."""
    fields = ("absmax", "mean", "mean_square", "counts", "divisor")
    pairs = [
        (getattr(one.stats[name], field), getattr(other.stats[name], field)) for name in one.stats for field in fields
    ]
    pairs += [(one.attention_absmax[name], other.attention_absmax[name]) for name in one.attention_absmax]
    return list(one.stats) == list(other.stats) and all(np.array_equal(a, b) for a, b in pairs)


def test_images_come_in_small_batches(folder: Path) -> None:
    images = images_of(folder)
    batches = list(images.batches())
    assert [len(paths) for paths, _ in batches] == [8, 8, 3]
    assert len(images) == COUNT
    assert [path for paths, _ in batches for path in paths] == find_images(folder)
    for paths, pixels in batches:
        assert pixels.dtype == np.uint8
        np.testing.assert_array_equal(pixels, np.stack([SPEC.crop(read_image(path)) for path in paths]))


def test_of_many_some_are_spread_over_the_folder(folder: Path) -> None:
    assert files_read(images_of(folder, count=7)) == [f"{number:02d}.png" for number in (0, 3, 6, 9, 12, 15, 18)]


def test_no_more_than_a_batch_is_read_ahead(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []

    def counted(path: Path, *arguments: Any) -> Any:
        read.append(path)
        return read_image(path, *arguments)

    monkeypatch.setattr(preprocess, "read_image", counted)
    for number, _ in enumerate(images_of(folder).batches(), 1):
        assert len(read) == min(8 * number, COUNT)


def test_unreadable_images_are_skipped_aloud_and_replaced(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(folder / "09.png")
    assert files_read(images_of(folder, count=7)) == [f"{number:02d}.png" for number in (0, 3, 6, 12, 15, 18, 1)]
    assert f"\nskipped {folder / '09.png'}: " in capsys.readouterr().err


def test_too_few_images_are_refused_before_anything_is_read(folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=f"only 19 images below --calib-data {folder}; calibration needs at least 128"
    ) as caught:
        CalibrationImages(folder, SPEC)
    assert caught.value.hint is not None
    CalibrationImages(folder, SPEC, minimum=COUNT)


def test_too_few_readable_images_are_refused(folder: Path, cache: Path) -> None:
    spoil(folder / "03.png")
    spoil(folder / "04.png")
    images = images_of(folder, minimum=18)
    with pytest.raises(
        ConfigError, match=f"only 17 readable images below --calib-data {folder}; calibration needs at least 18"
    ):
        run(folder, images=images)
    assert not cache.exists()


def test_statistics_are_those_of_the_images(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_encoder()
    found = run(folder, model)
    expected = Observer(model, eligible_linears(model))
    with torch.no_grad(), expected.watching():
        for _, pixels in images_of(folder).batches():
            model(torch.from_numpy(SPEC.normalise(pixels)))
    assert same(found, replace(found, stats=expected.stats(), attention_absmax=expected.attention_absmax()))
    assert (found.num_images, found.cached) == (COUNT, False)
    each = "".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in find_images(folder))
    assert found.images_sha256 == hashlib.sha256(each.encode()).hexdigest()
    assert found.record({"x": 1.0}) == {
        "num_images": COUNT,
        "images_sha256": found.images_sha256,
        "scales_sha256": hashlib.sha256(b'{"x": 1.0}').hexdigest(),
        "cached": False,
    }
    last = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("data: ")][-1]
    assert last.startswith("calibrate  19/19  ")
    assert last.endswith(" images/s  0 s left")


def tokens_seen(
    model: Encoder, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    calibrate(model, images_of(folder), eligible_linears(model), **settings)
    hook.remove()
    return shapes


def test_visible_patches_have_the_sizes_of_the_profile_in_turn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[Array] = []
    embed = Encoder.embed

    def spied(self: Encoder, images: torch.Tensor, ids_keep: torch.Tensor | None = None) -> torch.Tensor:
        assert ids_keep is not None
        chosen.append(ids_keep.numpy())
        return embed(self, images, ids_keep)

    monkeypatch.setattr(Encoder, "embed", spied)
    shapes = tokens_seen(tiny_encoder(), folder, "blocks.1.mlp.fc1", monkeypatch, token_sizes=(4, 15))
    assert shapes == [(8, 5, 20), (8, 16, 20), (3, 5, 20)]
    rows = [row for ids in chosen for row in ids.tolist()]
    assert all(len(set(row)) == len(row) and set(row) <= set(range(15)) for row in rows)
    assert len({tuple(row) for row in rows}) == COUNT


def test_a_decoder_sees_every_patch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = tokens_seen(tiny_mae(), folder, "decoder_blocks.0.attn.qkv", monkeypatch, token_sizes=(4,))
    assert shapes == [(8, 16, 12), (8, 16, 12), (3, 16, 12)]


def test_the_second_time_nothing_is_run(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(folder, token_sizes=(4,))
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(Encoder, "embed", None)
    second = run(folder, token_sizes=(4,))
    assert second.cached
    assert same(first, second)
    assert replace(second, cached=False, stats={}, attention_absmax={}) == replace(first, stats={}, attention_absmax={})


@pytest.mark.parametrize(
    "change", ["nothing", "weight", "image", "order", "count", "sizes", "seed", "preprocess", "heads", "names"]
)
def test_a_calibration_is_that_of_one_model_and_one_set_of_images(folder: Path, cache: Path, change: str) -> None:
    calibrate(tiny_encoder(), images_of(folder), eligible_linears(tiny_encoder()), token_sizes=(4,))
    model, settings, names = tiny_encoder(), {"count": 512}, eligible_linears(tiny_encoder())
    spec, sizes, seed = SPEC, (4,), 0
    match change:
        case "weight":
            with torch.no_grad():
                model.get_parameter("blocks.1.norm2.bias")[3] += 1e-6
        case "image":
            write_noise(folder, 1, low=1)
        case "order":
            (folder / "00.png").rename(folder / "zz.png")
        case "count":
            settings = {"count": 18}
        case "sizes":
            sizes = (5,)
        case "seed":
            seed = 1
        case "preprocess":
            spec = replace(SPEC, crop_pct=1.0)
        case "heads":
            model = tiny_encoder(replace(ENCODER, num_heads=2))
        case "names":
            names = names[:-1]
    found = calibrate(
        model, CalibrationImages(folder, spec, minimum=5, **settings), names, token_sizes=sizes, seed=seed
    )
    assert found.cached == (change == "nothing")
    assert len(list(cache.iterdir())) == (1 if change == "nothing" else 2)


@pytest.mark.parametrize("damage", ["cut", "empty", "other", "bits"])
def test_a_broken_cache_is_done_again(folder: Path, cache: Path, damage: str) -> None:
    first = run(folder)
    (file,) = cache.iterdir()
    content = file.read_bytes()
    middle = len(content) // 2
    damaged = {
        "cut": content[:middle],
        "empty": b"",
        "other": b"no archive at all",
        "bits": content[:middle] + bytes(64) + content[middle + 64 :],
    }
    file.write_bytes(damaged[damage])
    again = run(folder)
    assert not again.cached
    assert same(first, again)
    assert run(folder).cached


def test_pickles_are_not_opened(folder: Path, cache: Path, tmp_path: Path) -> None:
    run(folder)
    (file,) = cache.iterdir()
    np.savez(file, num_images=np.array([Trap(tmp_path / "sprung")], dtype=object))
    assert not run(folder).cached
    assert not (tmp_path / "sprung").exists()


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_where_other_images_stood_in_nothing_is_cached(folder: Path, cache: Path) -> None:
    """Their contents are no part of the key."""
    spoil(folder / "09.png")
    assert run(folder, images=images_of(folder, count=7)).num_images == 7
    assert not cache.exists()
    assert run(folder).num_images == COUNT - 1
    assert run(folder).cached  # all files were read, so all are part of the key


def test_a_cache_that_cannot_be_written_is_said_and_passed_over(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MAE_DEPLOY_CACHE", str(tmp_path / "file"))
    assert run(folder).num_images == COUNT
    assert capsys.readouterr().err.splitlines()[-1].startswith("not cached: ")


def test_activations_that_are_not_finite_are_not_cached(folder: Path, cache: Path) -> None:
    model = tiny_encoder()
    with torch.no_grad():
        model.get_parameter("blocks.0.mlp.fc1.bias")[0] = torch.nan
    with pytest.raises(CheckFailed, match=r"the input of blocks\.0\.mlp\.fc2"):
        run(folder, model)
    assert not cache.exists()
