"""Quantisation-aware distillation: the student is rounded as its INT8 export will be, the teacher stays as it is."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mae_deploy.distill.config import EdgeConfig
from mae_deploy.distill.objectives.base import Objective, View
from mae_deploy.errors import ConfigError
from mae_deploy.models.quantization.policy import Policy
from mae_deploy.models.quantization.training import Quantizer, quantize_in_training
from mae_deploy.models.taps import Taps
from mae_deploy.models.vit import Encoder
from mae_deploy.training.config import Sharding


def student_quantizer(student: Encoder, config: EdgeConfig, *, sharding: Sharding) -> Quantizer | None:
    """What rounds the student's Linears in training, put into it in place; None where nothing is to be rounded or
    penalised.

    Raises:
        ConfigError: the student's weights are not whole on each device.
    """
    if config.quantize == "none" and config.outlier_weight == 0:
        return None
    if sharding == "fsdp2":
        flag = (
            f"--quantize {config.quantize}"
            if config.quantize != "none"
            else f"--outlier-weight {config.outlier_weight:g}"
        )
        raise ConfigError(
            f"{flag} with --sharding fsdp2: ranges need whole weights",
            hint="leave --sharding out, a student fits on one device",
        )
    policy = Policy(
        static=config.quantize == "static",
        smooth_alpha=config.smooth_alpha if config.smooth_quant else None,
        method=config.calib_method,
        percentile=config.calib_percentile,
    )
    return quantize_in_training(
        student,
        config.quantize,
        policy,
        start=config.quantize_from,
        until=config.ranges_until,
        observed=config.ranges_observed,
        penalises=config.outlier_weight > 0,
    )


class Outliers(Objective):
    """Heavy tails among the inputs of the student's Linears (see `models.quantization.outliers`)."""

    def __init__(self, penalty: Callable[[], Tensor]) -> None:
        super().__init__(())
        self.penalty = penalty
        """Of the forward pass of the student just before, `Quantizer.penalty`."""

    def forward(self, student: Taps, teacher: Taps, view: View) -> Tensor:
        """The penalty, a float32 scalar."""
        return self.penalty()
