"""A run with a cache is the run without it that has the same views, to FP16's rounding, and the same to the last bit
whatever the cache holds.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from mae_deploy.data.config import DataConfig
from mae_deploy.distill.config import CacheConfig, DistillConfig, FeatureObjectiveConfig, TeacherConfig
from mae_deploy.distill.run import run_distill
from mae_deploy.errors import ConfigError
from mae_deploy.training.state.run_folder import read_metrics
from tests.data.image_folders import write_classes
from tests.training.tiny_runs import (
    DECODER,
    STUDENT,
    command,
    command_of,
    losses_of,
    optim,
    progress_of,
    run_command,
    run_processes,
    start_command,
)

VIEWS = 2


def distilling(data: Path, teacher: Path, out: Path, cache: Path | None, **more: Any) -> DistillConfig:
    """Eleven images in batches of five; in the third epoch, views of the first come again."""
    settings: dict[str, Any] = {
        "optim": optim(epochs=3),
        "images": DataConfig(num_workers=0),
        "decoder": DECODER,
        "features": FeatureObjectiveConfig(mask_ratio=0.5),
        "caching": CacheConfig(teacher_cache=cache, fixed_views=VIEWS),
        "teaching": TeacherConfig(teacher_precision="fp32"),
        "device": "cpu",
        **STUDENT,
        **more,
    }
    return DistillConfig(data=data, teacher=teacher, out=out, **settings)


def losses(run_folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run_folder)]


@pytest.mark.parametrize("objective", ["features", "logits"])
def test_a_cached_run_is_the_online_run(
    objective: str, classes: Path, expert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, cache in (("online", None), ("filling", tmp_path / "cache"), ("filled", tmp_path / "cache")):
        run_distill(distilling(classes, expert, tmp_path / name, cache, objective=objective))
    said = [line for line in capsys.readouterr().err.splitlines() if "answers read" in line]
    # Of every epoch's images two are left out; a view's later epoch computes what was left out of the earlier.
    images, seen = (18, 15) if objective == "features" else (12, 10)
    filling, filled = (tuple(int(word) for word in line.replace(",", "").split() if word.isdigit()) for line in said)
    # Without a validation, the loss of the last batch is looked at once more at the end.
    again = 5 if objective == "features" else 0
    assert sum(filling) == sum(filled) == 3 * seen + again
    assert VIEWS * seen <= filling[1] <= VIEWS * images
    assert filled == (3 * seen + again, 0)
    # Answers of 11 bits, in a loss that sums hundreds of them, for up to nine steps.
    assert losses(tmp_path / "filling") == pytest.approx(losses(tmp_path / "online"), rel=1e-3)
    assert losses_of(tmp_path / "filled", "grad_norm") == losses_of(tmp_path / "filling", "grad_norm")


def test_fixed_views_are_those_of_the_first_epochs(images: Path, teacher: Path, tmp_path: Path) -> None:
    """But for the masks, which follow the image in place of the step; so with whole images the first epochs are the
    same.
    """
    whole = FeatureObjectiveConfig(mask_ratio=0.0)
    run_distill(distilling(images, teacher, tmp_path / "fixed", None, features=whole))
    run_distill(distilling(images, teacher, tmp_path / "free", None, features=whole, caching=CacheConfig()))
    fixed, free = losses(tmp_path / "fixed"), losses(tmp_path / "free")
    assert fixed[: 2 * VIEWS] == free[: 2 * VIEWS]
    assert fixed[2 * VIEWS :] != free[2 * VIEWS :]


def test_a_cached_run_that_is_killed_repeats_the_whole_one(images: Path, teacher: Path, tmp_path: Path) -> None:
    """In the second epoch: the cache then holds answers of steps that the checkpoint has not seen."""
    config = distilling(images, teacher, tmp_path / "killed", tmp_path / "cache")
    run_distill(distilling(images, teacher, tmp_path / "whole", tmp_path / "other"))
    assert run_processes(1, command, command_of(config, "--resume"), (0, signal.SIGKILL, 4)) == [-9]
    assert (progress_of(config.out), len(losses(config.out))) == (2, 3)
    assert run_command(command_of(config, "--resume")) == 0
    assert losses_of(config.out, "grad_norm") == losses_of(tmp_path / "whole", "grad_norm")


def test_two_runs_at_once_share_a_cache(tmp_path: Path, teacher: Path, images: Path) -> None:
    """Of other students, say."""
    configs = [distilling(images, teacher, tmp_path / name, tmp_path / "cache") for name in "ab"]
    processes = [start_command(command_of(config)) for config in configs]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    run_distill(distilling(images, teacher, tmp_path / "alone", tmp_path / "other"))
    for config in configs:
        assert losses_of(config.out, "grad_norm") == losses_of(tmp_path / "alone", "grad_norm")
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_other_views_are_another_run(images: Path, teacher: Path, tmp_path: Path) -> None:
    run_distill(distilling(images, teacher, tmp_path / "run", None, optim=optim(epochs=1)))
    changed = distilling(
        images, teacher, tmp_path / "run", None, optim=optim(epochs=1), resume=True, caching=CacheConfig(fixed_views=3)
    )
    with pytest.raises(ConfigError, match=r"caching\.fixed_views: 2 -> 3"):
        run_distill(changed)


def test_visible_patches_of_each_step_cannot_be_cached(teacher: Path, tmp_path: Path) -> None:
    data = write_classes(tmp_path / "classes")
    elastic = distilling(data, teacher, tmp_path / "run", tmp_path / "cache", keep_ratio=(0.3, 0.7))
    with pytest.raises(ConfigError, match="--keep-ratio draws others in each step"):
        run_distill(elastic)
    assert not (tmp_path / "run").exists()
