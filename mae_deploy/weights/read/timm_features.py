"""What one of timm's ViTs computes: the settings of our encoder that do the same, and what there is none for, in words.

Nothing that is not known passes: a part of another kind than ours is named.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers import (
    AttentionPoolLatent,
    AttentionRope,
    DropPath,
    GELUTanh,
    GluMlp,
    LayerScale,
    PatchEmbed,
    QuickGELU,
    RotaryEmbeddingCat,
    RotaryEmbeddingDinoV3,
    RotaryEmbeddingMixed,
    SwiGLU,
)
from timm.layers import LayerNorm as TimmLayerNorm
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import nn

from mae_deploy.models.vit import BlockWithQKV, transformer_blocks

_PASSIVE = (nn.Identity, nn.Dropout, DropPath, LayerScale)
"""Parts of a block that do nothing after training, and LayerScale, which folds into the layer before it."""

_LINEARS = ("attn.qkv", "attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.proj", "mlp.fc1", "mlp.fc2")
_GATED = ("mlp.fc1_g", "mlp.fc1_x")
"""Linear layers that are found under our names or brought under them."""

_ATTENTION = (Attention, EvaAttention, AttentionRope)

_ALIKE: dict[type[nn.Module], str] = {
    BlockWithQKV: Block.__name__,
    EvaBlock: Block.__name__,
    EvaAttention: Attention.__name__,
    AttentionRope: Attention.__name__,
    SwiGLU: GluMlp.__name__,
}
"""What computes the same but for the names and layout of its tensors."""

_WORDS = {
    "": "blocks",
    "norm1": "norm",
    "norm2": "norm",
    "attn": "attention",
    "attn.q_norm": "query and key norms (qk_norm)",
    "attn.k_norm": "query and key norms (qk_norm)",
    "attn.norm": "a norm in the attention (scale_attn_norm)",
    "attn.gate": "a gate of the attention",
    "mlp": "MLP",
    "mlp.act": "activation",
    "mlp.norm": "a norm in the MLP (scale_mlp_norm)",
}
"""What a part of a block is called in messages."""

_CLASSES = {
    "VisionTransformerDistilled": "a distillation token (dist_token)",
    "Beit": "relative positions in its attention (Beit)",
    "VisionTransformerRelPos": "relative positions in its attention (VisionTransformerRelPos)",
    "ConvNeXt": "convolutions in place of attention (ConvNeXt)",
}
"""What sets timm's other classes apart from those that are read."""

_ROTARY = {RotaryEmbeddingCat: "index", RotaryEmbeddingDinoV3: "dinov3", RotaryEmbeddingMixed: "mixed"}


def settings_of(model: Any) -> dict[str, Any]:
    """The settings of an encoder (`models.config.BEYOND_PLAIN`) that computes what a VisionTransformer or Eva of timm's
    does; of one that has foreign features, what can be told.
    """
    block = model.blocks[0]
    after_pooling = isinstance(model.head, nn.Identity) and _normed_after_pooling(model)
    rope, pool = getattr(model, "rope", None), model.attn_pool
    norms = [part for part in (model.norm, model.fc_norm) if not isinstance(part, nn.Identity)]
    settings: dict[str, Any] = {
        "class_token": model.cls_token is not None,
        "num_registers": 0 if model.reg_token is None else model.reg_token.shape[1],
        "position_table": model.pos_embed is not None,
        "activation": _activation(block.mlp),
        "qk_norm": isinstance(getattr(block.attn, "q_norm", None), nn.LayerNorm),
        "attn_norm": isinstance(getattr(block.attn, "norm", None), nn.LayerNorm),
        "mlp_norm": isinstance(getattr(block.mlp, "norm", None), nn.LayerNorm),
        "pre_norm": not isinstance(model.norm_pre, nn.Identity),
        "final_norm": bool(norms) and not after_pooling,
        "pool_norm": after_pooling,
        "norm_eps": getattr(getattr(block, "norm1", None), "eps", 1e-6),
    }
    if isinstance(pool, AttentionPoolLatent) and pool.mlp is not None:
        fc1: Any = pool.mlp.fc1
        settings |= {"pool_heads": pool.num_heads, "pool_mlp_ratio": fc1.out_features / fc1.in_features}
        settings["pool_prefix"] = isinstance(model, Eva) or model.pool_include_prefix or not model.num_prefix_tokens
    if rope is not None:
        settings |= {"rotary": _ROTARY.get(type(rope), "index"), "rotary_base": float(rope.temperature or 1)}
        reference = getattr(rope, "ref_feat_shape", None)
        settings |= {
            "rotary_offset": float(getattr(rope, "grid_offset", 0.0)),
            "rotary_reference": None if reference is None else tuple(reference),
        }
    return settings


def _normed_after_pooling(model: Any) -> bool:
    """Whether its only last norm is of the pooled mean; that of the class token is the same before and after."""
    norm_alone = isinstance(model.norm, nn.Identity) and not isinstance(model.fc_norm, nn.Identity)
    return norm_alone and model.global_pool != "token"


def foreign_features(model: Any, *, classifier: bool) -> list[str]:
    """What the model computes and our encoder or classifier cannot, in words."""
    if type(model) not in (VisionTransformer, Eva):
        kind = type(model).__name__
        return [_CLASSES.get(kind, f"the class {kind}")]
    if type(model.patch_embed) is not PatchEmbed:
        return [f"a {type(model.patch_embed).__name__} in place of a patch embedding"]
    if kinds := dict.fromkeys(type(block).__name__ for block in model.blocks if type(block) not in (Block, EvaBlock)):
        return [f"blocks of kind {', '.join(kinds)}"]
    rows, columns = model.patch_embed.patch_size
    rope, attention = getattr(model, "rope", None), model.blocks[0].attn
    present = {
        f"patches of {rows}x{columns} pixels": rows != columns,
        "a norm of the patch embeddings": not isinstance(model.patch_embed.norm, nn.Identity),
        f"rotary positions of kind {type(rope).__name__}": rope is not None and not _known_rotary(rope),
        "attention heads of a width of their own": (
            type(attention) in _ATTENTION and attention.head_dim * attention.num_heads != model.embed_dim
        ),
        "fewer keys than queries (num_kv_heads)": (
            getattr(attention, "num_kv_heads", attention.num_heads) != attention.num_heads
        ),
    }
    features = [feature for feature, there in present.items() if there] + _foreign_parts(model)
    return features + _foreign_end(model, classifier=classifier)


def _known_rotary(rope: Any) -> bool:
    if isinstance(rope, RotaryEmbeddingDinoV3):
        return rope.normalize_coords == "separate" and rope.min_period is None and rope.max_period is None
    return type(rope) is RotaryEmbeddingMixed or (type(rope) is RotaryEmbeddingCat and rope.grid_type == "index")


def _activation(mlp: Any) -> str:
    act = mlp.act
    if type(mlp) is SwiGLU or (type(mlp) is GluMlp and not mlp.gate_last and type(act) is nn.SiLU):
        return "swiglu"
    if type(act) is GELUTanh or getattr(act, "approximate", "none") == "tanh":
        return "gelu_tanh"
    return "quick_gelu" if type(act) is QuickGELU else "gelu"


def _foreign_parts(model: Any) -> list[str]:
    """Where the blocks differ from ours of the same settings."""
    settings = settings_of(model)
    taken = {name: settings[name] for name in ("activation", "qk_norm", "attn_norm", "mlp_norm")}
    with torch.device("meta"):
        block = transformer_blocks(
            dim=4, depth=1, num_heads=1, norm_layer=partial(nn.LayerNorm, eps=settings["norm_eps"]), **taken
        )[0]
    ours = _parts(block)
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
    return {
        name: _kind(module)
        for name, module in block.named_modules()
        if not isinstance(module, _PASSIVE) and not (name in (*_LINEARS, *_GATED) and type(module) is nn.Linear)
    }


def _kind(module: nn.Module) -> str:
    name = _ALIKE.get(type(module), type(module).__name__)
    if type(module) in (nn.LayerNorm, TimmLayerNorm):
        return f"LayerNorm with eps {module.eps:g}"
    if type(module) is GELUTanh or getattr(module, "approximate", "none") == "tanh":
        return "GELU (tanh)"
    if isinstance(module, GluMlp):
        return f"{name} ({'gate last' if module.gate_last else 'gated, as SwiGLU'})"
    return f"{name} (gated, as SwiGLU)" if "glu" in name.lower() else name


def _foreign_end(model: Any, *, classifier: bool) -> list[str]:
    """Where the norms outside of the blocks, the pooling and the head differ from ours."""
    wanted = f"LayerNorm with eps {settings_of(model)['norm_eps']:g}"
    norms = [norm for norm in (model.norm, model.fc_norm) if not isinstance(norm, nn.Identity)]
    if other := [kind for norm in norms if (kind := _kind(norm)) != wanted]:
        return [f"a last norm of kind {other[0]}"]
    if not isinstance(model.norm_pre, nn.Identity) and _kind(model.norm_pre) != wanted:
        return [f"a norm before the blocks of kind {_kind(model.norm_pre)}"]
    if len(norms) == 2:
        return ["a norm both before and after pooling"]
    pool = model.attn_pool
    if pool is not None and not _known_pool(pool, model):
        return [f"attention pooling of another kind ({type(pool).__name__})"]
    if pool is not None and classifier and _normed_after_pooling(model):
        return ["a norm between attention pooling and head (fc_norm)"]
    if not classifier and not _normed_after_pooling(model):
        return []
    if model.global_pool not in ("token", "avg", "map"):
        return [f"'{model.global_pool}' pooling"]
    if model.global_pool == "avg" and getattr(model, "pool_include_prefix", False):
        return ["pooling that includes the class token"]
    return []


def _known_pool(pool: Any, model: Any) -> bool:
    """Whether a pooling is one query's attention to all tokens, with an MLP behind it."""
    wanted, kind = settings_of(model)["activation"], type(pool).__name__
    return (
        kind == AttentionPoolLatent.__name__
        and pool.mlp is not None
        and isinstance(pool.q, nn.Linear)
        and isinstance(pool.q_norm, nn.Identity)
        and int(pool.latent_len) == 1
        and pool.pos_embed is None
        and pool.pool == "token"
        and pool.latent_dim == model.embed_dim
        and _activation(pool.mlp) == ("gelu" if wanted == "swiglu" else wanted)
        and _kind(pool.norm) == _kind(model.blocks[0].norm1)
    )


def pool_of(model: Any) -> str:
    """What its head reads, in our words (`models.vit.Pool`)."""
    if model.global_pool == "avg":
        return "mean" if isinstance(model.fc_norm, nn.Identity) else "avg"
    return "map" if model.global_pool == "map" else "cls"
