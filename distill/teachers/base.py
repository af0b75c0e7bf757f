"""What a teacher is: a frozen network of any origin that answers a batch with taps, and says what it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from typing import Any, Protocol

import torch

from mae_deploy.checkpoint import CheckpointKind
from mae_deploy.errors import ConfigError
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.models.config import EncoderConfig
from mae_deploy.models.masking import Masking
from mae_deploy.models.taps import BLOCK_KINDS, DECODER_KINDS, Tap, Taps
from mae_deploy.training.step import StepBatch

SPATIAL_KINDS = (*BLOCK_KINDS, *DECODER_KINDS, "latent")
"""What has a row for each patch, and so needs the student's grid."""


class Teacher(Protocol):
    """A frozen network. Opened, it says what it is; `watch` and then `to` make it ready; then it answers batches."""

    depth: int
    """Blocks of the encoder; 0 where it is not a ViT."""
    width: int
    """Width of tokens, latent, cls and pooled."""
    num_heads: int
    decoder_depth: int
    """Blocks of the decoder; 0 without."""
    decoder_width: int
    num_classes: int | None
    """Width of the logits; None without."""
    class_names: tuple[str, ...] | None
    """In the order of the logits, where known."""
    kind: CheckpointKind
    """mae, encoder or classifier."""
    licence: str
    """What may be done with weights that learnt from it."""
    record: dict[str, Any]
    """Where it comes from, for the student's provenance."""
    preprocess: Preprocess
    """The images that it was trained on: the student's size, channels, mean and deviation unless others are asked
    for."""
    encoder_config: EncoderConfig | None
    """The shape of an encoder of ours; None of a timm model."""

    @property
    def key(self) -> str:
        """A hash of the weights and of everything that changes the answers, once `watch` and `to` were called; for
        caches.
        """
        ...

    @property
    def reason_against_subset(self) -> str | None:
        """Why it can only be shown whole images, in words, once `watch` was called; None: it can be shown the visible
        patches alone.
        """
        ...

    def watch(self, wanted: Collection[Tap], *, student: EncoderConfig, spec: Preprocess) -> None:
        """Get ready to give these taps, and let go of everything that they do not need; called once.

        Args:
            student: its grid is that of the answers.
            spec: how the batches are normalised.

        Raises:
            ConfigError: it has no such tap, or its grid cannot be the student's; names what there is.
        """
        ...

    def to(self, device: torch.device) -> None:
        """Move to where the batches are; after `watch`.

        Raises:
            MissingDependency: the device or the engine is not available.
        """
        ...

    def __call__(self, batch: StepBatch, masking: Masking | None, *, whole: bool) -> Taps:
        """The taps of a batch, without gradients, in float32, in the student's grid; tokens and decoder normalised
        (LayerNorm without affine).

        Args:
            masking: the student's view; None: the whole image. Tokens, qkv and latent have CLS and the rows of its
                `ids_keep`.
            whole: it sees the whole image, and the kept patches' rows are picked of its answer; else it sees what the
                student sees.
        """
        ...


def check_view(teacher: Teacher, *, masked: bool, whole: bool) -> None:
    """Whether the teacher can be shown what it is to see, before the first batch.

    Raises:
        ConfigError: says why not.
    """
    if masked and not whole and (reason := teacher.reason_against_subset) is not None:
        raise ConfigError(
            f"the teacher can only be shown whole images: {reason}", hint="pass --teacher-view whole, or --mask-ratio 0"
        )


def check_offered(
    wanted: Collection[Tap],
    *,
    kinds: Collection[str],
    depth: int,
    decoder_depth: int = 0,
    hints: dict[str, str] | None = None,
) -> None:
    """Whether there are all of these taps.

    Args:
        kinds: what the teacher has.
        hints: what to do to have another kind.

    Raises:
        ConfigError: names the first that is missing, and what there is.
    """
    for tap in wanted:
        if tap.kind not in kinds:
            hint = (hints or {}).get(tap.kind)
            raise ConfigError(f"the teacher gives no {tap.kind}, only {', '.join(kinds)}", hint=hint)
        blocks = decoder_depth if tap.kind == "decoder" else depth
        if tap.kind in (*BLOCK_KINDS, "decoder") and not 1 <= tap.block <= blocks:
            part = "decoder" if tap.kind == "decoder" else "encoder"
            raise ConfigError(f"the teacher's {part} has no block {tap.block}", hint=f"its blocks are 1 to {blocks}")


def key_of(*parts: Any) -> str:
    """A hash of plain values, for `Teacher.key`."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def reason_against_grid(found: tuple[int, int], asked: tuple[int, int]) -> str | None:
    """Why the student's patch indices mean nothing to a teacher, if they do not."""
    return None if found == asked else f"it sees {found[0]}x{found[1]} patches, the student {asked[0]}x{asked[1]}"
