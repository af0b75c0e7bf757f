"""Pretraining: masking, the target, the autoencoder's loss, a run folder (paper, section 3 and appendix A.1)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from mae_deploy.checkpoint import OWN_LICENCE, Metadata, inherited_licence
from mae_deploy.config import from_dict, to_dict
from mae_deploy.data.training_set import open_training
from mae_deploy.data.transforms import train_transform
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.masking import masking_of
from mae_deploy.pretrain.config import PretrainConfig
from mae_deploy.pretrain.reconstruct import draw_reconstructions
from mae_deploy.pretrain.targets import Target, TeacherFeatures, fit_pca
from mae_deploy.progress import notice
from mae_deploy.seeding import derive_seed, seed_everything
from mae_deploy.training.loop import TrainingJob, accelerator_of, run_job
from mae_deploy.training.optim.groups import decay_groups
from mae_deploy.training.step import StepBatch
from mae_deploy.weights.load import LoadedWeights, read_weights, start_autoencoder_from

PRETRAIN_WARMUP = 40.0
"""Epochs (paper, table 8)."""

_PICTURES = 8


def run_pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Pretrain a masked autoencoder; returns the loop's summary."""
    teacher, init = (read_weights(path) if path is not None else None for path in (config.teacher, config.init))
    target: Target | None = TeacherFeatures(teacher, config.model) if teacher is not None else None
    objective = replace(config.objective, target_dim=target.dim) if target is not None else config.objective
    spec = config.images.preprocess(config.model.image_size, config.model.in_chans, _preprocess_of(teacher or init))
    dataset = open_training(config.data, train_transform(spec, config.augment), config.images, seed=config.seed)
    fingerprint = dataset.fingerprint()
    accelerator = accelerator_of(config)
    seed_everything(derive_seed(config.seed, "weights"))
    model = MaskedAutoencoder(config.model, config.decoder, norm_pix_loss=config.norm_pix_loss, objective=objective)
    decoded = init is not None and start_autoencoder_from(model, init)
    if target is not None:
        target.to(accelerator.device)
        if accelerator.is_main_process:
            notice("pictures:", "none, as a teacher's features are not a picture")

    def loss(model: nn.Module, batch: StepBatch) -> dict[str, Tensor]:
        noise = batch.rand(config.model.num_tokens)
        masking = masking_of(
            config.mask_sampling,
            noise,
            config.mask_ratio,
            config.model.grid_size,
            unit=config.mask_unit,
            group_masking=config.group_masking,
        )
        return {"loss": model(batch.images, masking, None if target is None else target(batch.images)).loss}

    def pictures(model: nn.Module, epochs: int, last: bool) -> None:
        if last or epochs % config.pictures_every == 0:
            assert isinstance(model, MaskedAutoencoder)
            out = config.out / f"reconstruction-{epochs:04d}.png"
            shown = dataset.first(_PICTURES)
            draw_reconstructions(
                model,
                shown,
                spec,
                out,
                mask_ratio=config.mask_ratio,
                mask_sampling=config.mask_sampling,
                mask_unit=config.mask_unit,
                group_masking=config.group_masking,
                bands=config.picture_bands,
                seed=config.seed,
            )

    def begin() -> None:
        if init is not None and accelerator.is_main_process:
            notice("start:", f"{config.model.name} of {config.init}, {'with its' if decoded else 'a new'} decoder")
        if model.pca is not None and not decoded:  # a checkpoint has the components
            batch_size, num_workers = config.optim.batch_size, config.images.num_workers
            fit_pca(model, dataset, spec, accelerator, batch_size=batch_size, seed=config.seed, num_workers=num_workers)

    job = TrainingJob(
        title="pretrain",
        model=model,
        saved=model,
        groups=decay_groups(model, config.optim.weight_decay),
        dataset=dataset,
        spec=spec,
        loss=loss,
        metadata=lambda: Metadata(
            kind="mae",
            encoder=to_dict(config.model),
            decoder=to_dict(config.decoder),
            norm_pix_loss=config.norm_pix_loss,
            objective=to_dict(objective),
            preprocess=to_dict(spec),
            positions=init.metadata.positions if init is not None else "bicubic",
            licence=inherited_licence(
                target.licence if target is not None else OWN_LICENCE,
                init.metadata.licence if init is not None else OWN_LICENCE,
            ),
            provenance={
                "stage": "pretrain",
                "config": to_dict(config),
                "data": fingerprint,
                **({"teacher": target.record} if target is not None else {}),
                **({"parent": init.record} if init is not None else {}),
            },
        ),
        paper_warmup=PRETRAIN_WARMUP,
        epoch_end=pictures if target is None else None,
        begin=begin,
    )
    return run_job(job, accelerator, config, fingerprint)


def _preprocess_of(loaded: LoadedWeights | None) -> Preprocess | None:
    return from_dict(Preprocess, loaded.metadata.preprocess) if loaded is not None else None
