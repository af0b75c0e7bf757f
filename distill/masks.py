"""Which patches the student sees in a step."""

from __future__ import annotations

from mae_deploy.distill.config import DistillConfig, RunKind
from mae_deploy.errors import ConfigError
from mae_deploy.models.config import EncoderConfig
from mae_deploy.models.mask_config import keep_count
from mae_deploy.models.masking import Masking, random_masking
from mae_deploy.training.kept_patches import KeptPatches
from mae_deploy.training.step import StepBatch


class Masks:
    """The masking of each batch: that of `--keep-ratio`, that of `--mask-ratio` in a run on features, or none.

    Raises:
        ConfigError: nothing would be left to see.
    """

    def __init__(self, config: DistillConfig, kind: RunKind, encoder: EncoderConfig) -> None:
        self.num_patches = encoder.num_patches
        self.kept = KeptPatches(encoder.num_patches, config.keep_ratio) if config.keep_ratio is not None else None
        self.fixed_views = config.caching.fixed_views > 0
        by_ratio = kind == "features" and self.kept is None and config.streams.stream is None
        self.mask_ratio = config.features.mask_ratio if by_ratio else 0.0
        if keep_count(self.num_patches, 1 - self.mask_ratio, least=0) == 0:
            raise ConfigError(f"--mask-ratio {self.mask_ratio} of {self.num_patches} patches leaves nothing to see")

    @property
    def always(self) -> bool:
        """Whether there are masked patches in every step."""
        return self.kept.most < self.num_patches if self.kept is not None else self.ever

    @property
    def ever(self) -> bool:
        """Whether there are masked patches in any step."""
        return (
            self.kept.least if self.kept is not None else keep_count(self.num_patches, 1 - self.mask_ratio, least=0)
        ) < self.num_patches

    @property
    def settings(self) -> dict[str, float] | None:
        """What the patches that an image is seen by follow from, beside the seed; None where they are all, or their
        number changes from step to step.
        """
        if self.kept is None:
            return {"mask_ratio": self.mask_ratio} if self.ever else None
        return {"kept": self.kept.most} if self.kept.least == self.kept.most < self.num_patches else None

    def __call__(self, batch: StepBatch) -> Masking | None:
        """Drawn anew for each step, or for each fixed view of an image; None: the whole images."""
        if not self.ever:
            return None
        noise = batch.image_rand(self.num_patches) if self.fixed_views else batch.rand(self.num_patches)
        return random_masking(noise, self.mask_ratio) if self.kept is None else self.kept(batch, noise)
