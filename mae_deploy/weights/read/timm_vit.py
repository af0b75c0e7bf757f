"""timm's ViTs by name: what the name says of a weights file, what folds exactly into our encoder, and what is refused.

timm builds the named model without memory (`torch.device("meta")`) and without weights; nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

import timm
import torch
from timm import models
from timm.data import resolve_data_config
from timm.layers import DropPath, LayerScale, PatchEmbed
from timm.layers import LayerNorm as TimmLayerNorm
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from mae_deploy.checkpoint import NON_COMMERCIAL, timm_positions
from mae_deploy.errors import ConfigError
from mae_deploy.images.preprocess import Preprocess, default_preprocess
from mae_deploy.models.vit import BlockWithQKV, transformer_blocks
from mae_deploy.weights.read.check_names import check_names
from mae_deploy.weights.read.files import GUESSED, Source, tensor_of

SPDX = {"apache-2.0": "Apache-2.0", "mit": "MIT", "cc-by-nc-4.0": NON_COMMERCIAL}
"""timm's names of licences, to SPDX's; others stay as timm writes them."""

_PASSIVE = (nn.Identity, nn.Dropout, DropPath, LayerScale)
"""Parts of a block that do nothing after training, and LayerScale, which folds into the layer before it."""

_WORDS = {
    "": "blocks",
    "norm1": "norm",
    "norm2": "norm",
    "attn": "attention",
    "attn.q_norm": "query and key norms (qk_norm)",
    "attn.k_norm": "query and key norms (qk_norm)",
    "attn.norm": "a norm in the attention (scale_attn_norm)",
    "mlp": "MLP",
    "mlp.act": "activation",
    "mlp.norm": "a norm in the MLP (scale_mlp_norm)",
}
"""What a part of a block is called in messages."""

_CLASSES = {
    "VisionTransformerDistilled": "a distillation token (dist_token)",
    "Eva": "rotary position embeddings or other blocks (Eva)",
    "Beit": "relative positions in its attention (Beit)",
    "VisionTransformerRelPos": "relative positions in its attention (VisionTransformerRelPos)",
}
"""What sets timm's other classes apart from its VisionTransformer."""


def has_timm_config(source: Source) -> bool:
    """Whether config.json is that of a timm model folder, as timm's hub repositories are."""
    return isinstance(source.settings.get("architecture"), str)


def from_timm(source: Source, name: str | None) -> Source:
    """The same weights as tensors of our encoder or classifier.

    Args:
        name: timm's name of the model, with or without a tag; None reads the folder's config.json.

    Raises:
        ConfigError: timm has no such model, or it computes something that our encoder does not.
        CheckFailed: the tensors are not exactly those of the model.
    """
    tensors = _renamed(source)
    source = dataclasses.replace(source, tensors=tensors, layout="timm")
    model = _build(source, name) if name else _build_from_config(source)
    architecture = name or source.settings["architecture"]
    classifier = "head.weight" in tensors
    if features := _foreign_features(model, classifier=classifier):
        raise ConfigError(
            f"{architecture} has {', '.join(features)}, which our encoder does not have",
            hint="docs/import.md lists what folds and what is refused",
        )
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    # The table of positions may be that of another image size.
    expected["pos_embed"] = (1, *tensor_of(source, "pos_embed", 3).shape[1:2], model.embed_dim)
    check_names(tensors, expected, source.file, model=architecture)
    _fold(source, model)
    source.architecture = architecture
    source.image_size, source.num_heads = tuple(model.patch_embed.img_size), model.blocks[0].attn.num_heads
    source.pool = "avg" if model.global_pool == "avg" else "cls"
    source.positions = timm_positions(architecture)
    _take_preprocessing(source, model.pretrained_cfg, name)
    if isinstance(names := source.settings.get("label_names"), list):
        source.class_names = tuple(map(str, names))
    if not name or "." in name:
        source.licence = SPDX.get(model.pretrained_cfg.get("license"), model.pretrained_cfg.get("license"))
    return source


def _renamed(source: Source) -> dict[str, Tensor]:
    """Original DeiT-III files call LayerScale gamma_1 and gamma_2; DINOv2's carry a mask token of their pretraining."""
    if any("embeddings.patch_embeddings" in name for name in source.tensors):
        raise ConfigError(
            f"--model names a timm model, and {source.file} holds Hugging Face's names", hint="leave --model out"
        )
    renamed = {
        name.replace(".gamma_1", ".ls1.gamma").replace(".gamma_2", ".ls2.gamma"): tensor
        for name, tensor in source.tensors.items()
    }
    source.renamed = len(set(renamed) - set(source.tensors))
    source.dropped += [name for name in ("mask_token",) if renamed.pop(name, None) is not None]
    return {name: tensor.float() for name, tensor in renamed.items()}


# --- timm's model ----------------------------------------------------------------------------------------------------


def _build(source: Source, name: str) -> Any:
    architecture, tag = models.split_model_name_tag(name)
    if not models.is_model(architecture):
        near = difflib.get_close_matches(architecture, models.list_models(), n=1)
        raise ConfigError(
            f"timm {timm.__version__} has no model '{name}'",
            hint=f"did you mean '{near[0]}'?" if near else "see timm.list_models('vit*')",
        )
    if tag and name not in (tagged := models.get_arch_pretrained_cfgs(architecture)):
        raise ConfigError(
            f"timm has no tag '{tag}' for {architecture}",
            hint=f"known: {', '.join(key.partition('.')[2] for key in tagged)}",
        )
    # Fine-tuning with average pooling shows in the tensors, whatever the name says.
    pooling = {"global_pool": "avg"} if "fc_norm.weight" in source.tensors else {}
    return _on_meta(source, architecture, {"pretrained_cfg": tag or None, **pooling})


def _build_from_config(source: Source) -> Any:
    """timm's own folders: the architecture, its arguments, and the preprocessing (older files have that at the top)."""
    config = source.settings
    stated, arguments = config.get("pretrained_cfg", config), config.get("model_args", {})
    if not isinstance(stated, dict) or not isinstance(arguments, dict):
        raise ConfigError(f"config.json beside {source.file} is not as timm writes it")
    known = {field.name for field in dataclasses.fields(models.PretrainedCfg)}
    architecture, _ = models.split_model_name_tag(config["architecture"])
    return _on_meta(
        source,
        architecture,
        {**arguments, "pretrained_cfg": {key: value for key, value in stated.items() if key in known}},
    )


def _on_meta(source: Source, architecture: str, arguments: dict[str, Any]) -> Any:
    """The model without memory, with as many channels and classes as the tensors show."""
    patches, head = source.tensors.get("patch_embed.proj.weight"), source.tensors.get("head.weight")
    if patches is not None and patches.ndim == 4:
        arguments["in_chans"] = patches.shape[1]
    arguments["num_classes"] = head.shape[0] if head is not None and head.ndim == 2 else 0
    try:
        with torch.device("meta"):
            return models.model_entrypoint(architecture)(pretrained=False, **arguments)
    except Exception as error:  # timm asserts and raises whatever its arguments lead to
        raise ConfigError(
            f"timm {timm.__version__} cannot build {architecture}: {' '.join(str(error).split())}"
        ) from error


def _foreign_features(model: Any, *, classifier: bool) -> list[str]:
    """What the model computes and our encoder or classifier cannot, in words; nothing that is not listed passes."""
    if type(model) is not VisionTransformer:
        kind = type(model).__name__
        return [_CLASSES.get(kind, f"the class {kind}")]
    if type(model.patch_embed) is not PatchEmbed:
        return [f"a {type(model.patch_embed).__name__} in place of a patch embedding"]
    rows, columns = model.patch_embed.patch_size
    present = {
        "no class token": model.cls_token is None,
        f"register tokens ({model.num_reg_tokens})": model.reg_token is not None,
        "no position embeddings": model.pos_embed is None,
        f"patches of {rows}x{columns} pixels": rows != columns,
        "a norm of the patch embeddings": not isinstance(model.patch_embed.norm, nn.Identity),
        "a norm before the blocks (pre_norm)": not isinstance(model.norm_pre, nn.Identity),
        "attention pooling (attn_pool)": model.attn_pool is not None,
    }
    features = [feature for feature, there in present.items() if there] + _foreign_parts(model)
    return features + ([] if model.attn_pool is not None else _foreign_end(model, classifier=classifier))


def _foreign_parts(model: Any) -> list[str]:
    """Where the blocks differ from ours."""
    with torch.device("meta"):
        ours = _parts(transformer_blocks(dim=4, depth=1, num_heads=1)[0])
    found: dict[str, None] = {}
    for block in model.blocks:
        foreign = {part: kind for part, kind in _parts(block).items() if ours.get(part) != kind}
        # Of a foreign part, its own parts need no mention.
        outermost = [
            part
            for part in foreign
            if not any(part != other and (not other or part.startswith(f"{other}.")) for other in foreign)
        ]
        found |= dict.fromkeys(f"{_WORDS.get(part, part)} of kind {foreign[part]}" for part in outermost)
    return list(found)


def _parts(block: nn.Module) -> dict[str, str]:
    """The kind of every part that computes something."""
    return {name: _kind(module) for name, module in block.named_modules() if not isinstance(module, _PASSIVE)}


def _kind(module: nn.Module) -> str:
    name = Block.__name__ if isinstance(module, BlockWithQKV) else type(module).__name__
    if type(module) in (nn.LayerNorm, TimmLayerNorm):
        return f"LayerNorm with eps {module.eps:g}"
    if getattr(module, "approximate", "none") != "none":
        return f"{name} ({module.approximate})"
    return f"{name} (gated, as SwiGLU)" if "glu" in name.lower() else name


def _foreign_end(model: Any, *, classifier: bool) -> list[str]:
    """Where the last norm, the pooling and the head differ from ours."""
    norms = [norm for norm in (model.norm, model.fc_norm) if not isinstance(norm, nn.Identity)]
    if not norms:
        return ["no norm after the blocks (final_norm)"]
    if (kind := _kind(norms[0])) != "LayerNorm with eps 1e-06":
        return [f"a last norm of kind {kind}"]
    if not classifier:
        return ["a norm after pooling (fc_norm) but no head"] if isinstance(model.norm, nn.Identity) else []
    if model.global_pool not in ("token", "avg"):
        return [f"'{model.global_pool}' pooling"]
    if model.global_pool == "avg" and isinstance(model.fc_norm, nn.Identity):
        return ["average pooling after the norm (no fc_norm)"]
    return ["pooling that includes the class token"] if model.global_pool == "avg" and model.pool_include_prefix else []


# --- tensors ---------------------------------------------------------------------------------------------------------


def _fold(source: Source, model: Any) -> None:
    """Bring what our encoder computes without into the tensors that it has; the outputs stay the same but for
    rounding.
    """
    tensors = source.tensors
    if absent := _add_zero_biases(tensors, len(model.blocks)):
        source.folded.append(f"{absent} absent biases: zeros")
    if scales := _fold_layer_scale(tensors, len(model.blocks)):
        source.folded.append(f"{scales} LayerScales: into attn.proj and mlp.fc2")
    if model.no_embed_class:
        tensors["pos_embed"] = torch.cat([torch.zeros_like(tensors["pos_embed"][:, :1]), tensors["pos_embed"]], dim=1)
        source.folded.append("position embeddings without an entry for the class token: a zero")
    if model.global_pool == "token" and "fc_norm.weight" in tensors:
        # A norm of each token by itself: the same before and after one of them is taken.
        tensors |= {f"norm.{part}": tensors.pop(f"fc_norm.{part}") for part in ("weight", "bias")}
        source.folded.append("fc_norm of the class token: norm")


def _add_zero_biases(tensors: dict[str, Tensor], depth: int) -> int:
    layers = [
        "patch_embed.proj",
        *(
            f"blocks.{index}.{layer}"
            for index in range(depth)
            for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        ),
    ]
    absent = [layer for layer in layers if f"{layer}.bias" not in tensors]
    tensors |= {f"{layer}.bias": torch.zeros(tensors[f"{layer}.weight"].shape[0]) for layer in absent}
    return len(absent)


def _fold_layer_scale(tensors: dict[str, Tensor], depth: int) -> int:
    """`gamma * (W x + b) = (gamma W) x + gamma b`."""
    scaled = 0
    for index in range(depth):
        for scale, layer in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
            gamma = tensors.pop(f"blocks.{index}.{scale}.gamma", None)
            if gamma is not None:
                weight, bias = f"blocks.{index}.{layer}.weight", f"blocks.{index}.{layer}.bias"
                tensors |= {weight: gamma[:, None] * tensors[weight], bias: gamma * tensors[bias]}
                scaled += 1
    return scaled


def timm_evaluation(pretrained_cfg: dict[str, Any], image_size: tuple[int, int], channels: int) -> Preprocess:
    """timm's evaluation transform in our terms; mean and deviation of RGB are not those of other channels."""
    config = resolve_data_config(pretrained_cfg=pretrained_cfg)
    statistics: dict[str, Any] = {
        name: tuple(config[name]) for name in ("mean", "std") if len(config["mean"]) == channels
    }
    plain = default_preprocess(image_size, channels)
    settings = {name: config[name] for name in ("crop_mode", "crop_pct", "interpolation")}
    return dataclasses.replace(plain, **settings, **statistics)


def _take_preprocessing(source: Source, pretrained_cfg: dict[str, Any], name: str | None) -> None:
    channels = tensor_of(source, "patch_embed.proj.weight", 4).shape[1]
    source.preprocess = timm_evaluation(pretrained_cfg, source.image_size or (224, 224), channels)
    tag = pretrained_cfg.get("tag")
    first = f", which names no tag: that of timm's first, {tag}" if name and "." not in name and tag else ""
    source.preprocess_from = f"timm's {name}{first}" if name else "config.json"
    if len(source.preprocess.mean) != len(resolve_data_config(pretrained_cfg=pretrained_cfg)["mean"]):
        source.preprocess_from += f"; mean and std of {channels} channels are {GUESSED}"
