"""The README.md of exported weights: licence, what the model is, how it is loaded, what was checked, and where it comes
from.
"""

from __future__ import annotations

import json
from typing import Any

from huggingface_hub import ModelCardData

from mae_deploy.checkpoint import OWN_LICENCE, UNKNOWN_LICENCE
from mae_deploy.weights.write.foreign import LICENCE_IDS, ForeignModel, Library, architecture_of

_KINDS = {"mae": "masked autoencoder, encoder and decoder", "encoder": "ViT encoder", "classifier": "ViT classifier"}

_HUB_LICENCES = {**LICENCE_IDS, UNKNOWN_LICENCE: "unknown"}
"""As model hubs name them; any other licence is `other` there, with a name."""


def model_card(model: ForeignModel, library: Library, proof: dict[str, Any]) -> str:
    """The card as Markdown, with the front matter that model hubs read."""
    metadata, encoder = model.loaded.metadata, model.loaded.encoder_config
    size = "x".join(map(str, encoder.image_size))
    lines = [
        "---",
        _front_matter(metadata.licence, library, metadata.kind).to_yaml(),
        "---",
        "",
        f"# {encoder.name}",
        "",
        (
            f"A {_KINDS[metadata.kind]} for {encoder.in_chans}x{size} images: patch {encoder.patch}, {encoder.width}"
            f" wide, {encoder.blocks} blocks, {encoder.heads} heads. Written by `mae-deploy export-weights`."
        ),
        "",
        "```python",
        *_usage(library, metadata.kind),
        "```",
        "",
        "## Licence",
        "",
        _licence(metadata.licence),
        "",
        "## Proof",
        "",
        *(f"- {name}: {words}" for name, words in proof.items()),
        *([f"- left out: {', '.join(_groups(model.left_out))}"] if model.left_out else []),
        "",
        "## Provenance",
        "",
        "```json",
        json.dumps({**metadata.provenance, "metrics": metadata.metrics}, indent=2, default=str),
        "```",
        "",
    ]
    return "\n".join(lines)


def _front_matter(licence: str, library: Library, kind: str) -> ModelCardData:
    """What model hubs read."""
    return ModelCardData(
        license=_HUB_LICENCES.get(licence, "other"),
        license_name=None if licence in _HUB_LICENCES else licence,
        library_name="timm" if library == "timm" else "transformers",
        pipeline_tag="image-classification" if kind == "classifier" else "image-feature-extraction",
        tags=["masked-autoencoder", "vit"],
    )


def _usage(library: Library, kind: str) -> list[str]:
    if library == "timm":
        return ["import timm", "", 'model = timm.create_model("local-dir:PATH/TO/THIS/FOLDER", pretrained=True).eval()']
    name = architecture_of(kind)
    pooler = ", add_pooling_layer=False" if kind == "encoder" else ""
    return [
        f"from transformers import {name}",
        "",
        f'model = {name}.from_pretrained("PATH/TO/THIS/FOLDER"{pooler}).eval()',
    ]


def _licence(licence: str) -> str:
    if licence == OWN_LICENCE:
        return "Trained from nothing on its owner's images: its owner decides."
    if licence == UNKNOWN_LICENCE:
        return "Unspecified: find out what the weights that it derives from may be used for."
    return f"{licence}, inherited from the weights that it derives from."


def _groups(names: list[str]) -> list[str]:
    """The parts that tensors belong to, each once."""
    return list(dict.fromkeys(name.split(".")[0] for name in names))
