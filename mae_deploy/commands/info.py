"""`mae-deploy info`: what a run, checkpoint, weights file or bundle is; torch is needed for foreign weights only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mae_deploy.checkpoint import find_checkpoint, open_checkpoint
from mae_deploy.commands.config import InfoConfig
from mae_deploy.config import from_dict, to_dict
from mae_deploy.errors import ConfigError, import_optional
from mae_deploy.files import read_json
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.reporting.bundles import engine_summary
from mae_deploy.reporting.preprocess import preprocess_facts, report_facts
from mae_deploy.reporting.tables import facts_table
from mae_deploy.results import Result
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.cache import CacheShape, TokenCache
from mae_deploy.runtime.manifest import MANIFEST_FILE
from mae_deploy.text import as_size

_IMAGES = {
    "float32": "float32, normalised before the graph",
    "float16": "float16, normalised before the graph",
    "uint8": "uint8, normalised in the graph",
}


def run_info(config: InfoConfig) -> Result:
    """Describe a path.

    Raises:
        ConfigError: nothing that we know is there.
        CheckFailed: a file of it is missing, cut off or of another size; hashes are for `verify`.
    """
    path = config.path
    if (path / MANIFEST_FILE).is_file():
        return _bundle(path)
    if find_checkpoint(path) is not None:
        return _checkpoint(path)
    if path.is_file() or (path / "config.json").is_file():
        convert = import_optional("mae_deploy.weights.read.convert", extra="train")
        imported = convert.import_weights(path, convert.ImportOptions())
        report = {"type": "weights", **imported.report}
        return Result(report, facts_table(str(path), report_facts(report)))
    if (path / "config.yaml").is_file():
        raise ConfigError(
            f"{path} is a run without a checkpoint yet", hint="resume it with the same command and --resume"
        )
    raise ConfigError(f"{path} is not a run, checkpoint, weights file or bundle")


def _checkpoint(path: Path) -> Result:
    checkpoint = open_checkpoint(path)
    metadata = checkpoint.metadata
    checkpoint.check()
    data = {
        "type": "run" if (path / "checkpoints").is_dir() else "checkpoint",
        "path": str(checkpoint.path),
        **to_dict(metadata),
    }
    facts = {
        "type": data["type"],
        "checkpoint": checkpoint.path,
        "kind": metadata.kind,
        "model": _model(metadata.encoder),
        "decoder": metadata.decoder or "-",
        "classes": metadata.num_classes or "-",
        **preprocess_facts(from_dict(Preprocess, metadata.preprocess), metadata.provenance),
        "steps": metadata.step,
        "metrics": metadata.metrics or "-",
        "licence": metadata.licence,
        "provenance": _lineage(metadata.provenance),
    }
    if (path / "environment.json").is_file():
        data["environment"] = read_json(path / "environment.json")
    return Result(data, facts_table(str(path), facts))


def _bundle(path: Path) -> Result:
    bundle = Bundle.load(path)
    manifest: dict[str, Any] = dict(bundle.manifest)
    for name, entry in manifest["files"].items():
        if not (path / name).is_file() or (path / name).stat().st_size != entry["size"]:
            bundle.file(name)  # says what is wrong with it
    facts = {
        "type": "bundle",
        "kind": manifest["kind"],
        "model": _model(manifest["model"]),
        "tokens": manifest["token_mode"] + (f", K = {manifest['keep']}" if manifest["keep"] else ""),
        "batch": manifest["batch"] or "dynamic",
        "checked for": ", ".join(_checked(name, numbers) for name, numbers in manifest["profile"].items()),
        "made for": manifest["engine"],
        "checked on": (
            ", ".join(dict.fromkeys(record["engine"] for record in manifest["parity"].values() if "engine" in record))
            or "-"
        ),
        "precision": (
            f"{manifest['precision']},"
            f" {'in the types of the graph' if manifest['typing'] == 'strong' else 'chosen by the engine'}"
        ),
        "quantization": _scalars(manifest["quantization"] or {}),
        "images": _IMAGES[bundle.image_dtype],
        **preprocess_facts(bundle.preprocess, manifest["provenance"]),
        "outputs": ", ".join(bundle.output_names),
        **({"cache": _cache(bundle)} if bundle.token_mode == "cached" else {}),
        "classes": len(bundle.class_names) if bundle.class_names else "-",
        "engines": "\n".join(map(engine_summary, manifest["engines"])) or "-",
        "licence": manifest["licence"],
        "provenance": _lineage(manifest["provenance"].get("checkpoint", {})),
        "size": as_size(sum(entry["size"] for entry in manifest["files"].values())),
    }
    return Result({"type": "bundle", "path": str(path), **manifest}, facts_table(str(path), facts))


def _cache(bundle: Bundle) -> str:
    cache = TokenCache.empty(CacheShape.of(bundle.manifest), 1)
    return f"keys and values in {cache.shape.dtype}, {as_size(cache.nbytes)} a stream with its tokens"


def _checked(size: str, numbers: list[int]) -> str:
    """A range of the profile: `B = 8`, or `K = 1 to 196, usually 49`."""
    least, usual, most = numbers
    return f"{size} = {least}" if least == most else f"{size} = {least} to {most}, usually {usual}"


def _scalars(record: dict[str, Any]) -> str:
    """What a record says in single values; its lists and tables are in `--json`."""
    return ", ".join(f"{name} {value}" for name, value in record.items() if isinstance(value, str | int | float)) or "-"


def _model(model: dict[str, Any]) -> str:
    size = "x".join(map(str, (model["in_chans"], *model["image_size"])))
    return (
        f"{model['name']}, {size}, patch {model['patch_size']}, {model['embed_dim']} wide, {model['depth']} blocks,"
        f" {model['num_heads']} heads{_groups(model)}{_family(model)}"
    )


def _family(model: dict[str, Any]) -> str:
    """Where it differs from the original's ViT."""
    words = {
        f"rotary positions ({model.get('rotary')})": model.get("rotary", "none") != "none",
        f"{model.get('num_registers')} registers": bool(model.get("num_registers")),
        "no class token": not model.get("class_token", True),
        f"{model.get('activation')}": model.get("activation", "gelu") != "gelu",
        "attention pooling": bool(model.get("pool_heads")),
    }
    return "".join(f", {name}" for name, there in words.items() if there)


def _groups(model: dict[str, Any]) -> str:
    groups = model.get("band_groups")
    return "" if groups is None else f", groups of bands {';'.join(','.join(map(str, group)) for group in groups)}"


def _lineage(record: Any) -> str:
    """The stages that led here, the first one last; `-` where a bundle made elsewhere keeps no record of ours."""
    stages = []
    while isinstance(record, dict) and record:
        stages.append(
            str(record.get("stage", "?"))
            + (f" (teacher: {_lineage(record['teacher'])})" if record.get("teacher") else "")
        )
        record = record.get("parent")
    return " < ".join(stages) or "-"
