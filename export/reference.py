"""PyTorch's FP32 outputs, against which every graph and engine is checked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mae_deploy.images.preprocess import Preprocess
from mae_deploy.images.read import Array
from mae_deploy.models.bands import feature_map
from mae_deploy.models.cached import empty_cache, update
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.pyramid import SimpleFeaturePyramid
from mae_deploy.models.vit import Classifier, Encoder, patchify
from mae_deploy.runtime.manifest import IDS_KEEP, IMAGES, NUM_KEEP, PATCHES, UPDATES

_BATCH = 8

ALL_TOKENS = "cls and tokens"
"""What others call the last hidden state, registers among it: `(B, P + K, D)`; no graph of ours gives it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """A model, and what beyond its own outputs a graph may give."""

    model: Encoder
    """Encoder, classifier, or autoencoder where `pixels` are asked for; in evaluation mode."""
    preprocess: Preprocess
    pyramid: SimpleFeaturePyramid | None = None
    pixels: str = "target"
    """See `export.graph.GraphSpec.pixels`."""
    device: str = "cpu"

    @torch.no_grad()
    def outputs(self, inputs: dict[str, Array], names: tuple[str, ...]) -> dict[str, Array]:
        """The named outputs, float32 `(S, ...)`.

        Args:
            inputs: `images`, float32 `(S, C, H, W)`, normalised; `ids_keep`, int64 `(S, K)`, unless all patches are
                seen; `num_keep`, int64 `(S,)`, where the rows of `ids_keep` are padded: each image is then run alone
                with its own patches, and padded rows are zero. Of streams, `patches (S, M, P * P * C)` and `updates`
                beside `ids_keep (S, M)`: what the last update gives.
        """
        self._place()
        found: dict[str, list[Array]] = {name: [] for name in names}
        for images, ids in self._batches(inputs):
            values = self._values(images, ids, names, _updates(inputs))
            for name in names:
                found[name].append(_padded(name, values[name].float().cpu().numpy(), inputs))
        return {name: np.concatenate(values) for name, values in found.items()}

    @torch.no_grad()
    def blocks(self, inputs: dict[str, Array], num_samples: int, num_tokens: int) -> Array:
        """Tokens after every block, CLS and registers first: float32 `(S, L, T, D)` for the first samples and at most
        so many tokens that every sample has.
        """
        self._place()
        few = {name: array[:num_samples] for name, array in inputs.items()}
        prefix = self.model.config.num_prefix
        least = prefix + int(few[NUM_KEEP].min()) if NUM_KEEP in few else num_tokens
        found = []
        for images, ids in self._batches(few):
            _, _, inner = self._encode(images, ids, _updates(few))
            found.append(torch.stack(inner, dim=1)[:, :, : min(num_tokens, least)].float().cpu().numpy())
        return np.concatenate(found)

    def _place(self) -> None:
        self.model.to(self.device).eval()
        if self.pyramid is not None:
            self.pyramid.to(self.device).eval()

    def _batches(self, inputs: dict[str, Array]) -> Iterator[tuple[Tensor, Tensor | None]]:
        images, ids_keep, num_keep = (
            torch.from_numpy(inputs[name]) if name in inputs else None
            for name in (PATCHES if UPDATES in inputs else IMAGES, IDS_KEEP, NUM_KEEP)
        )
        assert images is not None
        step = 1 if num_keep is not None else _BATCH
        for first in range(0, len(images), step):
            ids = ids_keep[first : first + step] if ids_keep is not None else None
            if ids is not None and num_keep is not None:
                ids = ids[:, : int(num_keep[first])]
            yield images[first : first + step].to(self.device), ids.to(self.device) if ids is not None else None

    def _encode(
        self, images: Tensor, ids_keep: Tensor | None, updates: list[int] | None
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Tokens after the final norm, `(B, T, D)`, what is pooled of them, `(B, D)`, and the tokens after every block;
        of a stream, those of the last update, and what is pooled of all patches that were computed.
        """
        if updates is not None:
            assert ids_keep is not None
            return _run_stream(self.model, images, ids_keep, updates)
        with _tapped(self.model) as inner:
            tokens = Encoder.forward(self.model, images, ids_keep)
        return tokens, Encoder.pool_latent(self.model, tokens), inner

    def _values(
        self, images: Tensor, ids_keep: Tensor | None, names: tuple[str, ...], updates: list[int] | None
    ) -> dict[str, Tensor]:
        model, prefix = self.model, self.model.config.num_prefix
        tokens, pooled, inner = self._encode(images, ids_keep, updates)
        values = {"cls": tokens[:, 0], "tokens": tokens[:, prefix:], "pooled": pooled, ALL_TOKENS: tokens}
        values |= {f"block_{index}": block[:, prefix:] for index, block in enumerate(inner)}
        if isinstance(model, Classifier):
            values["logits"] = model.head(values["cls" if model.pool == "cls" else "pooled"])
            values["probs"] = values["logits"].float().softmax(dim=-1)
        if updates is not None:
            return values
        values["feature_map"] = feature_map(tokens[:, prefix:], ids_keep, model.config)
        if self.pyramid is not None:
            values |= self.pyramid(feature_map(inner[-1][:, prefix:], ids_keep, model.config))
        if "pixels" in names:
            assert isinstance(model, MaskedAutoencoder)
            assert ids_keep is not None
            values["pixels"] = self._pixels(
                model, images, model.forward_decoder(tokens, restoring(ids_keep, model.config.num_patches))
            )
        return values

    def _pixels(self, model: MaskedAutoencoder, images: Tensor, pixels: Tensor) -> Tensor:
        if self.pixels != "target" and model.norm_pix_loss:
            variance, mean = torch.var_mean(patchify(images, model.config.patch), dim=-1, keepdim=True)
            pixels = pixels * (variance + 1e-6).sqrt() + mean
        if self.pixels == "image":
            mean, std = (
                pixels.new_tensor(values).repeat(model.config.patch**2)
                for values in (self.preprocess.mean, self.preprocess.std)
            )
            pixels = pixels * std + mean
        return pixels


@contextmanager
def _tapped(model: Encoder) -> Iterator[list[Tensor]]:
    """Collect what every encoder block gives, `(B, T, D)` each."""
    inner: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        inner.append(output)

    hooks = [block.register_forward_hook(keep) for block in model.blocks]
    try:
        yield inner
    finally:
        for hook in hooks:
            hook.remove()


def _updates(inputs: dict[str, Array]) -> list[int] | None:
    return inputs[UPDATES][0].tolist() if UPDATES in inputs else None


def _run_stream(
    model: Encoder, patches: Tensor, ids_keep: Tensor, updates: list[int]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Streams from their first update to the last; see `Reference._encode`."""
    B, N, D, prefix = len(patches), model.config.num_patches, model.config.width, model.config.num_prefix
    cache, frame = empty_cache(model, B), patches.new_zeros(B, N, D)
    for part, ids in zip(patches.split(updates, dim=1), ids_keep.split(updates, dim=1), strict=True):
        tokens, cache, inner = update(model, part, ids, cache)
        frame = frame.scatter(1, ids[..., None].expand(-1, -1, D), tokens[:, prefix:])
    # One after the other: of each, other patches were computed.
    seen = [frame[at, cache.computed[at, prefix:]] for at in range(B)]
    pooled = [Encoder.pool_latent(model, torch.cat([tokens[at, :prefix], seen[at]])[None]) for at in range(B)]
    return tokens, torch.cat(pooled), inner


def restoring(ids_keep: Tensor, num_patches: int) -> Tensor:
    """`ids_restore (B, N)` of a shuffle that begins with `ids_keep` (the order of the masked patches means nothing)."""
    masked = torch.ones(len(ids_keep), num_patches, dtype=torch.bool, device=ids_keep.device).scatter(
        1, ids_keep, False
    )
    rest = masked.nonzero()[:, 1].reshape(len(ids_keep), -1)
    return torch.cat([ids_keep, rest], dim=1).argsort(dim=1)


def _padded(name: str, value: Array, inputs: dict[str, Array]) -> Array:
    """Rows of a ragged batch filled up with zeros to the padded length."""
    if NUM_KEEP not in inputs or not (name == "tokens" or name.startswith("block_")):
        return value
    missing = inputs[IDS_KEEP].shape[1] - value.shape[1]
    return np.pad(value, ((0, 0), (0, missing), (0, 0)))
