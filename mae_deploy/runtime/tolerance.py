"""How far an engine may be from PyTorch, for each precision."""

from __future__ import annotations

import dataclasses
import math

from mae_deploy.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """What an output must meet; None leaves a measure out, but some measure must cover every output.

    An output misses `max_abs` and `max_relative` only if it misses both: in the inner blocks of large models single
    values reach 1,500, of which float32 knows four digits after the point, and an output that is small all over has a
    large share of error.
    """

    cosine: float | None = None
    """The least cosine of a sample."""
    max_abs: float | None = None
    """The largest difference of a value."""
    max_relative: float | None = None
    """The largest difference of a value as a share of the reference's largest magnitude."""
    centred_cosine: float | None = None
    """The least cosine of a sample once the mean over the samples is removed."""
    sqnr_db: float | None = None
    """The least signal-to-noise ratio in dB."""
    top1_agreement: float | None = None
    """The least share of samples with the same most likely class (logits and probs only). Unless it is 1, one sample
    may always differ: one of eight does not refute 99 %."""

    def __post_init__(self) -> None:
        limits = self.to_dict()
        for name, limit in limits.items():
            share = name in ("cosine", "centred_cosine", "top1_agreement")
            if not (0 < limit <= 1 if share else 0 <= limit < math.inf):
                raise ConfigError(
                    f"tolerance: {name} {limit} must be {'in (0, 1]' if share else 'at least 0 and finite'}"
                )
        if not set(limits) - {"top1_agreement"}:
            raise ConfigError(
                "tolerance: no measure covers every output",
                hint="set cosine, centred_cosine, sqnr_db, max_abs or max_relative",
            )

    def to_dict(self) -> dict[str, float]:
        """The limits that are set, as a manifest holds them."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


TOLERANCES = {
    "fp32": Tolerance(cosine=0.99999, max_abs=1e-4, max_relative=1e-5),
    "fp16": Tolerance(cosine=0.9995, centred_cosine=0.999, sqnr_db=40, top1_agreement=0.99),
    "bf16": Tolerance(cosine=0.9995, centred_cosine=0.995, sqnr_db=30, top1_agreement=0.99),
    "int8": Tolerance(cosine=0.995, centred_cosine=0.995, sqnr_db=30, top1_agreement=0.99),
    "fp8": Tolerance(cosine=0.99, centred_cosine=0.95, sqnr_db=18, top1_agreement=0.98),
}
"""What every output must meet in each precision.

FP32 differs from PyTorch's FP32 by the order of summation only. In the others the plain cosine says too little (18 dB
still show 0.993, and features of a ViT share most of their norm): noise is measured by SQNR, and what tells images
apart by the centred cosine. FP8 has three bits of mantissa: each operand is off by 32 dB, whatever its scale, and the
outputs of a ViT-S or ViT-B with all its Linears in FP8 by 21 dB.
"""
