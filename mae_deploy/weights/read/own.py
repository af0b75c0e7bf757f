"""Files that we wrote ourselves: what they say in a safetensors header, in a `.pth`, or beside the weights."""

from __future__ import annotations

from typing import Any

from mae_deploy.checkpoint import METADATA, OWN_RECORD, SCHEMA_VERSION, WEIGHTS, Metadata, read_record
from mae_deploy.config import from_dict
from mae_deploy.errors import ConfigError
from mae_deploy.files import read_json
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.models.config import DecoderConfig, EncoderConfig, ObjectiveConfig
from mae_deploy.reporting.preprocess import PREPROCESS_FROM
from mae_deploy.text import parse_json
from mae_deploy.weights.read.files import Source


def is_plain(metadata: Metadata) -> bool:
    """Whether a decoder, if there is one, predicts pixels from an encoder that has not seen them, as in the paper."""
    objective = from_dict(ObjectiveConfig, metadata.objective or {})
    return metadata.kind != "mae" or (objective.target == "pixels" and not objective.encoder_mask_tokens)


def own_record(source: Source) -> Metadata | None:
    """The metadata in the file, or beside the weights of a checkpoint of ours."""
    record: Any = source.beside.get(OWN_RECORD)
    if isinstance(record, str):
        record = _parsed(record)
    elif isinstance(record, dict):  # a .pth that we exported
        record = {"schema_version": SCHEMA_VERSION, **record}
    elif source.file.name == WEIGHTS and source.file.with_name(METADATA).is_file():
        record = read_json(source.file.with_name(METADATA))
    return read_record(record, source.file) if isinstance(record, dict) and "schema_version" in record else None


def take_record(source: Source, metadata: Metadata) -> Source:
    """What our own files say of themselves is taken.

    Raises:
        ConfigError: it is no model that can be imported, but a checkpoint.
    """
    encoder, decoder = from_dict(EncoderConfig, metadata.encoder), from_dict(DecoderConfig, metadata.decoder or {})
    if encoder.band_groups is not None or not is_plain(metadata):
        raise ConfigError(
            f"{source.file} is ours already, and no plain autoencoder or encoder",
            hint="every command takes it as it is",
        )
    source.image_size, source.num_heads, source.decoder_num_heads = (
        encoder.image_size,
        encoder.num_heads,
        decoder.decoder_num_heads,
    )
    source.norm_pix_loss, source.class_names, source.own_licence = (
        metadata.norm_pix_loss,
        metadata.class_names,
        metadata.licence,
    )
    source.preprocess, source.parent = from_dict(Preprocess, metadata.preprocess), metadata.provenance
    source.preprocess_from = metadata.provenance.get(PREPROCESS_FROM, "our record")
    source.pool, source.positions = metadata.pool, metadata.positions
    source.name, source.beyond_plain = encoder.name, encoder.beyond_plain()
    return source


def take_words(source: Source) -> None:
    """Licence and provenance in the header of a safetensors file."""
    licence = source.beside.get("licence")
    source.own_licence = licence if isinstance(licence, str) and licence else None
    source.parent = _parsed(source.beside.get("provenance"))


def refuse_without_record(source: Source, *, known: bool) -> None:
    """Older files of ours have a licence in their header and everything else in a file beside them.

    Args:
        known: the user says what the tensors do not tell.

    Raises:
        ConfigError: it was moved away from that file.
    """
    if source.own_licence is None or known or source.settings or own_record(source) is not None:
        return
    beside = "config.json" if source.parent else METADATA
    raise ConfigError(
        f"{source.file} was written by an older mae-deploy and moved away from its {beside}, which tells heads,"
        " preprocessing and classes",
        hint=f"put {beside} beside it, or say the heads: mae-deploy import {source.file} --num-heads N --out CKPT",
    )


def _parsed(words: Any) -> dict[str, Any]:
    try:
        value = parse_json(words) if isinstance(words, str) else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
