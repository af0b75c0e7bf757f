"""Settings of `mae-deploy sweep`. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mae_deploy.config import Settings, section, setting
from mae_deploy.data.config import ValidationConfig
from mae_deploy.errors import ConfigError, MaeDeployError
from mae_deploy.evaluation.config import FeaturesConfig
from mae_deploy.training.config import Device


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepConfig(Settings):
    """Settings of `mae-deploy sweep`."""

    data: str = setting(argument=True, resume="free")
    """Images to pretrain on, as of pretrain; where they lie in DATA/train/<class>/… and DATA/val/<class>/…, those of
    train without their labels."""
    out: Path = setting(resume="free")
    """Folder of the experiment; the same command goes on where it was stopped."""
    mask_ratio: tuple[float, ...] | None = setting(None, resume="free", basic=True, above=0, below=1)
    """Mask ratios to try, separated by commas: the paper's figure 5."""
    over: str | None = setting(None, resume="free", basic=True, metavar="SETTING=VALUE,…")
    """Any other setting of pretraining and its values, such as decoder.decoder_depth=1,2,4,8 or
    norm_pix_loss=true,false."""
    labelled: Path | None = setting(None, resume="free", basic=True)
    """Labelled images, LABELLED/train/<class>/… and LABELLED/val/<class>/…; default: DATA."""
    model: str | None = setting(None, resume="fixed", basic=True, metavar="MODEL")
    """The encoder (see pretrain --help); default: that of --recipe or --set, else vit_base_patch16."""
    epochs: int | None = setting(None, resume="fixed", basic=True, at_least=1, at_most=100_000)
    """Epochs of pretraining; default: those of --recipe or --set, else 50."""
    batch_size: int | None = setting(None, resume="fixed", basic=True, at_least=1)
    """Images a step of pretraining and of fine-tuning, and at a time of features; default: those of the recipes or of
    --set, else 64."""
    recipe: str | None = setting(None, resume="fixed", basic=True, metavar="RECIPE")
    """Settings of pretraining from a YAML file, or the name of a recipe that ships with mae-deploy."""
    settings: tuple[str, ...] = setting(
        (), flag="--set", repeated=True, resume="fixed", basic=True, metavar="KEY=VALUE"
    )
    """Any setting of pretraining as section.key=value; may be repeated."""
    knn: bool = setting(True, resume="fixed", basic=True)
    """Evaluate by k-NN."""
    linear: Literal["logistic", "ridge", "none"] = setting("logistic", resume="fixed")
    """Evaluate by a linear probe on features that are computed once: logistic, ridge or none."""
    finetune: bool = setting(True, resume="fixed", basic=True)
    """Evaluate by fine-tuning, for 20 epochs where --finetune-recipe and --finetune-set do not say otherwise."""
    finetune_recipe: str | None = setting(None, resume="fixed", metavar="RECIPE")
    """Settings of fine-tuning from a YAML file, or the name of a recipe that ships with mae-deploy."""
    finetune_settings: tuple[str, ...] = setting(
        (), flag="--finetune-set", repeated=True, resume="fixed", metavar="KEY=VALUE"
    )
    """Any setting of fine-tuning as section.key=value; may be repeated."""
    scratch: bool = setting(False, resume="fixed")
    """Also fine-tune the same network from random weights, for a line to compare with."""
    k: int = setting(20, resume="fixed", at_least=1)
    """Neighbours that vote."""
    temperature: float = setting(0.07, resume="fixed", above=0)
    """A neighbour's vote is exp(cosine / temperature)."""
    held_out: float = setting(0.2, resume="fixed", above=0, below=1)
    """Share of the labelled training images on which the linear probe chooses its regularisation."""
    seeds: tuple[int, ...] = setting((0,), resume="free", basic=True)
    """Seeds; each pretrains and evaluates anew, and the curve shows their mean and range."""
    seed: int = setting(0, resume="fixed")
    """Added to each of --seeds."""
    device: Device = setting("auto", resume="free", basic=True)
    """Where to compute; auto takes the GPU where there is one."""
    validation: ValidationConfig = section(ValidationConfig)
    features: FeaturesConfig = section(FeaturesConfig, "batch_size")

    def faults(self) -> Iterator[MaeDeployError]:
        hint = "such as --mask-ratio 0.25,0.5,0.75,0.9, or --over decoder.decoder_depth=1,2,4,8"
        if self.mask_ratio is None and self.over is None:
            yield ConfigError("--mask-ratio or --over is missing: what to vary", hint=hint)
        if self.mask_ratio is not None and self.over is not None:
            yield ConfigError(f"--over {self.over} does not go with --mask-ratio: one setting is varied", hint=hint)
        if not self.seeds or len({*self.seeds}) < len(self.seeds):
            given = ",".join(map(str, self.seeds))
            yield ConfigError(f"--seeds '{given}' must be at least one seed, and each once")
        if not (self.knn or self.linear != "none" or self.finetune):
            yield ConfigError(
                "--no-knn, --linear none and --no-finetune leave nothing to evaluate", hint="leave one of them out"
            )
