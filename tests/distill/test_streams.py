"""A student on a stream: against the same network on whole images, and against updates by hand."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mae_deploy.cli import main
from mae_deploy.data.config import DataConfig
from mae_deploy.distill.config import (
    DistillConfig,
    EdgeConfig,
    PooledConfig,
    StreamTrainingConfig,
    TeacherConfig,
)
from mae_deploy.distill.distiller import Distiller
from mae_deploy.distill.objectives.features import Features
from mae_deploy.distill.objectives.pooled import Pooled
from mae_deploy.distill.run import run_distill
from mae_deploy.distill.streams import Update, Updates, tapped_on_stream
from mae_deploy.errors import ConfigError
from mae_deploy.files import point_link
from mae_deploy.images.preprocess import default_preprocess
from mae_deploy.models.cached import empty_cache, update
from mae_deploy.models.config import EncoderConfig
from mae_deploy.models.taps import Tap, tapped
from mae_deploy.models.vit import gather_tokens, patchify
from mae_deploy.training.state.run_folder import read_metrics
from mae_deploy.training.step import StepBatch
from tests.models.tiny_models import ENCODER, random_images, random_tensor, tiny_classifier, tiny_encoder, tiny_mae
from tests.training.tiny_runs import DECODER, STUDENT, losses_of, optim, progress_of

N, B = ENCODER.num_patches, 3
OLD, IMAGES = random_images(), random_tensor(B, 3, *ENCODER.image_size, seed=5)

# 6x8 patches of 4x4 pixels.
LARGE = EncoderConfig(name="tiny", image_size=(24, 32), patch_size=4, embed_dim=20, depth=2, num_heads=5)
SPEC = default_preprocess(LARGE.image_size)


def ids_of(keep: int) -> Tensor:
    return torch.stack([torch.randperm(N, generator=torch.Generator().manual_seed(b))[:keep] for b in range(B)])


# --- the student -----------------------------------------------------------------------------------------------------

TAPS = [Tap("tokens", 1), Tap("latent"), Tap("cls"), Tap("pooled"), Tap("logits")]


@pytest.mark.parametrize("pool", ["avg", "cls"])
def test_an_update_of_all_patches_is_the_whole_image(pool: Any) -> None:
    model, seen = tiny_classifier(pool), Update(OLD, ids_of(N), 2)
    found, expected = tapped_on_stream(model, IMAGES, seen, TAPS), tapped(model, IMAGES, TAPS)
    assert list(found) == TAPS
    for tap in TAPS:
        torch.testing.assert_close(found[tap], expected[tap], rtol=0, atol=5e-6)  # another order of sums


def test_where_nothing_changed_it_is_the_whole_image_whatever_is_computed() -> None:
    model, seen = tiny_classifier("avg"), Update(IMAGES, ids_of(5), 2)
    found, expected = tapped_on_stream(model, IMAGES, seen, TAPS), tapped(model, IMAGES, TAPS)
    for tap in TAPS:
        torch.testing.assert_close(found[tap], expected[tap], rtol=0, atol=5e-6)  # another order of sums


def test_what_is_not_computed_moves_with_what_is_computed_in_turn() -> None:
    model, ids, taps = tiny_encoder(), ids_of(6), [Tap("latent"), Tap("tokens", 1)]
    found = tapped_on_stream(model, IMAGES, Update(OLD, ids, 2), taps)
    everything = torch.arange(N).expand(B, -1)
    old, cache, (old_first, _) = update(model, patchify(OLD, 2), everything, empty_cache(model, B))
    new, _, (new_first, _) = update(model, gather_tokens(patchify(IMAGES, 2), ids), ids, cache)
    for tap, before, after in zip(taps, (old, old_first), (new, new_first), strict=True):
        for b in range(B):
            expected = before[b].clone()
            expected += 0.7 * (after[b, 5:] - before[b, 1 + ids[b, 4:]]).mean(dim=0)
            expected[0], expected[1 + ids[b]] = after[b, 0], after[b, 1:]
            torch.testing.assert_close(found[tap][b], expected, rtol=0, atol=1e-6)  # another order of sums


def test_no_more_blocks_are_run_than_are_tapped() -> None:
    model, runs = tiny_encoder(), list[int]()
    for number, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, number=number: runs.append(number))
    tapped_on_stream(model, IMAGES, Update(OLD, ids_of(4), 1), [Tap("tokens", 1)])
    assert runs == [0, 0]


@pytest.mark.parametrize("block", [1, 2])
def test_what_is_reached_is_trained_through_the_cache_too(block: int) -> None:
    """A parameter that waits for a gradient that never comes stalls distributed training."""
    objectives = {"feature": Features(((block, 1),), 20, 12), **({"cls": Pooled("cls", 20, 12)} if block == 2 else {})}
    model, earlier = Distiller(tiny_mae().train(), objectives), OLD.clone().requires_grad_()
    answers = tuple(random_tensor(*shape) for shape in ((B, 1 + N, 12), (B, 12))[:block])
    losses = model(IMAGES, torch.zeros(B), None, answers, Update(earlier, ids_of(4), 1))
    torch.stack(list(losses.values())).sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained
    assert earlier.grad is not None
    assert earlier.grad.abs().amax(dim=(1, 2, 3)).min() > 0


# --- what it sees ----------------------------------------------------------------------------------------------------


def batch_of(images: Tensor, **more: Any) -> StepBatch:
    return StepBatch(images, torch.zeros(len(images), dtype=torch.int64), **more)


def still(batch: int = 4) -> Tensor:
    """Images of smooth colours, so that something moved is seen."""
    coarse = random_tensor(batch, 3, 4, 4)
    return torch.nn.functional.interpolate(coarse, LARGE.image_size, mode="bicubic")


def test_the_most_different_patches_are_computed_and_some_in_turn() -> None:
    images = still()
    earlier = images.clone()
    earlier[:, :, 4:8, 8:24] += 1.0  # patches 10 to 13
    batch, seen = Updates(LARGE, SPEC, (0.25, 0.25))(batch_of(torch.stack([earlier, images], dim=1)))
    assert torch.equal(batch.images, images)
    assert torch.equal(seen.earlier, earlier)
    assert (seen.ids.shape, seen.turn) == ((4, 12), 6)  # a quarter and an eighth of 48
    for ids in seen.ids:
        assert set(ids[:4].tolist()) == {10, 11, 12, 13}
        assert len(set(ids.tolist())) == 12
    assert len({tuple(ids.tolist()) for ids in seen.ids[:, 6:]}) > 1  # in turn at random


def test_other_scenes_and_frames_without_a_change_are_replaced() -> None:
    images = still()
    before = torch.stack([images[0], images[2], images[2] + 0.01, images[0]])
    before[3, :, :, 16:] = images[3, :, :, 16:]
    _, seen = Updates(LARGE, SPEC, (0.5, 0.5))(batch_of(torch.stack([before, images], dim=1)))
    _, made = Updates(LARGE, SPEC, (0.5, 0.5))(batch_of(images))
    kept = [torch.equal(seen.earlier[b], before[b]) for b in range(4)]
    assert kept == [False, False, False, True]  # the same frame, another image, no change, half of it changed
    assert torch.equal(seen.earlier[:3], made.earlier[:3])


def test_made_frames_are_the_image_but_for_what_moved() -> None:
    images = still(8)
    updates = Updates(LARGE, SPEC, (0.2, 0.4))
    _, seen = updates(batch_of(images))
    assert seen.earlier.isfinite().all()
    share = (updates._differences(seen.earlier, images) > 12).float().mean(dim=1)
    assert 0 < share.mean() < 0.5
    # All over: 5 % of the light, noise of 4 in 255 and, where colours change quickly, a pixel of jitter.
    level = seen.earlier.mean(dim=(2, 3)) - images.mean(dim=(2, 3))
    assert 0 < level.abs().mean() < 0.3


def test_an_image_s_update_depends_on_nothing_beside_it() -> None:
    """Any split of a step into processes and accumulated batches gives the same."""
    images, updates = torch.stack([still() + 0.3, still()], dim=1), Updates(LARGE, SPEC, (0.2, 0.4))
    _, whole = updates(batch_of(images, step=3, effective=4))
    parts = [updates(batch_of(images[at : at + 2], step=3, first=at, effective=4))[1] for at in (0, 2)]
    assert torch.equal(torch.cat([part.earlier for part in parts]), whole.earlier)
    assert torch.equal(torch.cat([part.ids for part in parts]), whole.ids)
    _, other = updates(batch_of(images, step=4, effective=4))
    assert not torch.equal(other.earlier, whole.earlier)


def test_shares_are_drawn_for_each_step() -> None:
    updates = Updates(LARGE, SPEC, (0.1, 1.0))
    counts = {updates(batch_of(still(), step=step))[1].ids.shape[1] for step in range(60)}
    assert (min(counts), max(counts)) == (4, 48)
    assert len(counts) > 8


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """Eleven frames in which a square crosses smooth colours."""
    folder = tmp_path / "clip"
    folder.mkdir()
    coarse = np.random.default_rng(1).integers(60, 200, (3, 4, 3), dtype=np.uint8)
    for number in range(11):
        frame = np.asarray(Image.fromarray(coarse).resize((26, 34), Image.Resampling.BICUBIC)).copy()
        frame[12:20, 2 * number : 2 * number + 6] = (250, 10, 10)
        Image.fromarray(frame).save(folder / f"{number:02d}.png")
    return folder


def distilling(data: Path, teacher: Path, out: Path, **more: Any) -> DistillConfig:
    """Six patches, of which two, or three, are computed."""
    common: dict[str, Any] = {
        "optim": optim(),
        "images": DataConfig(num_workers=0),
        "decoder": DECODER,
        "streams": StreamTrainingConfig(stream=(0.34, 0.5), stream_frames=3),
        "teaching": TeacherConfig(teacher_precision="fp32"),  # on any CPU
        "device": "cpu",
        **STUDENT,
    }
    return DistillConfig(data=data, teacher=teacher, out=out, **{**common, **more})


def test_a_run_on_frames_and_the_same_resumed(clip: Path, teacher: Path, tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    more: dict[str, Any] = {
        "pooled": PooledConfig(cls_weight=1.0),
        "edge": EdgeConfig(quantize="static", outlier_weight=0.1),
        "optim": optim(epochs=3),
    }
    more["loop"] = replace(distilling(clip, teacher, whole).loop, checkpoint_every=2, keep_checkpoints=5)
    run_distill(distilling(clip, teacher, whole, **more))
    lines = read_metrics(whole)
    assert {name for name in lines[0] if name.endswith("_loss")} == {"feature_loss", "cls_loss", "outlier_loss"}
    shutil.copytree(whole, resumed, symlinks=True)
    steps = sorted(int(path.name.removeprefix("step-")) for path in (whole / "checkpoints").glob("step-*"))
    for step in steps[1:]:
        shutil.rmtree(resumed / "checkpoints" / f"step-{step}")
    point_link(resumed / "checkpoints" / "last", f"step-{steps[0]}")
    assert 0 < progress_of(resumed) == steps[0] < len(lines)
    run_distill(distilling(clip, teacher, resumed, **more, resume=True))
    assert losses_of(resumed, "grad_norm") == losses_of(whole, "grad_norm")
    changed = distilling(clip, teacher, resumed, **more, resume=True)
    with pytest.raises(ConfigError, match=r"streams\.stream_frames: 3 -> 2"):
        run_distill(replace(changed, streams=StreamTrainingConfig(stream=(0.34, 0.5), stream_frames=2)))


def test_frames_are_others_than_what_is_made_of_images(clip: Path, teacher: Path, tmp_path: Path) -> None:
    made = StreamTrainingConfig(stream=(0.34, 0.5))
    run_distill(distilling(clip, teacher, tmp_path / "frames"))
    run_distill(distilling(clip, teacher, tmp_path / "made", streams=made))
    assert losses_of(tmp_path / "frames") != losses_of(tmp_path / "made")


def test_a_classifier_on_a_stream(classes: Path, expert: Path, tmp_path: Path) -> None:
    run_distill(distilling(classes, expert, tmp_path / "run"))
    assert {"logits_loss", "label_loss"} < set(read_metrics(tmp_path / "run")[0])
    assert "top1" in read_metrics(tmp_path / "run", "eval.jsonl")[-1]


REFUSED = {
    "--stream 0.5,0.2": "--stream 0.5,0.2 is not LOW,HIGH",
    "--stream 0": "--stream 0,0 is not LOW,HIGH",
    "--stream-frames 2": "--stream-frames 2 is for --stream",
    "--stream 0.2 --keep-ratio 0.5": "--keep-ratio 0.5,0.5 does not go with --stream",
    "--stream 0.5 --relation-weight 1": "--stream 0.5,0.5 does not go with --relation-weight",
    "--stream 0.5 --pixel-weight 1": "--pixel-weight needs masked patches",
    "--stream 0.5 --sharding fsdp2": "--stream 0.5,0.5 with --sharding fsdp2",
}


def test_what_does_not_go_with_a_stream(
    images: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "distill",
        str(images),
        "--teacher",
        str(teacher),
        "--student",
        "vit_nano_patch4",
        "--image-size",
        "12,8",
    ]
    for options, said in REFUSED.items():
        assert main([*command, "--out", str(tmp_path / "run"), *options.split()]) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
