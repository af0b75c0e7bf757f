"""Model cards: the front matter that model hubs read, what is said of a licence, and the card of a bundle."""

from __future__ import annotations

import json

from mae_deploy.checkpoint import NON_COMMERCIAL, OWN_LICENCE, UNKNOWN_LICENCE
from mae_deploy.errors import import_optional
from mae_deploy.files import write_text
from mae_deploy.hub import CARD, is_address
from mae_deploy.reporting.bundles import PARITY, certificate_tables, run_command
from mae_deploy.reporting.tables import Column, Table
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

_EXPORTED = "Written by `mae-deploy export`."

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


def write_card(bundle: Bundle, name: str) -> None:
    """Write the card into the bundle's folder. It is no file of the manifest: whoever holds a bundle may change it.

    Args:
        name: of the folder, where the bundle will be.
    """
    write_text(bundle.path / CARD, bundle_card(bundle, name, bundle.licence))


def bundle_card(bundle: Bundle, address: str, licence: str) -> str:
    """The card of a bundle as Markdown, from its manifest.

    Args:
        address: where it will be: a folder, or `hf://…`, whose card has the front matter of model hubs.
        licence: the bundle's, or what the owner of weights of their own says.
    """
    manifest, model = bundle.manifest, bundle.model
    size = "x".join(map(str, (model["in_chans"], *model["image_size"])))
    said = licence_words(licence) if licence == bundle.licence else f"{licence}, as its owner says."
    extras = [*(["hub"] if is_address(address) else []), *(["openvino"] if manifest["engine"] == "openvino" else [])]
    package = f"'mae-deploy[{','.join(extras)}]'" if extras else "mae-deploy"
    front: list[str] = []
    if is_address(address):
        front = front_matter(licence, library="mae-deploy", kind=manifest["kind"], tags=("onnx", manifest["precision"]))
    lines = [
        *front,
        f"# {model['name']}",
        "",
        (
            f"A {_KINDS[manifest['kind']]} as a bundle of mae-deploy: {size} images, {manifest['token_mode']} tokens,"
            f" {manifest['precision']}, made for {manifest['engine']}. {MARK if is_address(address) else _EXPORTED}"
        ),
        "",
        "```sh",
        f"pip install {package}",
        f"mae-deploy verify {address}",
        run_command(bundle, address),
        "```",
        "",
        "```python",
        "from PIL import Image",
        "",
        "from mae_deploy.runtime import Backbone",
        "",
        f'backbone = Backbone.load("{address}")',
        'image = Image.open("photo.jpg")',
        f"outputs = {_call(bundle)}  # {', '.join(bundle.output_names)}",
        "```",
        "",
        "## Inputs and outputs",
        "",
        _tensors(bundle).to_markdown(),
        "",
        "## Licence",
        "",
        said,
        "",
        "## Checked",
        "",
        "Against PyTorch, at export; `mae-deploy verify` checks it again where it runs.",
        "",
        *_parity(bundle),
        *_certificate(bundle),
        "## Provenance",
        "",
        "```json",
        json.dumps(manifest["provenance"], indent=2, default=str),
        "```",
        "",
    ]
    return "\n".join(lines)


def _call(bundle: Bundle) -> str:
    if bundle.token_mode == "cached":
        return "backbone.stream()(image)"
    return "backbone([image])" if bundle.fixed_keep is None else f"backbone([image], keep=range({bundle.fixed_keep}))"


def _tensors(bundle: Bundle) -> Table:
    graph = bundle.manifest["graph"]
    rows = [
        {
            "what": what,
            "name": entry["name"],
            "dtype": entry["dtype"],
            "shape": f"({', '.join(map(str, entry['shape']))})",
        }
        for what, entries in (("input", graph["inputs"]), ("output", graph["outputs"]))
        for entry in entries
    ]
    return Table(
        "", (Column("", "what"), Column("name", "name"), Column("type", "dtype"), Column("shape", "shape")), rows
    )


def _parity(bundle: Bundle) -> list[str]:
    """A table for each engine and precision that was checked."""
    lines: list[str] = []
    for name, record in bundle.manifest["parity"].items():
        if isinstance(record, dict) and (rows := record.get("outputs")):
            lines += [f"{name}:", "", Table("", (Column("output", "name"), *PARITY), rows).to_markdown(), ""]
    return lines


def _certificate(bundle: Bundle) -> list[str]:
    if (record := bundle.manifest.get("certificate")) is None:
        return []
    facts, rules = certificate_tables(record)
    confidence = f"Measured at export, with intervals of {record['confidence']:.0%} confidence."
    return ["## Certificate", "", confidence, "", facts.to_markdown(), "", rules.to_markdown(), ""]
