"""Settings of export. No torch here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mae_deploy.config import section, setting
from mae_deploy.errors import ConfigError
from mae_deploy.training.config import Device

_MODES = ("full", "visible", "ragged", "reconstruct")

Range = tuple[int, int, int]
"""min, opt, max."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Int8Config:
    """INT8."""

    quantization: Literal["auto", "dynamic", "static"] = "auto"
    """dynamic: activation ranges found at run time, no calibration; static: Q/DQ with calibrated ranges;
    auto: the faster one on the engine, dynamic for ONNX Runtime, static for OpenVINO."""
    calib_data: Path | None = None
    """Folder of at least 128 images for calibration; required for static."""
    calib_images: int = 512
    """At most this many of them, spread over the folder."""
    calib_method: Literal["mse", "minmax", "percentile", "entropy"] = "mse"
    """How activation ranges are chosen."""
    calib_percentile: float = 99.99
    """Share of the values within the range, for --calib-method percentile."""
    smooth_quant: bool = True
    """SmoothQuant: move the activations' outlier channels into the weights, folded into LayerNorm and v; without --calib-data from the weights alone."""
    smooth_alpha: float = 0.5
    """How much of them moves, from 0 to 1."""
    bias_correction: bool = False
    """Add the mean error of the rounded weights to the biases; needs --calib-data."""
    int8_attention: bool = False
    """Attention products in INT8 too (static), for engines that fuse them: head dim 16, 32 or 64 and at most 512 tokens."""
    max_drop: float | None = None
    """Largest loss of top-1 in points: of accuracy where the images of --samples lie in folders named by class, else of agreement with FP32."""
    min_cosine: float | None = None
    """Least cosine of centred features, of the worst image; default: 0.995."""
    min_sqnr: float | None = None
    """Least signal-to-noise ratio of an output in dB; default: 30."""
    max_latency: float = 1.0
    """Largest share of the FP32 graph's latency on the same engine; at or above it the graph is rejected."""
    search: bool = True
    """Where all of it in INT8 misses the budget, find the fastest mix of INT8 and higher precision that meets it."""

    def __post_init__(self) -> None:
        for name, allowed, limits in (
            ("calib_images", self.calib_images >= 128, "at least 128"),
            ("calib_percentile", 50 <= self.calib_percentile <= 100, "within 50 and 100"),
            ("smooth_alpha", 0 <= self.smooth_alpha <= 1, "within 0 and 1"),
            ("max_drop", self.max_drop is None or 0 <= self.max_drop < 100, "at least 0 and below 100"),
            ("min_cosine", self.min_cosine is None or 0 < self.min_cosine <= 1, "above 0 and at most 1"),
            ("min_sqnr", self.min_sqnr is None or self.min_sqnr >= 0, "at least 0"),
            ("max_latency", self.max_latency > 0, "above 0"),
        ):
            if not allowed:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name):g} must be {limits}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """Settings of `mae-deploy export`."""

    checkpoint: Path = setting(argument=True)
    """A run folder, a checkpoint folder or a weights file."""
    out: Path
    """Bundle folder to write."""
    engine: Literal["onnx", "openvino"] = "onnx"
    """The engine that the graph is made for and proven on: onnx (ONNX Runtime) or openvino; the other one runs it too."""
    tokens: str = "full"
    """full: the whole image; visible: the patches given as ids_keep, any number of them, or visible:K for exactly K; ragged: each image its own
    number, padded (ragged:K: to K); reconstruct: encoder and decoder, all patches' pixels from the visible ones (reconstruct:K)."""
    precision: Literal["fp32", "fp16", "bf16", "int8"] = "fp32"
    """Arithmetic of the graph."""
    typing: Literal["auto", "weak", "strong"] = "auto"
    """weak: an FP32 graph, opset 17, that tells the engine what it may compute in (weights stored in the precision, Q/DQ with FP32 scales);
    strong: the types in the graph say it; auto: strong for fp16, and for bf16 on OpenVINO, else weak."""
    batch: str = "dynamic"
    """A fixed batch size, or dynamic."""
    profile: str | None = None
    """Smallest, usual and largest of the dynamic sizes, such as 'B:1,8,32 K:20,49,196'; default: B:1,8,32 and K from 1 to all patches, usually a quarter."""
    outputs: tuple[str, ...] | None = None
    """Outputs by name: cls, tokens, pooled, logits, feature_map, block_I, p2 to p5, pixels; default: all of the first four that the model has."""
    layers: tuple[int, ...] | None = None
    """Also the patch tokens after these blocks, counted from 0, as outputs block_I."""
    pyramid: str | None = None
    """Also ViTDet's simple feature pyramid p2 to p5: a weights file of a detector trained on this backbone, or random (untrained, from --seed)."""
    images: Literal["float32", "float16", "uint8"] = "float32"
    """Input type: normalised float (B, C, H, W), or uint8 (B, H, W, C) with the normalisation in the graph; float16 only with --precision fp16."""
    features: Literal["float32", "float16"] = "float32"
    """Type of the outputs; float16 only with --precision fp16."""
    fp32_ops: tuple[Literal["softmax", "gelu", "norm", "residual"], ...] | None = None
    """What stays FP32 in an FP16 graph besides embedding, final norm, pooling and head; default: softmax."""
    pixels: Literal["target", "normalised", "image"] = "target"
    """Reconstructed pixels: as the decoder predicts them, in the space of the normalised images, or of images from 0 to 1."""
    image_size: tuple[int, int] | None = None
    """Input height and width, H[,W]; default: the checkpoint's, for another the position embeddings are interpolated."""
    int8: Int8Config = section(Int8Config)
    samples: Path | None = None
    """Folder of images for the parity check; default: the data that the checkpoint was trained on."""
    num_samples: int | None = None
    """Images of the parity check, default 32, for int8 128; the first 8 go into the bundle as golden samples."""
    threads: int | None = None
    """CPU threads of the engine during the checks; default: one for each core."""
    seed: int = 0
    """Seed of the visible patches in the parity check and in calibration."""
    device: Device = "cpu"
    """Where PyTorch computes the reference: auto, cpu or cuda."""

    def __post_init__(self) -> None:
        mode, colon, keep = self.tokens.partition(":")
        if mode not in _MODES or (colon and (mode == "full" or not keep.isdecimal() or int(keep) < 1)):
            raise ConfigError(f"--tokens {self.tokens}", hint="write full, visible, ragged or reconstruct, or visible:K such as visible:49")
        if self.batch != "dynamic" and not (self.batch.isdecimal() and int(self.batch) >= 1):
            raise ConfigError(f"--batch {self.batch}", hint="a number of at least 1, or dynamic")
        if self.outputs is not None and len(set(self.outputs)) < len(self.outputs):
            raise ConfigError(f"--outputs {','.join(self.outputs)} names an output twice")
        if self.layers is not None and (len(set(self.layers)) < len(self.layers) or min(self.layers, default=0) < 0):
            raise ConfigError(f"--layers {','.join(map(str, self.layers))} must be block numbers from 0, each once")
        for name, count in (("num-samples", self.num_samples), ("threads", self.threads)):
            if count is not None and count < 1:
                raise ConfigError(f"--{name} {count} must be at least 1")
        if self.seed < 0:
            raise ConfigError(f"--seed {self.seed} must be at least 0")
        if self.precision != "fp16" and "float16" in (self.images, self.features):
            raise ConfigError(f"--images and --features float16 need --precision fp16, not {self.precision}")
        if self.pixels != "target" and mode != "reconstruct":
            raise ConfigError(f"--pixels {self.pixels} needs --tokens reconstruct")
        if (self.engine, self.precision, self.typing) == ("onnx", "bf16", "strong"):
            raise ConfigError(
                "--precision bf16 --typing strong: ONNX Runtime has no BF16 arithmetic on the CPU",
                hint="pass --engine openvino, or leave --typing out: weights stored in BF16, computed in FP32",
            )
        self._check_profile()
        self._check_int8()

    @property
    def token_mode(self) -> Literal["full", "visible", "ragged", "reconstruct"]:
        """The part of `tokens` before the colon."""
        return self.tokens.partition(":")[0]  # type: ignore[return-value]

    @property
    def keep(self) -> int | None:
        """The fixed K of `visible:K`."""
        return int(self.tokens.partition(":")[2]) if ":" in self.tokens else None

    @property
    def fixed_batch(self) -> int | None:
        """The fixed batch."""
        return None if self.batch == "dynamic" else int(self.batch)

    @property
    def resolved_typing(self) -> Literal["weak", "strong"]:
        """What auto means."""
        if self.typing != "auto":
            return self.typing
        return "strong" if self.precision == "fp16" or (self.precision, self.engine) == ("bf16", "openvino") else "weak"

    @property
    def islands(self) -> tuple[Literal["softmax", "gelu", "norm", "residual"], ...]:
        """What stays FP32 where the rest is FP16."""
        if self.fp32_ops is not None:
            return self.fp32_ops
        return ("softmax",) if self.resolved_typing == "strong" and self.precision in ("fp16", "int8") else ()

    @property
    def policy(self) -> Literal["dynamic", "static"]:
        """The faster INT8 on the engine unless one is asked for (docs/results/cpu.md)."""
        if self.int8.quantization != "auto":
            return self.int8.quantization
        return "static" if self.engine == "openvino" or self.resolved_typing == "strong" else "dynamic"

    @property
    def sample_count(self) -> int:
        """Images of the parity check."""
        return self.num_samples or (128 if self.precision == "int8" else 32)

    def ranges(self, num_patches: int) -> dict[str, Range]:
        """min, opt, max of B, and of K where patches are chosen; three equal numbers where fixed.

        Raises:
            ConfigError: a K beyond the number of patches.
        """
        given = _read_profile(self.profile)
        B = self.fixed_batch
        found: dict[str, Range] = {"B": given.get("B", (1, 8, 32)) if B is None else (B, B, B)}
        if self.token_mode != "full":
            K = self.keep
            found["K"] = given.get("K", (1, max(1, num_patches // 4), num_patches)) if K is None else (K, K, K)
            if found["K"][2] > num_patches:
                raise ConfigError(f"K {found['K'][2]} is more than the {num_patches} patches of this model")
        return found

    def _check_profile(self) -> None:
        given = _read_profile(self.profile)
        fixed = [name for name, value in (("B", self.fixed_batch), ("K", self.keep)) if value is not None and name in given]
        if fixed:
            raise ConfigError(f"--profile {self.profile} gives a range for {fixed[0]}, which is fixed", hint="leave one of the two out")
        if "K" in given and self.token_mode == "full":
            raise ConfigError(f"--profile {self.profile}: a graph of all patches has no K", hint="use --tokens visible")

    def _check_int8(self) -> None:
        if self.precision != "int8":
            if self.int8 != Int8Config():
                raise ConfigError(f"settings of INT8 are given with --precision {self.precision}", hint="pass --precision int8")
            return
        if self.policy == "static" and self.int8.calib_data is None:
            raise ConfigError("static INT8 needs --calib-data", hint="a folder of at least 128 images like those that the model will see")
        if self.policy == "dynamic" and (self.resolved_typing == "strong" or self.int8.int8_attention):
            raise ConfigError("dynamic INT8 has neither strong typing nor INT8 attention", hint="pass --quantization static and --calib-data")
        if self.int8.calib_data is None and self.int8.bias_correction:
            raise ConfigError("--bias-correction needs --calib-data", hint="a folder of at least 128 images")


def _read_profile(text: str | None) -> dict[str, Range]:
    """`B:1,8,32 K:20,49,196` as ranges."""
    found: dict[str, Range] = {}
    for part in (text or "").split():
        match = re.fullmatch(r"([BK]):(\d+),(\d+),(\d+)", part)
        numbers = [int(number) for number in match.groups()[1:]] if match else []
        if match is None or not 1 <= numbers[0] <= numbers[1] <= numbers[2] or match[1] in found:
            raise ConfigError(f"--profile {text}", hint="write min,opt,max for B, K or both, such as 'B:1,8,32 K:20,49,196'")
        found[match[1]] = (numbers[0], numbers[1], numbers[2])
    return found
