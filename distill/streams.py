"""Training for streams: the student sees an image as the next frame of a camera, as `backbone.stream` shows it one.

An earlier frame leaves keys and values of all patches behind; of the image, the patches that differ most are computed,
and some in turn, whose mean change moves all others (docs/streams.md). What comes of it is to be what the teacher gives
for the whole image.
Shapes: B images, C channels, N patches, K computed ones, R of them in turn, D width.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from mae_deploy.errors import ConfigError
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.models.cached import empty_cache, update
from mae_deploy.models.config import EncoderConfig
from mae_deploy.models.rotary import places_of
from mae_deploy.models.taps import Tap, Taps, encoder_depth, logits
from mae_deploy.models.vit import Encoder, gather_tokens, patchify
from mae_deploy.runtime.streams.config import StreamOptions
from mae_deploy.runtime.streams.shift import SHARE
from mae_deploy.training.config import Sharding
from mae_deploy.training.kept_patches import KeptPatches
from mae_deploy.training.step import StepBatch

_TURN = StreamOptions().refresh / 2
"""Share of all patches that are computed in turn, as a stream does that is far from whole frames; the other half of its
refresh is of what differs most, as are all others here."""

_CHANGED, _LEAST, _MOST = 4.0, 0.02, 0.5
"""Two images are frames of one scene where a share of the patches between the two differs by more than so many grey
levels of 255."""

_RADIUS, _WAY = (0.06, 0.2), 0.3
"""Of what moved in a made frame: from the middle to the edge, and how far it went, as shares of the image's sides."""

_FLICKER, _NOISE, _JITTER = 0.05, 4.0, 1
"""Most that a made frame differs by all over: share of the brightness, deviation of 255, pixels."""

_WITHOUT = ("relation", "attention", "pixel", "decoder_feature")
"""Objectives that compare what a stream does not have for a whole image."""


class Update(NamedTuple):
    """What the student sees of an image, and what it has seen before."""

    earlier: Tensor
    """`(B, C, H, W)`, normalised; seen whole."""
    ids: Tensor
    """`(B, K)` int64: the patches of the image that are computed, each once."""
    turn: int
    """R: so many of them, the last ones, in turn."""


class Updates:
    """Makes an update of each image of a batch; what is drawn for it depends on the seed, the step and the image's
    place in the step.
    """

    def __init__(self, encoder: EncoderConfig, spec: Preprocess, stream: tuple[float, float]) -> None:
        self.patch = encoder.patch
        self.turn = math.ceil(_TURN * encoder.num_patches)
        self.kept = KeptPatches(encoder.num_patches, stream)
        self.spec = spec

    def __call__(self, batch: StepBatch) -> tuple[StepBatch, Update]:
        """The batch of the images alone, and their updates.

        Args:
            batch: its images are `(B, C, H, W)`, or pairs of an earlier one and the image, `(B, 2, C, H, W)`. Where
                the two are not frames of one scene, or hardly anything changed, the earlier one is made of the image.
        """
        before, images = batch.images.unbind(1) if batch.images.ndim == 5 else (None, batch.images)
        batch = replace(batch, images=images)
        earlier = self.made(batch)
        if before is not None:
            changed = (self._differences(before, images) > _CHANGED).float().mean(dim=1)
            is_scene = (changed >= _LEAST) & (changed <= _MOST)
            earlier = torch.where(is_scene[:, None, None, None], before, earlier)
        K = self.kept.count(batch.seed, batch.step)
        turn = min(K, self.turn)
        wanted = self._differences(earlier, images).topk(K - turn, dim=1).indices
        in_turn = batch.rand(self.kept.num_patches).scatter(1, wanted, -1.0).topk(turn, dim=1).indices
        return batch, Update(earlier, torch.cat([wanted, in_turn], dim=1), turn)

    def made(self, batch: StepBatch) -> Tensor:
        """The images `(B, C, H, W)` as they may have been a moment before: something was elsewhere, the light and the
        camera were not quite the same.

        The earlier frame reads the image at other places. What moved is an ellipse; where it is now, there was what
        the image has half its size away.
        """
        images = batch.images
        B, _, H, W = images.shape
        size = torch.tensor([H, W], device=images.device)
        draws = batch.rand(9)
        radius = (_RADIUS[0] + (_RADIUS[1] - _RADIUS[0]) * draws[:, 0:2]) * size
        way = ((2 * draws[:, 2:4] - 1) * _WAY * size).round()
        jitter = ((2 * _JITTER + 1) * draws[:, 4:6]).floor() - _JITTER
        places = torch.stack(
            torch.meshgrid(*(torch.arange(side, device=images.device) for side in (H, W)), indexing="ij"), dim=-1
        )

        def inside(moved: Tensor | float) -> Tensor:
            middle = draws[:, 6:8] * size + moved
            away = (places + 0.5 - middle[:, None, None]) / radius[:, None, None]
            return away.square().sum(dim=-1, keepdim=True) < 1

        source = torch.where(inside(0.0), (places + size // 2) % size, places)
        source = torch.where(inside(way), places - way[:, None, None].long(), source)
        rows, columns = (
            (source[..., axis] + jitter[:, axis, None, None].long()).clamp(0, side - 1)
            for axis, side in enumerate((H, W))
        )
        first = torch.arange(B, device=images.device)[:, None, None]
        return self._in_other_light(batch, images[first, :, rows, columns].permute(0, 3, 1, 2), draws[:, 8])

    def _in_other_light(self, batch: StepBatch, images: Tensor, draws: Tensor) -> Tensor:
        """Brighter or darker, with noise of the step, more of it in some images."""
        mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (self.spec.mean, self.spec.std))
        light, strength = (draw[:, None, None, None] for draw in (_FLICKER * (2 * draws - 1), batch.rand(1)[:, 0]))
        one = replace(batch, images=images[:1], first=0, effective=0)
        noise = math.sqrt(12) * (one.rand(*images.shape[1:]) - 0.5) * (_NOISE / 255) / std
        return images * (1 + light) + mean / std * light + strength * noise

    def _differences(self, first: Tensor, second: Tensor) -> Tensor:
        """Mean absolute grey difference of each patch, of 255: `(B, N)`."""
        std = first.new_tensor(self.spec.std).view(-1, 1, 1)
        grey = ((first - second) * std).mean(dim=1, keepdim=True)
        return 255 * patchify(grey, self.patch).abs().mean(dim=2)


def check_stream(names: Collection[str], stream: tuple[float, float], *, sharding: Sharding) -> None:
    """Whether every objective with a weight has what it compares in a stream, and a block its weights.

    Raises:
        ConfigError: names the first that has not.
    """
    if sharding == "fsdp2":
        raise ConfigError(
            f"--stream {stream[0]:g},{stream[1]:g} with --sharding fsdp2: updates need whole weights",
            hint="leave --sharding out, a student fits on one device",
        )
    if without := [name for name in names if name in _WITHOUT]:
        flag = f"--{without[0].replace('_', '-')}-weight"
        raise ConfigError(
            f"--stream {stream[0]:g},{stream[1]:g} does not go with {flag}, which a stream has not of a whole frame",
            hint=f"pass {flag} 0, and match features, CLS, pooled or logits",
        )


def tapped_on_stream(model: Encoder, images: Tensor, seen: Update, wanted: Collection[Tap]) -> Taps:
    """As `tapped`, of whole images that are seen by an update: tokens after a block, latent, cls, pooled, logits."""
    B, N = len(images), model.config.num_patches
    depth = encoder_depth(wanted, len(model.blocks))
    everything = torch.arange(N, device=images.device).expand(B, -1)
    patches = patchify(images, model.config.patch)
    cache = empty_cache(model, B, depth)
    old, cache, old_inner = update(model, patchify(seen.earlier, model.config.patch), everything, cache)
    new, _, new_inner = update(model, gather_tokens(patches, seen.ids), seen.ids, cache)
    prefix = model.config.num_prefix
    latent = _whole(old, new, seen, prefix)
    read = {
        "latent": lambda: model.rows(latent),
        "cls": lambda: model.rows(latent)[:, 0],
        "pooled": lambda: model.pool_latent(latent),
        "logits": lambda: logits(model, latent),
    }

    def after(block: int) -> Tensor:
        return model.rows(_whole(old_inner[block - 1], new_inner[block - 1], seen, prefix))

    return {tap: read[tap.kind]() if tap.kind in read else after(tap.block) for tap in wanted}


def _whole(old: Tensor, new: Tensor, seen: Update, prefix: int) -> Tensor:
    """The earlier frame's tokens `(B, P + N, D)`, all as old as one another, moved by a stream's share of the mean
    change of those in turn, with the computed ones `(B, P + K, D)` in their places.
    """
    places = places_of(seen.ids, prefix)[..., None].expand_as(new)
    change = (new - old.gather(1, places))[:, -seen.turn :].mean(dim=1, keepdim=True)
    return (old + SHARE * change).scatter(1, places, new)
