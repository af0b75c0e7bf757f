"""The linear probe: a frozen encoder, BatchNorm without affine weights, a linear head, LARS (paper, appendix A.1, table
10).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from mae_deploy.checkpoint import Metadata, read_safetensors, save_checkpoint, save_tensors
from mae_deploy.config import from_dict, to_dict
from mae_deploy.data.sources.base import ImageSource
from mae_deploy.data.sources.splits import labelled_splits
from mae_deploy.data.training_set import train_dataset
from mae_deploy.data.transforms import eval_transform, train_transform
from mae_deploy.errors import ConfigError
from mae_deploy.evaluation.config import FeaturesConfig, LinprobeConfig
from mae_deploy.evaluation.features import FeatureSet, FeatureSource, ModuleFeatures, extract
from mae_deploy.evaluation.linear import fit_linear, unstandardise
from mae_deploy.files import atomic_path, point_link, read_json, write_json
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.models.vit import Classifier
from mae_deploy.seeding import derive_seed, seed_everything
from mae_deploy.training.device import resolve_device
from mae_deploy.training.loop import TrainingJob, make_accelerator, run_job
from mae_deploy.training.optim.groups import decay_groups
from mae_deploy.training.optim.lars import Lars
from mae_deploy.training.state.run_folder import RunFolder
from mae_deploy.training.step import StepBatch
from mae_deploy.training.validation import Evaluator
from mae_deploy.weights.load import load_strict, read_weights, start_from

LINPROBE_WARMUP = 10.0
"""Epochs (paper, table 10)."""


def run_linprobe(config: LinprobeConfig) -> dict[str, Any]:
    """Train a linear head on a frozen encoder and validate; returns a summary.

    Raises:
        ConfigError: no encoder, no labelled images, or a run folder that cannot be resumed.
        CheckFailed: the checkpoint lacks what the head reads.
    """
    loaded = read_weights(config.init)
    stored = loaded.encoder_config
    encoder = replace(stored, image_size=config.image_size or stored.image_size)
    spec = config.images.preprocess(
        encoder.image_size, encoder.in_chans, from_dict(Preprocess, loaded.metadata.preprocess)
    )
    train, val = labelled_splits(config.data, config.validation, seed=config.seed, columns=config.images.columns)
    assert train.class_names is not None
    data = {"train": train.fingerprint(), "val": val.fingerprint()}
    seed_everything(derive_seed(config.seed, "weights"))
    classifier = start_from(Classifier(encoder, num_classes=len(train.class_names), pool=config.pool), loaded)
    if (
        config.pool == "avg" and "fc_norm.weight" in loaded.tensors
    ):  # of a fine-tuned classifier; a pretrained encoder has none
        load_strict(classifier.fc_norm, {part: loaded.tensors[f"fc_norm.{part}"] for part in ("weight", "bias")})
    loop = config.loop
    accelerator = make_accelerator(
        config.device, loop.precision, config.out, loop.tracker, deterministic=loop.deterministic
    )
    if config.solver != "lars" and accelerator.num_processes > 1:
        raise ConfigError(
            f"--solver {config.solver} runs in one process, not {accelerator.num_processes}",
            hint="start it without torchrun",
        )
    metadata = Metadata(
        kind="classifier",
        encoder=to_dict(encoder),
        pool=config.pool,
        num_classes=len(train.class_names),
        class_names=train.class_names,
        preprocess=to_dict(spec),
        positions=loaded.metadata.positions,
        licence=loaded.metadata.licence,
        provenance={"stage": "linprobe", "config": to_dict(config), "data": data, "parent": loaded.record},
    )
    if config.solver == "lars" and min(config.optim.batch_size, len(train)) * accelerator.num_processes < 2:
        raise ConfigError(
            f"--batch-size {config.optim.batch_size} of {len(train)} images: BatchNorm needs two images a step",
            hint="a larger --batch-size, or --solver ridge",
        )
    if config.solver == "lars":
        return run_job(_job(config, classifier, metadata, train, val, spec), accelerator, config, data)
    main = accelerator.is_main_process
    with RunFolder.open(config.out, config, data, resume=config.resume, write=main) as folder:
        return _solve(config, classifier, metadata, folder, train, val, spec)


class SharedBatchNorm(nn.BatchNorm1d):
    """BatchNorm of frozen features over the images of all processes: the same on one process and on several, and
    nothing to differentiate.
    """

    @torch.no_grad()
    def forward(self, input: Tensor) -> Tensor:
        """Features `(B, D) -> (B, D)`."""
        if not (self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        exact, D = input.double(), input.shape[1]
        totals = torch.cat([exact.sum(0), exact.square().sum(0), exact.new_tensor([len(exact)])])
        dist.all_reduce(totals)
        count = totals[-1]
        mean = totals[:D] / count
        variance = (totals[D : 2 * D] / count - mean.square()).clamp_min(0)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), self.momentum)
        return ((exact - mean) / (variance + self.eps).sqrt()).to(input.dtype)


class LinearProbe(nn.Module):
    """A frozen classifier whose head is trained behind BatchNorm without affine weights.

    Whenever the classifier's state is read, its own head becomes the trained one with the BatchNorm's running
    statistics folded in: `W (x - mean) / sqrt(var + eps) + b`, the same logits. What is saved is therefore a classifier
    as any other.
    """

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier.requires_grad_(False).eval()
        width = classifier.config.width
        self.norm = SharedBatchNorm(width, affine=False, eps=1e-6)
        self.linear = nn.Linear(width, classifier.head.out_features)
        trunc_normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)
        classifier.register_state_dict_pre_hook(self._fold)  # type: ignore[no-untyped-call]

    def train(self, mode: bool = True) -> LinearProbe:
        """The encoder stays in evaluation mode."""
        super().train(mode)
        self.classifier.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits: `(B, C, H, W) -> (B, classes)`."""
        with torch.no_grad():
            pooled = self.classifier.forward_pooled(images)
        return self.linear(self.norm(pooled.float()))  # type: ignore[no-any-return]

    @torch.no_grad()
    def _fold(self, *_: Any) -> None:
        assert self.norm.running_mean is not None
        assert self.norm.running_var is not None
        deviation = (self.norm.running_var.double() + self.norm.eps).sqrt()
        weight, bias = unstandardise(self.linear.weight, self.linear.bias, self.norm.running_mean, deviation)
        self.classifier.head.weight.copy_(weight)
        self.classifier.head.bias.copy_(bias)


# --- the paper's recipe ----------------------------------------------------------------------------------------------


def _job(
    config: LinprobeConfig,
    classifier: Classifier,
    metadata: Metadata,
    train: ImageSource,
    val: ImageSource,
    spec: Preprocess,
) -> TrainingJob:
    seed_everything(derive_seed(config.seed, "head"))
    model = LinearProbe(classifier)
    dataset = train_dataset(train, train_transform(spec, config.augment), config.images, seed=config.seed)

    def loss(model: nn.Module, batch: StepBatch) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(model(batch.images), batch.labels)}

    return TrainingJob(
        title="linear probe",
        model=model,
        saved=classifier,
        groups=decay_groups(model, config.optim.weight_decay),
        optimizer=Lars,
        dataset=dataset,
        spec=spec,
        loss=loss,
        metadata=lambda: metadata,
        paper_warmup=LINPROBE_WARMUP,
        evaluate=Evaluator(
            val, eval_transform(spec), spec, batch_size=config.optim.batch_size, num_workers=config.images.num_workers
        ),
        num_validation=len(val),
    )


# --- features that are computed once ---------------------------------------------------------------------------------


def _solve(
    config: LinprobeConfig,
    classifier: Classifier,
    metadata: Metadata,
    folder: RunFolder,
    train: ImageSource,
    val: ImageSource,
    spec: Preprocess,
) -> dict[str, Any]:
    assert config.solver != "lars"
    assert train.class_names is not None
    name = f"{classifier.config.name}, {config.pool}"
    source = ModuleFeatures(
        classifier, classifier.forward_pooled, spec, name, metadata.licence, config.loop.precision, config.device
    )
    settings = FeaturesConfig(
        batch_size=config.optim.batch_size, num_workers=config.images.num_workers, max_corrupt=config.images.max_corrupt
    )
    known, asked = (
        _cached(source, images, settings, folder, split) for split, images in (("train", train), ("val", val))
    )
    device = resolve_device(config.device)
    fitted = fit_linear(
        config.solver,
        known.features,
        known.labels,
        len(train.class_names),
        held_out=config.held_out,
        seed=config.seed,
        device=device,
    )
    with torch.no_grad():
        classifier.head.weight.copy_(fitted.weight)
        classifier.head.bias.copy_(fitted.bias)
    metrics = fitted.accuracy(asked.features, asked.labels).summary()
    target = folder.checkpoints / "step-0"
    if not target.is_dir():
        save_checkpoint(target, classifier.state_dict(), replace(metadata, metrics={"top1": metrics["top1"]}))
        folder.append("eval.jsonl", {"step": 0, "epoch": 0, **metrics})
    for link in ("best", "last"):
        point_link(folder.checkpoints / link, target.name)
    return {
        "out": str(folder.path),
        "solver": config.solver,
        **metrics,
        "train_top1": fitted.accuracy(known.features, known.labels).top1,
        "strength": fitted.strength,
        **({"C": 1 / (fitted.strength * len(known.labels))} if config.solver == "logistic" else {}),
        "held_out_top1": {f"{strength:g}": top1 for strength, top1 in fitted.held_out_top1.items()},
        "train_images": len(known.labels),
        "val_images": len(asked.labels),
        "unreadable": len(known.unreadable) + len(asked.unreadable),
        "images_per_second": known.images_per_second,
    }


def _cached(
    source: FeatureSource, images: ImageSource, config: FeaturesConfig, folder: RunFolder, split: str
) -> FeatureSet:
    """The features of this run: computed once, then read from its folder, whose config and data have been checked to be
    the same.
    """
    path = folder.path / f"features-{split}.safetensors"
    about = path.with_suffix(".json")
    if about.is_file():
        facts = read_json(about)
        tensors, _ = read_safetensors(path)
        return FeatureSet(
            tensors["features"], tensors["labels"], tuple(facts["unreadable"]), facts["images_per_second"]
        )
    found = extract(source, images, config, title=f"features of {split}")
    with atomic_path(path) as aside:
        save_tensors(aside, {"features": found.features, "labels": found.labels})
    # Written last: where it is, the features are there too.
    write_json(about, {"unreadable": found.unreadable, "images_per_second": found.images_per_second})
    return found
