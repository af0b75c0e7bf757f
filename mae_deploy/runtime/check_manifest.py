"""Whether a manifest can be read, and does not contradict itself."""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping
from typing import Any

from mae_deploy import __version__
from mae_deploy.errors import ConfigError
from mae_deploy.packages import upgrade
from mae_deploy.runtime.json_types import check
from mae_deploy.runtime.manifest import (
    CACHE_MASK,
    CLASS_OUTPUTS,
    IDS_KEEP,
    IMAGES,
    NEW_ROWS,
    NUM_KEEP,
    OLD_TOKENS,
    PATCHES,
    PLANNED,
    QUANTIZED,
    REST,
    SCHEMA_VERSION,
    TOKEN_INPUTS,
    Dim,
    Manifest,
    TensorEntry,
    ToleranceEntry,
    cache_names,
    follows_keep,
    num_prefix,
    read_preprocess,
)
from mae_deploy.runtime.tolerance import Tolerance

_BLOCK_OUTPUT = re.compile(r"block_(0|[1-9]\d*)")


def validate_manifest(value: Any) -> Manifest:
    """Return `value` if it is a manifest that this version can read and that does not contradict itself.

    Raises:
        ConfigError: another schema version, a missing key, a wrong type, or two entries that disagree.
    """
    if not isinstance(value, dict):
        raise ConfigError(f"manifest: must be a mapping, not {type(value).__name__}")
    version = value.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:  # True == 1, so isinstance does not do
        newer = type(version) is int and version > SCHEMA_VERSION
        raise ConfigError(
            f"manifest: schema version {version!r}; mae-deploy {__version__} reads version {SCHEMA_VERSION}",
            hint=upgrade(value.get("mae_deploy_version")) if newer else "export the bundle again",
        )
    check(value, Manifest, "")
    manifest = typing.cast(Manifest, value)
    for problem in (
        _reason_against_model,
        _reason_against_sizes,
        _reason_against_graph,
        _reason_against_outputs,
        _reason_against_files,
        _reason_against_engines,
        _reason_against_tolerance,
    ):
        if message := problem(manifest):
            raise ConfigError(f"manifest: {message}", hint="export the bundle again")
    return manifest


def _reason_against_model(manifest: Manifest) -> str | None:
    model, preprocess = manifest["model"], read_preprocess(manifest["preprocess"])
    size, patch = model["image_size"], model["patch_size"]
    if len(size) != 2 or patch < 1 or min(size) < patch or any(side % patch for side in size):
        return f"image size {size} is not a height and a width in multiples of the patch size {patch}"
    groups = model.get("band_groups")
    num_patches = (size[0] // patch) * (size[1] // patch) * (1 if groups is None else len(groups))
    if groups is not None and sorted(band for group in groups for band in group) != list(range(model["in_chans"])):
        return f"the groups of bands {groups} do not have each of {model['in_chans']} channels once"
    if manifest["num_patches"] != num_patches:
        of_groups = "" if groups is None else f" in {len(groups)} groups of bands"
        return (
            f"num_patches is {manifest['num_patches']}, but image size {size} has {num_patches} patches of"
            f" {patch}{of_groups}"
        )
    if list(preprocess.image_size) != size or preprocess.channels != model["in_chans"]:
        return (
            f"preprocess makes {preprocess.channels} x {preprocess.image_size}, the model takes {model['in_chans']} x"
            f" {size}"
        )
    if (manifest["precision"] in QUANTIZED) != (manifest["quantization"] is not None):
        return (
            f"precision {manifest['precision']} {'without' if manifest['quantization'] is None else 'with'} a record of"
            " quantization"
        )
    return None


def _reason_against_sizes(manifest: Manifest) -> str | None:
    mode, num_patches, profile = manifest["token_mode"], manifest["num_patches"], manifest["profile"]
    fixed = {"B": manifest["batch"], "K": manifest["keep"]}
    if fixed["B"] is not None and fixed["B"] < 1:
        return f"batch {fixed['B']} is less than 1"
    if fixed["K"] is not None and (mode == "full" or not 1 <= fixed["K"] <= num_patches):
        return f"keep {fixed['K']} does not fit token mode '{mode}' with {num_patches} patches"
    sizes = {"B"} if mode == "full" else {"B", "K"}
    if set(profile) != sizes:
        return (
            f"the profile of token mode '{mode}' is of {', '.join(sorted(sizes))}, not of"
            f" {', '.join(profile) or 'nothing'}"
        )
    for name, numbers in profile.items():
        if len(numbers) != 3 or not 1 <= numbers[0] <= numbers[1] <= numbers[2]:
            return f"the profile {numbers} of {name} is not a smallest, usual and largest size"
        if fixed[name] is not None and set(numbers) != {fixed[name]}:
            return f"the profile {numbers} of {name} does not fit its fixed size {fixed[name]}"
    if "K" in profile and profile["K"][2] > num_patches:
        return f"the profile {profile['K']} of K has more than {num_patches} patches"
    return None


def _reason_against_graph(manifest: Manifest) -> str | None:
    model, mode, graph = manifest["model"], manifest["token_mode"], manifest["graph"]
    inputs = {entry["name"]: entry for entry in graph["inputs"]}
    C, (H, W), P = model["in_chans"], model["image_size"], model["patch_size"]
    B: Dim = manifest["batch"] or "B"
    K: Dim = manifest["keep"] or "K"
    layouts: dict[str, list[Dim]] = {"float32": [B, C, H, W], "float16": [B, C, H, W], "uint8": [B, H, W, C]}
    wanted: dict[str, tuple[str, list[Dim]]] = {IDS_KEEP: ("int64", [B, K]), NUM_KEEP: ("int64", [B])}
    names: tuple[str, ...] = (IMAGES, *TOKEN_INPUTS[mode])
    if mode == "cached":
        layouts = {dtype: [B, K, P * P * C] for dtype in layouts}
        wanted |= _cache_inputs(manifest, inputs)
        pools = {REST, OLD_TOKENS}
        names = (PATCHES, *wanted.keys() - {NUM_KEEP, *pools}, *(pools & inputs.keys()))
    if len(graph["inputs"]) != len(names) or set(inputs) != set(names):
        return (
            f"a graph of token mode '{mode}' has the inputs {', '.join(names)}, not"
            f" {', '.join(entry['name'] for entry in graph['inputs'])}"
        )
    for name, entry in inputs.items():
        dtype, shape = wanted.get(name) or (entry["dtype"], layouts.get(entry["dtype"], []))
        if entry["dtype"] != dtype or not _fits(entry["shape"], shape):
            return (
                f"the input {name} is {entry['dtype']} {entry['shape']}, not {dtype} {shape}"
                if shape
                else f"the input {name} cannot be {entry['dtype']}"
            )
    blocks = graph["blocks"]
    if blocks and (len(blocks) != model["depth"] or len(set(blocks)) != len(blocks)):
        return f"graph.blocks has {len(set(blocks))} names for {model['depth']} blocks"
    return None


def _cache_inputs(manifest: Manifest, inputs: Mapping[str, TensorEntry]) -> dict[str, tuple[str, list[Dim]]]:
    """Type and shape of what a cached graph takes of the cache; keys and values have one type."""
    model, B = manifest["model"], manifest["batch"] or "B"
    D, H = model["embed_dim"], model["num_heads"]
    names = cache_names(model["depth"])
    # TensorRT's profiles are of B and K alone: a graph for it takes all rows, whatever K is.
    opened = manifest["keep"] is None and manifest["engine"] not in PLANNED
    R: Dim = "R" if opened else num_prefix(model) + manifest["num_patches"]
    half = names[0] in inputs and inputs[names[0]]["dtype"] == "float16"
    rows: tuple[str, list[Dim]] = ("float16" if half else "float32", [B, H, R, D // H])
    pools: dict[str, tuple[str, list[Dim]]] = {REST: ("float32", [B, D]), OLD_TOKENS: ("float32", [B, R, D])}
    return {CACHE_MASK: ("float32", [B, R]), **pools, **dict.fromkeys(names, rows)}


def _reason_against_outputs(manifest: Manifest) -> str | None:
    entries, model = manifest["graph"]["outputs"], manifest["model"]
    inputs = [entry["name"] for entry in manifest["graph"]["inputs"]]
    names = [entry["name"] for entry in entries]
    if manifest["token_mode"] == "cached" and NEW_ROWS not in names:
        return f"a graph of token mode 'cached' has no output {NEW_ROWS}"
    if not names or len({*names, *inputs}) != len(names) + len(inputs):
        return f"the outputs {names} must be at least one name, each once and none of an input"
    for entry in entries:
        block = _BLOCK_OUTPUT.fullmatch(entry["name"])
        if block is not None and int(block[1]) >= model["depth"]:
            return f"there is no {entry['name']} in {model['depth']} blocks"
        shape = _output_shape(manifest, entry["name"])
        if shape is not None and not _fits(entry["shape"], shape):
            return f"the output {entry['name']} has the shape {entry['shape']}, not {shape}"
        if entry["dtype"] not in ("float32", "float16"):
            return f"the output {entry['name']} is {entry['dtype']}, not float32 or float16"
    return None


def _output_shape(manifest: Manifest, name: str) -> list[Dim] | None:
    """The shape of an output whose name this version knows; a word stands for a size that is not."""
    model = manifest["model"]
    B: Dim = manifest["batch"] or "B"
    K: Dim = manifest["num_patches"] if manifest["token_mode"] == "full" else manifest["keep"] or "K"
    P, C, D = model["patch_size"], model["in_chans"], model["embed_dim"]
    if follows_keep(name):
        return [B, K, D]
    if name == NEW_ROWS:
        L, H = model["depth"], model["num_heads"]
        return [B, 2 * L * H, "T" if manifest["keep"] is None else num_prefix(model) + manifest["keep"], D // H]
    classes = manifest["class_names"]
    grid = [side // P for side in model["image_size"]]
    shapes: dict[str, list[Dim]] = {
        "cls": [B, D],
        "pooled": [B, D],
        **{output: [B, "classes" if classes is None else len(classes)] for output in CLASS_OUTPUTS},
        "feature_map": [B, D, *grid],
        "pixels": [B, manifest["num_patches"], P * P * C],
        **{level: [B, "channels", "height", "width"] for level in ("p2", "p3", "p4", "p5")},
    }
    return shapes.get(name)


def _fits(found: list[Dim], wanted: list[Dim]) -> bool:
    """Whether a shape is the wanted one: a dynamic B, K, R or T has a name, every other size is a number."""
    if len(found) != len(wanted):
        return False
    return all(
        (
            isinstance(size, str)
            if name in ("B", "K", "R", "T")
            else isinstance(size, int) and size >= 1 and (isinstance(name, str) or size == name)
        )
        for size, name in zip(found, wanted, strict=True)
    )


def _reason_against_files(manifest: Manifest) -> str | None:
    for key, name in (("graph", manifest["graph"]["file"]), ("golden", manifest["golden"]["file"])):
        if name not in manifest["files"]:
            return f"{key}.file '{name}' is not listed in files"
    for name, entry in manifest["files"].items():
        if not re.fullmatch("[0-9a-f]{64}", entry["sha256"]):
            return f"files['{name}'].sha256 {entry['sha256']!r} is not a SHA-256 in lower-case hexadecimals"
    if manifest["golden"]["num_samples"] < 1:
        return f"golden.num_samples {manifest['golden']['num_samples']} is less than 1"
    return None


def _reason_against_engines(manifest: Manifest) -> str | None:
    for index, entry in enumerate(manifest["engines"]):
        where = f"engines[{index}]"
        for name in (entry["file"], entry["layers"]):
            if name is not None and name not in manifest["files"]:
                return f"{where}: '{name}' is not listed in files"
        if not re.fullmatch(r"\d+(\.\w+)+", entry["tensorrt"]):
            return f"{where}: '{entry['tensorrt']}' is not a version of TensorRT"
        if len(entry["compute_capability"]) != 2:
            return f"{where}: the compute capability {entry['compute_capability']} is not a major and a minor number"
        if not entry["profiles"]:
            return f"{where} has no profile"
        for profile in entry["profiles"]:
            if set(profile) != set(manifest["profile"]) or any(
                len(sizes) != 3 or not 1 <= sizes[0] <= sizes[1] <= sizes[2] for sizes in profile.values()
            ):
                return (
                    f"{where}: the profile {profile} does not give a smallest, usual and largest"
                    f" {' and '.join(manifest['profile'])}"
                )
    return None


def _reason_against_tolerance(manifest: Manifest) -> str | None:
    unknown = [name for name in manifest["tolerance"] if name not in ToleranceEntry.__annotations__]
    if unknown:  # what cannot be checked must not pass
        return f"unknown tolerance '{unknown[0]}'"
    Tolerance(**manifest["tolerance"])
    return None
