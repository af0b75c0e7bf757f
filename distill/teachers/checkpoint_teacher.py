"""Encoders, autoencoders and classifiers of ours, and imported ones, as teachers."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from mae_deploy.checkpoint import CheckpointKind
from mae_deploy.config import from_dict
from mae_deploy.distill.config import TeacherConfig
from mae_deploy.distill.teachers.base import SPATIAL_KINDS, check_offered
from mae_deploy.distill.teachers.torch_teacher import TorchTeacher
from mae_deploy.errors import ConfigError
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.models.config import DecoderConfig, EncoderConfig
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.masking import Masking
from mae_deploy.models.taps import BLOCK_KINDS, DECODER_KINDS, Tap, tapped
from mae_deploy.models.vit import Encoder
from mae_deploy.weights.frozen import frozen, image_size_for
from mae_deploy.weights.load import LoadedWeights, at_image_size

_NO_DECODER = "give a pretraining run: other checkpoints have no decoder"

_HINTS = {"logits": "finetune it first, or use --objective features", "decoder": _NO_DECODER, "pixels": _NO_DECODER}


class CheckpointTeacher(TorchTeacher):
    """A network of ours, cut behind the deepest tap."""

    model: Encoder

    def __init__(self, loaded: LoadedWeights, settings: TeacherConfig) -> None:
        super().__init__(settings)
        metadata, encoder = loaded.metadata, loaded.encoder_config
        decoder = from_dict(DecoderConfig, metadata.decoder or {}) if metadata.kind == "mae" else None
        self.depth, self.width, self.num_heads = encoder.blocks, encoder.width, encoder.heads
        self.decoder_depth = decoder.decoder_depth if decoder is not None else 0
        self.decoder_width = decoder.decoder_embed_dim if decoder is not None else 0
        self.num_classes, self.class_names = metadata.num_classes, metadata.class_names
        self.kind: CheckpointKind = metadata.kind
        self.licence, self.record = metadata.licence, loaded.record
        self.preprocess = from_dict(Preprocess, metadata.preprocess)
        self.encoder_config: EncoderConfig | None = encoder
        self._loaded: LoadedWeights | None = loaded

    def watch(self, wanted: Collection[Tap], *, student: EncoderConfig, spec: Preprocess) -> None:
        """See `Teacher`."""
        check_offered(wanted, kinds=self._kinds(), depth=self.depth, decoder_depth=self.decoder_depth, hints=_HINTS)
        loaded, self._loaded = self._loaded, None  # weights that are not needed are let go of
        assert loaded is not None
        if any(tap.kind in SPATIAL_KINDS for tap in wanted):
            size = image_size_for(loaded, student.grid_size)
            loaded = at_image_size(loaded, size if self.settings.teacher_grid == "resize" else None)
        config = loaded.encoder_config
        if Tap("pixels") in wanted and config.grid_size != student.grid_size:
            raise ConfigError(
                "pixels of another grid are not pixels of the student's patches", hint="pass --teacher-grid resize"
            )
        if config.band_groups is not None:
            self.reason_against_subset = "it has groups of bands, and so several tokens at each place"
        model = frozen(loaded, wanted)
        self.sees_all = isinstance(model, MaskedAutoencoder) and model.objective.encoder_mask_tokens
        self.prepare(
            model, wanted, student=student, spec=spec, grid_size=config.grid_size, image_size=config.image_size
        )

    def forward(self, images: Tensor, masking: Masking | None) -> tuple[Tensor, ...]:
        """See `TorchTeacher`."""
        if masking is None and any(tap.kind in DECODER_KINDS for tap in self.wanted):
            masking = _nothing_hidden(self.model.config.num_patches, images)
        taps = tapped(self.model, images, self.wanted, masking)
        return tuple(taps[tap] for tap in self.wanted)

    def _kinds(self) -> tuple[str, ...]:
        decoder = (*(("decoder",) if self.decoder_depth else ()), "pixels") if self.kind == "mae" else ()
        return (*BLOCK_KINDS, *decoder, "latent", "cls", "pooled", *(("logits",) if self.kind == "classifier" else ()))


def _nothing_hidden(num_patches: int, images: Tensor) -> Masking:
    """The masking that keeps every patch in its place: what a decoder is given of whole images."""
    places = torch.arange(num_patches, device=images.device).expand(len(images), -1)
    return Masking(places, places, torch.zeros(places.shape, device=images.device))
