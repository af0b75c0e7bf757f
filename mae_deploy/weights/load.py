"""Build models from checkpoint metadata, and start one model from another's weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from mae_deploy.checkpoint import Metadata, find_checkpoint, open_checkpoint
from mae_deploy.config import from_dict, to_dict
from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.models.config import BEYOND_PLAIN, DecoderConfig, EncoderConfig, ObjectiveConfig
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.position import interpolate_position_embedding
from mae_deploy.models.vit import Classifier, Encoder, Pool
from mae_deploy.progress import notice
from mae_deploy.weights.read.check_numbers import check_numbers
from mae_deploy.weights.read.convert import ImportOptions, import_weights

E = TypeVar("E", bound=Encoder)

ENCODER = (
    *("cls_token", "reg_token", "pos_embed", "channel_embed", "rope", "patch_embed", "norm_pre", "blocks", "norm"),
    "attn_pool",
)
"""First parts of the names of the plain encoder's tensors."""


@dataclass(frozen=True, slots=True)
class LoadedWeights:
    """Weights on the CPU, what they are, and the record to pass on to what is derived from them."""

    metadata: Metadata
    tensors: dict[str, Tensor]
    record: dict[str, Any]

    @property
    def encoder_config(self) -> EncoderConfig:
        """The encoder's shape."""
        return from_dict(EncoderConfig, self.metadata.encoder)

    def positions_at(self, name: str, grid_size: tuple[int, int]) -> Tensor:
        """A table of position embeddings for another grid, as its family interpolates: `(1, 1 + N', D)`."""
        table, source = self.tensors[name].float(), self.encoder_config.grid_size
        return interpolate_position_embedding(table, source, grid_size, self.metadata.positions)


def read_weights(path: Path) -> LoadedWeights:
    """Read a run folder, a checkpoint folder, or a weights file of ours, of the original implementation, timm or
    Hugging Face.

    Raises:
        ConfigError: nothing is there.
        CheckFailed: damaged, unsafe, not a MAE encoder, or not finite.
    """
    if find_checkpoint(path) is not None:
        checkpoint = open_checkpoint(path)
        tensors = checkpoint.tensors()
        check_numbers(tensors, checkpoint.weights)
        tensors = {name: tensor.float() for name, tensor in tensors.items()}  # somebody may have halved the file
        return LoadedWeights(checkpoint.metadata, tensors, checkpoint.record())
    imported = import_weights(path, ImportOptions())
    for note in imported.report["notes"]:
        notice("weights:", f"{path}: {note}")
    return LoadedWeights(imported.metadata, imported.tensors, {"path": str(path), **imported.metadata.provenance})


def build_model(metadata: Metadata) -> Encoder:
    """An untrained model of the checkpoint's kind."""
    config = from_dict(EncoderConfig, metadata.encoder)
    if metadata.kind == "mae":
        decoder, objective = (
            from_dict(DecoderConfig, metadata.decoder or {}),
            from_dict(ObjectiveConfig, metadata.objective or {}),
        )
        return MaskedAutoencoder(config, decoder, norm_pix_loss=metadata.norm_pix_loss, objective=objective)
    if metadata.kind == "classifier":
        return Classifier(config, num_classes=metadata.num_classes or 0, pool=cast(Pool, metadata.pool or "avg"))
    return Encoder(config)


def load_model(path: Path) -> tuple[Encoder, LoadedWeights]:
    """The model of a checkpoint with its weights, in evaluation mode."""
    loaded = read_weights(path)
    return model_of(loaded), loaded


def model_of(loaded: LoadedWeights) -> Encoder:
    """The model of these weights, in evaluation mode; it shares their memory."""
    _check_sizes(loaded)
    with torch.device("meta"):  # nothing is allocated or initialised that the weights replace
        model = build_model(loaded.metadata)
    load_strict(model, loaded.tensors, assign=True)
    return model.eval()


_LARGER = 4
"""Times that metadata may tell of more than the tensors have; whether they fit exactly is seen when they are loaded."""


def _check_sizes(loaded: LoadedWeights) -> None:
    """Whether the metadata tell of a model that is about as large as these tensors: one of 10^9 blocks would never be
    built.

    Raises:
        CheckFailed: it is much larger.
    """
    config, tensors = loaded.encoder_config, loaded.tensors
    decoder = from_dict(DecoderConfig, loaded.metadata.decoder or {})
    told = {
        "blocks": (config.blocks, _count(tensors, "blocks")),
        "decoder blocks": (decoder.decoder_depth, _count(tensors, "decoder_blocks")),
        "width": (config.width, _size(tensors, "norm.weight", 0)),
        "MLP width": (config.width * config.mlp_ratio, _size(tensors, "blocks.0.mlp.fc1.weight", 0)),
        "positions": (math.prod(config.grid_size), _size(tensors, "pos_embed", 1)),
        "decoder width": (decoder.decoder_embed_dim, _size(tensors, "decoder_norm.weight", 0)),
    }
    for name, (size, found) in told.items():
        if found and size > _LARGER * found:
            raise CheckFailed(f"the weights do not fit their metadata: {name} {found}, not {size}")


def _count(tensors: Mapping[str, Tensor], blocks: str) -> int:
    return len({name.split(".")[1] for name in tensors if name.startswith(f"{blocks}.")})


def _size(tensors: Mapping[str, Tensor], name: str, dim: int) -> int:
    return tensors[name].shape[dim] if name in tensors and tensors[name].ndim > dim else 0


def encoder_of(loaded: LoadedWeights) -> Encoder:
    """The encoder or classifier of these weights without a decoder, in evaluation mode."""
    if loaded.metadata.kind != "mae":
        return model_of(loaded)
    tensors = {name: tensor for name, tensor in loaded.tensors.items() if name.split(".")[0] in ENCODER}
    return model_of(LoadedWeights(replace(loaded.metadata, kind="encoder"), tensors, loaded.record))


def load_strict(model: torch.nn.Module, tensors: dict[str, Tensor], *, assign: bool = False) -> None:
    """Load a state dict that must fit exactly.

    Raises:
        CheckFailed: a missing, unexpected or misshapen tensor.
    """
    try:
        model.load_state_dict(tensors, assign=assign)
    except RuntimeError as error:
        raise CheckFailed(" ".join(str(error).split())) from error


def at_image_size(loaded: LoadedWeights, image_size: tuple[int, int] | None, *, said: bool = True) -> LoadedWeights:
    """The same weights for another image size, the position embeddings interpolated; None: as they are.

    Args:
        said: whether a line on stderr tells of it.
    """
    source = loaded.encoder_config
    if image_size is None or image_size == source.image_size:
        return loaded
    target = replace(source, image_size=image_size)
    grids = " to ".join(f"{rows}x{columns}" for rows, columns in (source.grid_size, target.grid_size))
    tensors = dict(loaded.tensors)
    how = f"interpolated from {grids} patches ({loaded.metadata.positions})"
    if said:
        notice("positions:", how if "pos_embed" in tensors else f"turned by those of {grids.split(' to ')[1]} patches")
    for name in ("pos_embed", "decoder_pos_embed"):
        if name in tensors:
            tensors[name] = loaded.positions_at(name, target.grid_size)
    preprocess = {**loaded.metadata.preprocess, "image_size": list(image_size)}
    return LoadedWeights(
        replace(loaded.metadata, encoder=to_dict(target), preprocess=preprocess), tensors, loaded.record
    )


def encoder_tensors(loaded: LoadedWeights, target: EncoderConfig) -> dict[str, Tensor]:
    """The encoder's part of the weights, its position embeddings interpolated to the target's grid.

    Raises:
        ConfigError: the two encoders differ in more than image size.
    """
    source = loaded.encoder_config
    for name in (
        "patch_size",
        "in_chans",
        "band_groups",
        "embed_dim",
        "depth",
        "num_heads",
        "mlp_ratio",
        *BEYOND_PLAIN,
    ):
        if getattr(source, name) != getattr(target, name):
            raise ConfigError(
                f"the checkpoint's encoder has {name} {getattr(source, name)}, the model asked for has"
                f" {getattr(target, name)}"
            )
    parts = (*ENCODER, *(("fc_norm",) if source.pool_norm else ()))
    tensors = {name: tensor for name, tensor in loaded.tensors.items() if name.split(".")[0] in parts}
    if "pos_embed" in tensors:
        tensors["pos_embed"] = loaded.positions_at("pos_embed", target.grid_size)
    return tensors


def start_autoencoder_from(model: MaskedAutoencoder, loaded: LoadedWeights) -> bool:
    """Put the encoder's weights into an autoencoder, and the decoder's where there is one of the same shape that
    predicts the same; returns whether there was.
    """
    own, data = model.state_dict(), loaded.metadata
    # A mean-pooled classifier has no norm behind its last block: the autoencoder's is a new one.
    norm = {name: own[name] for name in ("norm.weight", "norm.bias")} if data.pool == "avg" else {}
    start_from(model, replace(loaded, tensors={**norm, **loaded.tensors}))
    predicts = _predicts(from_dict(ObjectiveConfig, data.objective or {}), loaded.encoder_config, data.norm_pix_loss)
    if (
        data.kind != "mae"
        or from_dict(DecoderConfig, data.decoder or {}) != model.decoder_config
        or predicts != _predicts(model.objective, model.config, model.norm_pix_loss)
    ):
        return False
    tensors = at_image_size(loaded, model.config.image_size).tensors
    model.load_state_dict(
        {name: tensor for name, tensor in tensors.items() if name.split(".")[0] not in ENCODER}, strict=False
    )
    return True


def _predicts(objective: ObjectiveConfig, encoder: EncoderConfig, norm_pix_loss: bool) -> tuple[object, ...]:
    """What a decoder predicts, and from what."""
    normalised = norm_pix_loss and objective.target != "features"
    return objective.target, objective.width(encoder), objective.encoder_mask_tokens, normalised


def start_from(model: E, loaded: LoadedWeights) -> E:
    """Put the encoder's weights into a model of the same encoder; head, `fc_norm` and decoder stay as they are.

    As in the original, a mean-pooled classifier leaves the checkpoint's `norm` aside.
    """
    own = model.state_dict()
    tensors = {name: tensor for name, tensor in encoder_tensors(loaded, model.config).items() if name in own}
    missing = [name for name in own if name.split(".")[0] in ENCODER and name not in tensors]
    if missing:
        raise CheckFailed(f"the checkpoint lacks {len(missing)} tensors of the encoder, {missing[0]} among them")
    model.load_state_dict(tensors, strict=False)
    return model
