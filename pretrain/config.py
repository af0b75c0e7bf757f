"""Settings of pretraining, fine-tuning and reconstruction. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mae_deploy.checkpoint import Metadata, find_checkpoint, open_checkpoint
from mae_deploy.config import Settings, from_dict, section, setting, to_dict, typed
from mae_deploy.data.config import CropConfig, DataConfig, ValidationConfig
from mae_deploy.errors import ConfigError, MaeDeployError, errors_of, import_optional
from mae_deploy.models.config import DecoderConfig, EncoderConfig, ObjectiveConfig, check_objective, encoder_of_init
from mae_deploy.models.mask_config import GroupMasking, MaskSampling, check_keep_ratio, check_masking, mask_unit
from mae_deploy.recipe import settings_of_run
from mae_deploy.training.config import Device, LoopConfig, OptimConfig, RunSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig(RunSettings):
    """Settings of `mae-deploy pretrain`."""

    data: str = setting(argument=True, resume="free")
    """Unlabelled images: a folder in any tree; tar shards, as a folder, a pattern such as 'shards-{000..099}.tar',
    URLs, or 'pipe:COMMAND', which is run; or a Hugging Face data set on disk."""
    out: Path = setting(resume="free")
    """Run folder to write."""
    init: Path | None = setting(None, resume="fixed", basic=True, metavar="CKPT")
    """Weights to start from, a run folder, a checkpoint folder or a weights file: its encoder is the model, its decoder
    too where it has one that predicts the same; default: random weights."""
    resume: bool = setting(False, resume="free", basic=True)
    """Go on with the run in --out, or start it if it is not there; the losses are those of an unbroken run. Settings
    that are left out are the run's: pretrain --resume RUN is enough."""
    mask_ratio: float = setting(0.75, resume="fixed", basic=True, above=0, below=1)
    """Share of the patches that the encoder does not see."""
    mask_sampling: MaskSampling = setting("random", resume="fixed")
    """Which patches are masked (paper, table 1f): random; block, large rectangles as in BEiT; grid, all but one of
    every four."""
    mask_patch_size: int | None = setting(None, resume="fixed", at_least=1)
    """Side, in pixels, of the squares that random masking hides or shows as a whole (SimMIM: 32); default: a patch."""
    group_masking: GroupMasking = setting("independent", resume="fixed")
    """Of --band-groups: independent, each group has masked patches of its own (better in SatMAE); consistent, all have
    the same."""
    norm_pix_loss: bool = setting(True, resume="fixed")
    """Predict each patch normalised by its own mean and variance (paper, table 1d)."""
    teacher: Path | None = setting(None, resume="fixed", metavar="CKPT")
    """The frozen encoder of --target features: a run folder, a checkpoint folder or a weights file."""
    pictures_every: int = setting(20, resume="free", at_least=1)
    """Epochs between reconstruction pictures; the last epoch always draws one."""
    picture_bands: tuple[int, ...] | None = setting(None, resume="fixed")
    """Channels, counted from 0, that pictures show as red, green and blue, or one of them as grey; default for
    multispectral images: the first three."""
    seed: int = setting(0, resume="fixed", basic=True)
    """Seed of weights, data order, augmentation and masks."""
    device: Device = setting("auto", resume="free", basic=True)
    """Where to compute; auto takes the GPU where there is one."""
    model: EncoderConfig = section(EncoderConfig)
    decoder: DecoderConfig = section(DecoderConfig)
    objective: ObjectiveConfig = section(ObjectiveConfig)
    optim: OptimConfig = section(OptimConfig, epochs=800)
    augment: CropConfig = section(CropConfig)
    images: DataConfig = section(DataConfig)
    loop: LoopConfig = section(LoopConfig)

    @classmethod
    def completed(cls, values: dict[str, Any]) -> dict[str, Any]:
        resumed, init = settings_of_run(values), values.get("init")
        if resumed is not values or init is None or not Path(init).exists():  # the run says what is not there
            return resumed
        return _shaped_as(_metadata(Path(init)), values)

    def faults(self) -> Iterator[MaeDeployError]:
        yield from errors_of(
            lambda: check_masking(self.mask_sampling, self.mask_ratio, self.model.grid_size, unit=self.mask_unit)
        )
        yield from errors_of(lambda: check_objective(self.model, self.decoder, self.objective))
        if self.objective.target == "features" and self.teacher is None:
            yield ConfigError("--target features needs --teacher", hint="a run, checkpoint folder or weights file")
        if self.objective.target != "features" and self.teacher is not None:
            yield ConfigError(f"--teacher {self.teacher} needs --target features, not {self.objective.target}")
        if self.teacher is not None and self.objective.target_dim is not None:
            yield ConfigError(
                f"--target-dim {self.objective.target_dim} cannot be chosen: a --teacher's features have its width",
                hint="leave it out",
            )
        yield from errors_of(lambda: check_picture_bands(self.picture_bands, self.model.in_chans))

    @property
    def mask_unit(self) -> int:
        """Side, in patches, of the squares that are masked as a whole."""
        return mask_unit(self.mask_patch_size, self.model.patch)


@dataclass(frozen=True, kw_only=True, slots=True)
class MixConfig(Settings, resume="fixed"):
    """Regularisation."""

    drop_path: float = setting(0.1, at_least=0, below=1)
    """Stochastic depth, rising linearly over the blocks."""
    label_smoothing: float = setting(0.1, at_least=0, below=1)
    """Label smoothing, from 0 (none) to below 1."""
    mixup: float = setting(0.8, at_least=0)
    """Mixup alpha; 0 turns it off."""
    cutmix: float = setting(1.0, at_least=0)
    """CutMix alpha; 0 turns it off."""
    reprob: float = setting(0.25, at_least=0, below=1)
    """Probability of random erasing."""
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    """RandAugment in timm's notation; none turns it off."""

    def resolve(self) -> None:
        if self.auto_augment is not None and self.auto_augment.lower() == "none":
            object.__setattr__(self, "auto_augment", None)


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig(RunSettings):
    """Settings of `mae-deploy finetune`."""

    data: Path = setting(argument=True, resume="free")
    """Labelled images: DATA/train/<class>/… and DATA/val/<class>/…."""
    out: Path = setting(resume="free")
    """Run folder to write."""
    init: Path | None = setting(None, resume="fixed", basic=True, metavar="CKPT")
    """Pretrained encoder: a run folder, a checkpoint folder or a weights file."""
    from_scratch: bool = setting(False, resume="fixed", basic=True)
    """Start from random weights: the baseline, of the network of --init or of --model."""
    model: str | None = setting(None, resume="fixed", basic=True, metavar="MODEL")
    """The encoder, where --init does not give it (see pretrain --help)."""
    image_size: tuple[int, int] | None = setting(None, resume="fixed", basic=True, at_least=1)
    """Input height and width in pixels, H[,W]; default: that of --init, its position embeddings interpolated for
    another."""
    patch_size: int | None = setting(None, resume="fixed", at_least=1)
    """Side of a patch in pixels, where --init does not give it."""
    in_chans: int | None = setting(None, resume="fixed", at_least=1)
    """Input channels, where --init does not give them."""
    band_groups: tuple[tuple[int, ...], ...] | None = setting(None, resume="fixed", metavar="GROUPS")
    """Groups of channels (see pretrain --help-all), where --init does not give them."""
    resume: bool = setting(False, resume="free", basic=True)
    """Go on with the run in --out, or start it if it is not there. Settings that are left out are the run's: finetune
    --resume RUN is enough."""
    pool: Literal["avg", "cls"] = setting("avg", resume="fixed")
    """What the head reads: the mean of the patch tokens through fc_norm, or the CLS token."""
    keep_ratio: tuple[float, float] | None = setting(None, resume="fixed", basic=True)
    """Share of the patches that the network sees, LOW,HIGH: each step draws a number between them, and each image as
    many of its patches, so that one network serves every number of patches; one share fixes it. Validated with the
    most, and with the fewest. Default: all patches."""
    layer_decay: float = setting(0.65, resume="fixed", above=0, at_most=1)
    """Learning-rate decay a layer from the head down (paper: 0.65 for ViT-B, 0.75 for ViT-L and ViT-H)."""
    seed: int = setting(0, resume="fixed", basic=True)
    """Seed of the head, data order, augmentation and drop path."""
    device: Device = setting("auto", resume="free", basic=True)
    """Where to compute; auto takes the GPU where there is one."""
    optim: OptimConfig = section(OptimConfig, epochs=100, blr=5e-4, min_lr=1e-6, betas=(0.9, 0.999))
    mix: MixConfig = section(MixConfig)
    augment: CropConfig = section(CropConfig, min_scale=0.08)
    images: DataConfig = section(DataConfig)
    validation: ValidationConfig = section(ValidationConfig)
    loop: LoopConfig = section(LoopConfig)

    def faults(self) -> Iterator[MaeDeployError]:
        if self.init is None and not (self.from_scratch and self.model):
            yield ConfigError(
                "--init is missing",
                hint="give a pretrained run or checkpoint, or --from-scratch with --model for the baseline",
            )
        yield from errors_of(lambda: check_keep_ratio(self.keep_ratio))


@dataclass(frozen=True, kw_only=True, slots=True)
class ReconstructConfig(Settings, resume="never"):
    """Settings of `mae-deploy reconstruct`."""

    images: tuple[Path, ...] = setting(argument=True)
    """Images, folders, patterns such as 'photos/**/*.jpg', @list.txt or - (a list on standard input)."""
    checkpoint: Path = setting(metavar="CKPT")
    """A pretraining run, checkpoint folder or weights file with a decoder."""
    out: Path
    """PNG to write: original, masked and reconstructed, a row for each image."""
    mask_ratio: float = setting(0.75, above=0, below=1)
    """Share of the patches to hide."""
    mask_sampling: MaskSampling = "random"
    """Which patches are hidden: random, block or grid (see pretrain --help-all)."""
    mask_patch_size: int | None = setting(None, at_least=1)
    """Side, in pixels, of the squares that random masking hides or shows as a whole; default: a patch."""
    group_masking: GroupMasking = "independent"
    """Of --band-groups: independent or consistent (see pretrain --help-all)."""
    num_images: int = setting(8, at_least=1)
    """Images to draw at most, the first in alphabetical order."""
    max_pixels: int | None = setting(None, at_least=1)
    """Pixels of the largest image that is read, such as 300000000 for photos of 300 megapixels; default: 178956970."""
    paste_visible: bool = True
    """Show the visible patches themselves in the reconstruction, as the paper's figures do."""
    picture_bands: tuple[int, ...] | None = None
    """Channels to show as red, green and blue, or one as grey (see pretrain --help-all)."""
    seed: int = 0
    """Seed of the masks."""
    device: Device = "auto"
    """Where to compute; auto takes the GPU where there is one."""

    def faults(self) -> Iterator[MaeDeployError]:
        if self.out.suffix.lower() != ".png":
            yield ConfigError(f"--out {self.out} must end in .png")


def _metadata(init: Path) -> Metadata:
    """What weights are."""
    if find_checkpoint(init) is not None:
        return open_checkpoint(init).metadata
    metadata: Metadata = import_optional("mae_deploy.weights.load", extra="train").read_weights(init).metadata
    return metadata


def _shaped_as(init: Metadata, values: dict[str, Any]) -> dict[str, Any]:
    """The values with the encoder of --init, and with its decoder unless another one is asked for.

    Raises:
        ConfigError: another encoder is asked for.
    """
    model, decoder = (values.get(name) or {} for name in ("model", "decoder"))
    if errors_of(lambda: (typed(EncoderConfig, model), typed(DecoderConfig, decoder))):
        return values  # which is reported with all else that is wrong
    stored = from_dict(EncoderConfig, init.encoder)
    encoder = encoder_of_init(stored, typed(EncoderConfig, model), hint="leave --init out")
    own = init.decoder or {}
    if all(own.get(name) == value for name, value in typed(DecoderConfig, decoder).items()):
        decoder = own
    return {**values, "model": {**model, **to_dict(encoder)}, "decoder": decoder}


def check_picture_bands(bands: tuple[int, ...] | None, channels: int) -> None:
    """Whether a picture can show these channels.

    Raises:
        ConfigError: neither one nor three, or a channel that is not there.
    """
    if bands is not None and (len(bands) not in (1, 3) or any(not 0 <= band < channels for band in bands)):
        given = ",".join(map(str, bands))
        raise ConfigError(
            f"--picture-bands {given} is not one or three of the channels 0 to {channels - 1}",
            hint="such as 3,2,1; --in-chans is the number of channels",
        )
