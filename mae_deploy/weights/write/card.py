"""The README.md of exported weights: licence, what the model is, how it is loaded, what was checked, and where it comes
from.
"""

from __future__ import annotations

import json
from typing import Any

from mae_deploy.reporting.card import front_matter, licence_words
from mae_deploy.weights.write.foreign import ForeignModel, Library, architecture_of

_KINDS = {"mae": "masked autoencoder, encoder and decoder", "encoder": "ViT encoder", "classifier": "ViT classifier"}


def model_card(model: ForeignModel, library: Library, proof: dict[str, Any]) -> str:
    """The card as Markdown, with the front matter that model hubs read."""
    metadata, encoder = model.loaded.metadata, model.loaded.encoder_config
    size = "x".join(map(str, encoder.image_size))
    lines = [
        *front_matter(metadata.licence, library="timm" if library == "timm" else "transformers", kind=metadata.kind),
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
        licence_words(metadata.licence),
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


def _groups(names: list[str]) -> list[str]:
    """The parts that tensors belong to, each once."""
    return list(dict.fromkeys(name.split(".")[0] for name in names))
