"""Any timm model with a weights file as a teacher, computed by timm itself: of ViTs every tap of the encoder, of other
networks pooled and logits.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn

from mae_deploy.checkpoint import UNKNOWN_LICENCE, CheckpointKind
from mae_deploy.distill.config import TeacherConfig
from mae_deploy.distill.teachers.base import SPATIAL_KINDS, check_offered
from mae_deploy.distill.teachers.torch_teacher import TorchTeacher
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.models.config import EncoderConfig
from mae_deploy.models.masking import Masking
from mae_deploy.models.taps import BLOCK_KINDS, Tap, deepest
from mae_deploy.models.vit import gather_tokens
from mae_deploy.weights.timm_network import (
    build_timm,
    count_classes,
    load_timm,
    read_timm,
    timm_licence,
    timm_preprocess,
)

_HINTS = {
    "logits": "the weights file has no head: give one of a fine-tuned model",
    "qkv": "its attention has no plain qkv layer: match features instead",
    "decoder": "only autoencoders of ours have a decoder",
    "pixels": "only autoencoders of ours have a decoder",
    "tokens": "it is not a ViT, whose blocks all have one grid: match pooled or logits",
}


class TimmTeacher(TorchTeacher):
    """A timm model, cut behind the deepest tap. Registers are left out; where there is no class token, the mean of the
    patch tokens stands for it.
    """

    model: Any

    def __init__(self, architecture: str, path: Path, settings: TeacherConfig) -> None:
        super().__init__(settings)
        source = read_timm(path, architecture)
        self.model = model = build_timm(architecture, num_classes=count_classes(source, architecture))
        load_timm(model, source, architecture)
        model.eval().requires_grad_(False)
        self.is_vit = _is_vit(model)
        self.depth = len(model.blocks) if self.is_vit else 0
        self.num_heads = model.blocks[0].attn.num_heads if self.is_vit else 0
        self.width: int = model.embed_dim if self.is_vit else model.head_hidden_size
        self.decoder_depth = self.decoder_width = 0
        self.num_classes: int | None = model.num_classes or None
        names = source.settings.get("label_names")
        self.class_names: tuple[str, ...] | None = (
            tuple(map(str, names)) if isinstance(names, list) and len(names) == self.num_classes else None
        )
        self.kind: CheckpointKind = "classifier" if self.num_classes else "encoder"
        self.licence = timm_licence(model, architecture) or UNKNOWN_LICENCE
        self.record = {"timm": architecture, "path": str(source.file), "source_sha256": source.sha256}
        self.preprocess = timm_preprocess(model)
        self.encoder_config: EncoderConfig | None = None

    def watch(self, wanted: Collection[Tap], *, student: EncoderConfig, spec: Preprocess) -> None:
        """See `Teacher`."""
        check_offered(wanted, kinds=self._kinds(), depth=self.depth, hints=_HINTS)
        model, size, grid = self.model, self.preprocess.image_size, student.grid_size
        self._stops_early = all(tap.kind in BLOCK_KINDS for tap in wanted)
        self._last = deepest(wanted, *BLOCK_KINDS) if self._stops_early else self.depth
        self._blocks = sorted({self._last, *(tap.block for tap in wanted if tap.kind == "tokens")})
        self._keeper = _KeepPatches(getattr(model, "num_prefix_tokens", 0), with_indices=isinstance(model, Eva))
        if _picks_patches(model):
            model.patch_drop = self._keeper
        else:
            self.reason_against_subset = f"timm's {type(model).__name__} takes no choice of patches"
        if self.is_vit:
            if any(tap.kind in SPATIAL_KINDS for tap in wanted) and self.settings.teacher_grid == "resize":
                built, cells = (
                    model.patch_embed.img_size,
                    model.patch_embed.grid_size,
                )  # of hybrids, patches of a feature map
                size = (grid[0] * built[0] // cells[0], grid[1] * built[1] // cells[1])
                model.set_input_size(img_size=size)
            grid = tuple(model.patch_embed.grid_size)
            if self._stops_early:
                model.prune_intermediate_layers([self._last - 1], prune_norm=True, prune_head=True)
            for tap in wanted:
                if tap.kind == "qkv":
                    attention = model.blocks[tap.block - 1].attn
                    attention.qkv = _Noting(attention.qkv)
        self.prepare(model, wanted, student=student, spec=spec, grid_size=grid, image_size=size)

    def forward(self, images: Tensor, masking: Masking | None) -> tuple[Tensor, ...]:
        """See `TorchTeacher`."""
        model = self.model
        if not self.is_vit:
            features = model.forward_features(images)
            return tuple(model.forward_head(features, pre_logits=tap.kind == "pooled") for tap in self.wanted)
        self._keeper.ids_keep = masking.ids_keep if masking is not None else None
        prefix, final = model.num_prefix_tokens, not self._stops_early
        found = model.forward_intermediates(
            images,
            indices=[block - 1 for block in self._blocks],
            return_prefix_tokens=prefix > 0,
            stop_early=not final,
            output_fmt="NLC",
            intermediates_only=not final,
        )
        last, inner = found if final else (None, found)
        tokens = {
            block: torch.cat([rows[1], rows[0]], dim=1) if prefix else rows
            for block, rows in zip(self._blocks, inner, strict=True)
        }
        return tuple(self._read(tap, tokens, last) for tap in self.wanted)

    def _kinds(self) -> tuple[str, ...]:
        headed = ("pooled", "logits") if self.num_classes else ("pooled",)
        if not self.is_vit:
            return headed
        plain = all(type(block.attn) is Attention for block in self.model.blocks)
        return ("tokens", *(("qkv",) if plain else ()), "latent", "cls", *headed)

    def _read(self, tap: Tap, tokens: dict[int, Tensor], last: Tensor | None) -> Tensor:
        if tap.kind == "tokens":
            return self._rows(tokens[tap.block])
        if tap.kind == "qkv":
            attention = self.model.blocks[tap.block - 1].attn
            rows = self._rows(attention.qkv.noted)
            return rows.reshape(*rows.shape[:2], 3, attention.num_heads, -1).permute(0, 2, 3, 1, 4)
        assert last is not None
        if tap.kind == "logits" or (tap.kind == "pooled" and self.num_classes):
            return self.model.forward_head(last, pre_logits=tap.kind == "pooled")  # type: ignore[no-any-return]
        latent = self._rows(last)
        return {"latent": latent, "cls": latent[:, 0], "pooled": latent[:, 1:].mean(dim=1)}[tap.kind]

    def _rows(self, tokens: Tensor) -> Tensor:
        """CLS, or what stands for it, and the patches: `(B, prefix + N, D) -> (B, 1 + N, D)`."""
        patches = tokens[:, self.model.num_prefix_tokens :]
        cls = patches.mean(dim=1, keepdim=True) if getattr(self.model, "cls_token", None) is None else tokens[:, :1]
        return torch.cat([cls, patches], dim=1)


class _KeepPatches(nn.Module):
    """In the place of timm's patch dropout: the patches that are asked for, behind the prefix tokens."""

    def __init__(self, prefix: int, *, with_indices: bool) -> None:
        super().__init__()
        self.prefix, self.with_indices = prefix, with_indices
        self.ids_keep: Tensor | None = None

    def forward(self, tokens: Tensor) -> Any:
        """`(B, prefix + N, D) -> (B, prefix + K, D)`, with the indices where the model turns its rotary embeddings by
        them.
        """
        if self.ids_keep is not None:
            tokens = torch.cat(
                [tokens[:, : self.prefix], gather_tokens(tokens[:, self.prefix :], self.ids_keep)], dim=1
            )
        return (tokens, self.ids_keep) if self.with_indices else tokens


class _Noting(nn.Module):
    """A layer that remembers what it gave last."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.noted = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        """As the layer."""
        self.noted = self.layer(x)
        return self.noted


def _picks_patches(model: Any) -> bool:
    """Whether timm lets it drop patches, and with them their positions."""
    return isinstance(model, VisionTransformer | Eva)


def _is_vit(model: Any) -> bool:
    """Whether all blocks have the patch embedding's grid and width, and can be read one by one."""
    if not all(
        hasattr(model, name)
        for name in ("blocks", "patch_embed", "num_prefix_tokens", "forward_intermediates", "set_input_size")
    ):
        return False
    return len({(info["num_chs"], info["reduction"]) for info in model.feature_info}) == 1
