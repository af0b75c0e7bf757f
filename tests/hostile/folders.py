"""Model folders of Hugging Face and timm that mean harm, or are odd: their JSON files, their index of shards."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.hostile.pictures import HARMLESS

Write = Callable[[Path], Path]
"""Writes a model folder below a folder; returns it."""

_HF: dict[str, Any] = {
    "architectures": ["ViTModel"],
    "model_type": "vit",
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 48,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "image_size": 10,
    "patch_size": 5,
    "num_channels": 3,
    "qkv_bias": True,
}
_PROCESSOR: dict[str, Any] = {
    "image_processor_type": "ViTImageProcessor",
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 2,
    "rescale_factor": 1 / 255,
    "size": {"height": 10, "width": 10},
}
_TIMM: dict[str, Any] = {
    "architecture": "vit_tiny_patch16_224",
    "num_classes": 0,
    "num_features": 12,
    "global_pool": "token",
    "model_args": {"img_size": [10, 10], "patch_size": 5, "embed_dim": 12, "depth": 2, "num_heads": 3},
    "pretrained_cfg": {
        "input_size": [3, 10, 10],
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "crop_mode": "center",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "license": "mit",
    },
}
_CONFIG, _PREPROCESSOR, _WEIGHTS = "config.json", "preprocessor_config.json", "model.safetensors"


def _tensors(hugging_face: bool) -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(0)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=chance) / 10

    def linear(name: str, out: int, width: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": made(out, width), f"{name}.bias": made(out)}

    def norm(name: str) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": torch.ones(12), f"{name}.bias": torch.zeros(12)}

    names = ("embeddings.cls_token", "embeddings.position_embeddings", "embeddings.patch_embeddings.projection")
    if not hugging_face:
        names = ("cls_token", "pos_embed", "patch_embed.proj")
    found = {names[0]: made(1, 1, 12), names[1]: made(1, 5, 12)}
    found |= {f"{names[2]}.weight": made(12, 3, 5, 5), f"{names[2]}.bias": made(12)}
    for block in range(2):
        if hugging_face:
            layer = f"encoder.layer.{block}"
            for part in ("query", "key", "value"):
                found |= linear(f"{layer}.attention.attention.{part}", 12, 12)
            found |= linear(f"{layer}.attention.output.dense", 12, 12)
            found |= linear(f"{layer}.intermediate.dense", 48, 12) | linear(f"{layer}.output.dense", 12, 48)
            found |= norm(f"{layer}.layernorm_before") | norm(f"{layer}.layernorm_after")
        else:
            layer = f"blocks.{block}"
            found |= linear(f"{layer}.attn.qkv", 36, 12) | linear(f"{layer}.attn.proj", 12, 12)
            found |= linear(f"{layer}.mlp.fc1", 48, 12) | linear(f"{layer}.mlp.fc2", 12, 48)
            found |= norm(f"{layer}.norm1") | norm(f"{layer}.norm2")
    return found | norm("layernorm" if hugging_face else "norm")


def changed(
    family: str, change: Callable[[dict[str, Any], dict[str, Any]], object] = lambda config, processor: None
) -> Write:
    """A whole one with a change of the two JSON files."""

    def write(folder: Path) -> Path:
        made = folder / "model"
        made.mkdir()
        config, processor = (json.loads(json.dumps(value)) for value in (_HF if family == "hf" else _TIMM, _PROCESSOR))
        change(config, processor)
        (made / _CONFIG).write_text(json.dumps(config))
        if family == "hf":
            (made / _PREPROCESSOR).write_text(json.dumps(processor))
        save_file(_tensors(family == "hf"), made / _WEIGHTS)
        return made

    return write


def _file(family: str, name: str, content: bytes | Callable[[bytes], bytes]) -> Write:
    """With another content of one file."""

    def write(folder: Path) -> Path:
        made = changed(family)(folder)
        old = (made / name).read_bytes() if (made / name).is_file() else b""
        (made / name).write_bytes(content if isinstance(content, bytes) else content(old))
        return made

    return write


def _special(family: str, name: str, make: Callable[[Path], object]) -> Write:
    def write(folder: Path) -> Path:
        made = changed(family)(folder)
        (made / name).unlink()
        make(made / name)
        return made

    return write


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


def _sharded(index: Any) -> Write:
    """The weights in two shards, and their index."""

    def write(folder: Path) -> Path:
        made = changed("hf")(folder)
        tensors = _tensors(hugging_face=True)
        names = sorted(tensors)
        places, file = dict[str, str](), ""
        for shard, part in enumerate((names[::2], names[1::2]), 1):
            file = f"model-0000{shard}-of-00002.safetensors"
            save_file({name: tensors[name] for name in part}, made / file)
            places |= dict.fromkeys(part, file)
        (made / _WEIGHTS).unlink()
        (folder / "outside.safetensors").write_bytes((made / file).read_bytes())
        content = index(places) if callable(index) else index
        (made / f"{_WEIGHTS}.index.json").write_bytes(
            content if isinstance(content, bytes) else json.dumps(content).encode()
        )
        return made

    return write


def setting(part: int, place: str, value: Any) -> Callable[..., object]:
    def change(*files: dict[str, Any]) -> None:
        target = files[part]
        *path, last = place.split(".")
        for name in path:
            target = target[name]
        target[last] = value

    return change


_DEEP = b"[" * 100_000 + b"]" * 100_000
_BAD: tuple[Any, ...] = (None, "x", -1, 0, 10**9, 1.5, [], {}, float("nan"), True, "1" * 10_000)
_JSON: dict[str, bytes | Callable[[bytes], bytes]] = {
    "no JSON": b"{",
    "empty": b"",
    "a list": b"[]",
    "deep": _DEEP,
    "with a deep value": lambda old: old[:-1] + b', "x": ' + _DEEP + b"}",
    "with a key twice": lambda old: old[:-1] + b', "image_size": 20, "image_size": 10}',
    "with something behind it": lambda old: old + b"x",
    "with a number of 10,000 digits": lambda old: old[:-1] + b', "x": ' + b"9" * 10_000 + b"}",
    "bytes": bytes(range(256)),
    "UTF-16 without its mark": lambda old: old.decode().encode("utf-16-le"),
    "a web page": b"<!DOCTYPE html><html></html>",
}
_ODD_JSON: dict[str, Callable[[bytes], bytes]] = {
    "with a byte-order mark": lambda old: b"\xef\xbb\xbf" + old,
    "in UTF-16": lambda old: old.decode().encode("utf-16"),
    "with line ends of Windows": lambda old: json.dumps(json.loads(old), indent=2).replace("\n", "\r\n").encode(),
    "with an unknown key": lambda old: old[:-1] + b', "unknown": {"a": [1, NaN, Infinity, null]}}',
    "with half a character": lambda old: old[:-1] + b', "_name_or_path": "\\ud800"}',
    "with a key that speaks to the terminal": lambda old: old[:-1] + b', "\\u001b[2J": "\\u001b[2J"}',
}

FOLDERS: dict[str, Write] = {
    f"{HARMLESS}Hugging Face's": changed("hf"),
    f"{HARMLESS}timm's": changed("timm"),
    f"{HARMLESS}Hugging Face's in shards": _sharded(lambda places: {"metadata": {}, "weight_map": places}),
    **{
        f"{HARMLESS}{family} {name} {words}": _file(family, name, content)
        for family, name in (("hf", _CONFIG), ("hf", _PREPROCESSOR), ("timm", _CONFIG))
        for words, content in _ODD_JSON.items()
    },
    **{
        f"{family} {name} {words}": _file(family, name, content)
        for family, name in (("hf", _CONFIG), ("hf", _PREPROCESSOR), ("timm", _CONFIG))
        for words, content in _JSON.items()
    },
    **{
        f"{family} {name} that is {words}": _special(family, name, make)
        for family, name in (("hf", _CONFIG), ("hf", _PREPROCESSOR), ("timm", _CONFIG))
        for words, make in (
            ("a pipe", os.mkfifo),
            ("a folder", Path.mkdir),
            ("a device", lambda path: path.symlink_to("/dev/zero")),
            ("a link to itself", lambda path: path.symlink_to(path.name)),
            ("1 TB", _sparse),
        )
    },
    **{
        f"hf {place} {value!r:.20}": changed("hf", setting(0, place, value))
        for place in (
            *("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps"),
            *("image_size", "patch_size", "qkv_bias", "use_gated_mlp", "mlp_bias", "id2label", "architectures"),
        )
        for value in _BAD
    },
    **{
        f"hf {value}": changed("hf", setting(0, "model_type", value))
        for value in (
            "vit_mae",
            "dinov2",
            "dinov3_vit",
            "siglip",
            "siglip_vision_model",
            "dinov2_with_registers",
            "clip",
        )
    },
    **{
        f"hf processor {place} {value!r:.20}": changed("hf", setting(1, place, value))
        for place in (
            *("image_processor_type", "do_normalize", "do_rescale", "do_resize", "image_mean", "image_std", "resample"),
            *("rescale_factor", "size", "size.height", "crop_size", "do_center_crop", "crop_pct"),
        )
        for value in (*_BAD, [0.5, 0.5], [float("nan")] * 3, ["a"] * 3, {"shortest_edge": -5}, {"shortest_edge": "x"})
    },
    **{
        f"timm {place} {value!r:.20}": changed("timm", setting(0, place, value))
        for place in (
            *("architecture", "model_args", "pretrained_cfg", "model_args.img_size", "model_args.patch_size"),
            *("model_args.embed_dim", "model_args.depth", "model_args.num_heads", "model_args.unknown", "label_names"),
            *("pretrained_cfg.input_size", "pretrained_cfg.mean", "pretrained_cfg.std", "pretrained_cfg.crop_pct"),
            *("pretrained_cfg.interpolation", "pretrained_cfg.crop_mode", "pretrained_cfg.license"),
            *("model_args.norm_layer", "model_args.act_layer", "model_args.mlp_layer", "model_args.block_fn"),
        )
        for value in _BAD
    },
    "timm of a model from elsewhere": changed("timm", setting(0, "architecture", "hf-hub:hostile/model")),
    "timm of a local folder": changed("timm", setting(0, "architecture", "local-dir:/etc")),
    "timm whose layers are a function": changed("timm", setting(0, "model_args.norm_layer", "os.system")),
    "timm that loads from elsewhere": changed("timm", setting(0, "pretrained_cfg.url", "file:///etc/passwd")),
    "timm that loads by itself": changed(
        "timm", lambda config, _: config["pretrained_cfg"].update(custom_load=True, file="/etc/passwd")
    ),
    "timm of weights that are fetched": changed("timm", setting(0, "model_args.pretrained", True)),
    **{
        f"index {words}": _sharded(index)
        for words, index in (
            *((words, content) for words, content in _JSON.items() if not callable(content)),
            ("without a map", {"metadata": {}}),
            ("of a map that is a list", {"weight_map": []}),
            ("of shards that are numbers", lambda places: {"weight_map": dict.fromkeys(places, 5)}),
            ("of shards above", lambda places: {"weight_map": dict.fromkeys(places, "../outside.safetensors")}),
            ("of one shard of two", lambda places: {"weight_map": {name: min(places.values()) for name in places}}),
            ("of a shard that is not there", lambda places: {"weight_map": {**places, "x": "absent.safetensors"}}),
            ("of itself", lambda places: {"weight_map": dict.fromkeys(places, f"{_WEIGHTS}.index.json")}),
            ("of a shard that is a folder", lambda places: {"weight_map": dict.fromkeys(places, ".")}),
            (
                "of 10^5 tensors more",
                lambda p: {"weight_map": {**p, **{f"x{i}": min(p.values()) for i in range(10**5)}}},
            ),
        )
    },
}
