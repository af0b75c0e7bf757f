"""Small encoders of the kinds that today's families are."""

from __future__ import annotations

from typing import Any

from mae_deploy.models.config import EncoderConfig

KINDS: dict[str, dict[str, Any]] = {
    "DINOv3": {"rotary": "dinov3", "num_registers": 4, "norm_eps": 1e-5},
    "DINOv3 S+": {"rotary": "dinov3", "num_registers": 2, "activation": "swiglu"},
    "Perception Encoder": {
        "rotary": "index",
        "rotary_base": 10000.0,
        "rotary_offset": 1.0,
        "rotary_reference": (4, 4),
        "position_table": True,
        "pre_norm": True,
        "pool_heads": 4,
        "norm_eps": 1e-5,
    },
    "PE spatial": {"rotary": "index", "position_table": True, "pre_norm": True, "final_norm": False},
    "EVA-02": {"rotary": "index", "position_table": True, "final_norm": False, "pool_norm": True},
    "EVA-02 CLIP": {"rotary": "index", "position_table": True, "attn_norm": True, "mlp_norm": True},
    "mixed": {"rotary": "mixed", "qk_norm": True, "mlp_norm": True, "activation": "swiglu"},
    "SigLIP": {"class_token": False, "activation": "gelu_tanh", "pool_heads": 3},
    "registers that are not pooled": {"num_registers": 2, "pool_heads": 3, "pool_norm": True, "pool_prefix": False},
    "register alone": {"class_token": False, "num_registers": 1, "rotary": "index", "activation": "quick_gelu"},
    "no prefix": {"class_token": False, "rotary": "mixed"},
}


def family(kind: str) -> EncoderConfig:
    """5x7 patches of 4x4 pixels, 3 heads of 8."""
    sizes: dict[str, Any] = {"image_size": (20, 28), "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
    return EncoderConfig(name="tiny", mlp_ratio=2.0, **sizes, **KINDS[kind])
