"""Model cards: the front matter that model hubs read, and what is said of a licence."""

from __future__ import annotations

import json

from mae_deploy.checkpoint import NON_COMMERCIAL, OWN_LICENCE, UNKNOWN_LICENCE
from mae_deploy.errors import import_optional
from mae_deploy.runtime.bundle import Bundle

LICENCE_IDS = {
    NON_COMMERCIAL: "cc-by-nc-4.0",
    "Apache-2.0": "apache-2.0",
    "MIT": "mit",
    "CC-BY-4.0": "cc-by-4.0",
    "CC0-1.0": "cc0-1.0",
}
"""SPDX's names of licences to those of model hubs."""

_HUB_LICENCES = {**LICENCE_IDS, UNKNOWN_LICENCE: "unknown"}
"""As model hubs name them; any other licence is `other` there, with a name."""

MARK = "Written by `mae-deploy push`."
"""By which a card is known as ours, and may be written anew."""

_KINDS = {"mae": "masked autoencoder, encoder and decoder", "encoder": "ViT encoder", "classifier": "ViT classifier"}


def front_matter(licence: str, *, library: str, kind: str, tags: tuple[str, ...] = ()) -> list[str]:
    """The lines of YAML that open a card."""
    data = import_optional("huggingface_hub", extra="hub").ModelCardData(
        license=_HUB_LICENCES.get(licence, "other"),
        license_name=None if licence in _HUB_LICENCES else licence,
        library_name=library,
        pipeline_tag="image-classification" if kind == "classifier" else "image-feature-extraction",
        tags=["masked-autoencoder", "vit", *tags],
    )
    return ["---", data.to_yaml(), "---", ""]


def licence_words(licence: str) -> str:
    """The licence in a sentence."""
    if licence == OWN_LICENCE:
        return "Trained from nothing on its owner's images: its owner decides."
    if licence == UNKNOWN_LICENCE:
        return "Unspecified: find out what the weights that it derives from may be used for."
    return f"{licence}, inherited from the weights that it derives from."


def bundle_card(bundle: Bundle, address: str, licence: str) -> str:
    """The card of a bundle as Markdown.

    Args:
        address: where it will be, `hf://…`.
        licence: the bundle's, or what the owner of weights of their own says.
    """
    manifest, model = bundle.manifest, bundle.model
    size = "x".join(map(str, (model["in_chans"], *model["image_size"])))
    parity = {
        name: ", ".join(f"{key} {value:.6g}" for key, value in record.items() if isinstance(value, float))
        for name, record in manifest["parity"].items()
        if isinstance(record, dict)
    }
    said = licence_words(licence) if licence == bundle.licence else f"{licence}, as its owner says."
    lines = [
        *front_matter(licence, library="mae-deploy", kind=manifest["kind"], tags=("onnx", manifest["precision"])),
        f"# {model['name']}",
        "",
        (
            f"A {_KINDS[manifest['kind']]} as a bundle of mae-deploy: {size} images, {manifest['token_mode']} tokens,"
            f" {manifest['precision']}, made for {manifest['engine']}. {MARK}"
        ),
        "",
        "```sh",
        "pip install 'mae-deploy[hub]'",
        f"mae-deploy verify {address}",
        f"mae-deploy predict {address} IMAGES",
        "```",
        "",
        "```python",
        "from mae_deploy.runtime import Backbone",
        "",
        f'backbone = Backbone.load("{address}")',
        "```",
        "",
        "## Licence",
        "",
        said,
        "",
        "## Checked",
        "",
        "Against PyTorch, at export; `mae-deploy verify` checks it again where it runs.",
        "",
        *(f"- {name}: {words}" for name, words in parity.items() if words),
        "",
        "## Provenance",
        "",
        "```json",
        json.dumps(manifest["provenance"], indent=2, default=str),
        "```",
        "",
    ]
    return "\n".join(lines)
