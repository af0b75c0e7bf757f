"""Settings of INT8 and FP8. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mae_deploy.config import Settings, setting
from mae_deploy.errors import ConfigError
from mae_deploy.runtime.tensorrt.options import changed_options

_METHODS = {"nncf": ("mse", "minmax"), "modelopt": ("mse", "minmax", "entropy")}
"""What `--calib-method` may be with quantisers that have not got all; mse is the largest magnitude in its place."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Int8Config(Settings, resume="fixed"):
    """INT8 and FP8."""

    quantization: Literal["auto", "dynamic", "static"] = "auto"
    """dynamic: activation ranges found at run time, no calibration; static: Q/DQ with calibrated ranges;
    auto: the faster one on the engine, dynamic for ONNX Runtime, static for OpenVINO and TensorRT."""
    quantizer: Literal["own", "onnxruntime", "nncf", "modelopt"] = "own"
    """Who quantises: mae-deploy (own), or the quantiser of ONNX Runtime, NNCF or NVIDIA's ModelOpt on the same FP32
    graph and images, without our search; only NNCF's has SmoothQuant. What they give is judged alike."""
    calib_data: Path | None = setting(None, basic=True)
    """Folder of at least 128 images for calibration; required for static."""
    calib_images: int = setting(512, at_least=128)
    """At most this many of them, spread over the folder."""
    calib_method: Literal["mse", "minmax", "percentile", "entropy"] = "mse"
    """How activation ranges of INT8 are chosen; FP8 takes the largest magnitude, and so do quantisers of others in
    place of mse."""
    calib_percentile: float = setting(99.99, at_least=50, at_most=100)
    """Share of the values within the range, for --calib-method percentile."""
    smooth_quant: bool = True
    """SmoothQuant: move the activations' outlier channels into the weights, folded into LayerNorm and v; without
    --calib-data from the weights alone."""
    smooth_alpha: float = setting(0.5, at_least=0, at_most=1)
    """How much of them moves, from 0 to 1."""
    bias_correction: bool = False
    """Add the mean error of the rounded weights to the biases; needs --calib-data."""
    weight_bits: int = setting(8, at_least=7, at_most=8)
    """Bits of INT8's weights, 7 or 8: 7 cost 2 to 3 dB, and are faster on x86 CPUs without VNNI, whose fast products of
    8 overflow and are not used."""
    int8_attention: bool = False
    """Attention products in eight bits too (static), for engines that fuse them: head dim 16, 32 or 64 and at most 512
    tokens."""
    max_drop: float | None = setting(None, basic=True, at_least=0, below=100)
    """Largest loss of top-1 in points: of accuracy where the images of --samples lie in folders named by class, else of
    agreement with FP32."""
    min_cosine: float | None = setting(None, above=0, at_most=1)
    """Least cosine of centred features, of the worst image; default: 0.995, for FP8 0.95."""
    min_sqnr: float | None = setting(None, at_least=0)
    """Least signal-to-noise ratio of an output in dB; default: 30, for FP8 18."""
    max_latency: float = setting(1.0, resume="free", above=0)
    """Largest share of the latency in FP32, on TensorRT in FP16, on the same engine; at or above it the graph is
    rejected."""
    search: bool = True
    """Where all of it in eight bits misses the budget, find the fastest mix with higher precision that meets it."""
    prefer: Literal["fp16"] | None = None
    """fp16: where eight bits on TensorRT are slower than FP16 or miss the budget, keep FP16 instead of failing."""

    @property
    def has_weight_bits(self) -> bool:
        """Whether the quantiser can make weights of 7 bits."""
        return self.quantizer not in _METHODS

    def quantizer_faults(self, policy: str) -> Iterator[ConfigError]:
        """What the quantiser of others has not got."""
        if self.quantizer == "own":
            return
        ours: tuple[str, ...] = ("--bias-correction", "--int8-attention")
        if self.quantizer != "nncf":
            ours += ("--no-smooth-quant", "--smooth-alpha")
        given = [flag for flag in changed_options(self) if flag.startswith(ours)]
        if self.quantizer in _METHODS:
            known = self.calib_method in _METHODS[self.quantizer]
            given += [] if known else [f"--calib-method {self.calib_method}"]
            given += ["--quantization dynamic"] if policy == "dynamic" else []
        given += ["--weight-bits 7"] if self.weight_bits == 7 and not self.has_weight_bits else []
        for flag in given:
            yield ConfigError(
                f"{flag} with --quantizer {self.quantizer}, which does not have it", hint="leave one of the two out"
            )
