"""`mae-deploy import`: foreign weights become a checkpoint folder."""

from __future__ import annotations

from typing import Any

from mae_deploy.checkpoint import save_checkpoint
from mae_deploy.commands.weights.config import ImportConfig
from mae_deploy.data.class_order import check_distinct, read_class_names
from mae_deploy.files import refuse_to_overwrite
from mae_deploy.reporting.command_line import next_command
from mae_deploy.reporting.preprocess import report_facts
from mae_deploy.reporting.tables import facts_table
from mae_deploy.results import Result
from mae_deploy.weights.load import LoadedWeights, model_of
from mae_deploy.weights.read.convert import ImportOptions, import_weights
from mae_deploy.weights.read.preprocessing import PreprocessOptions


def run_import(config: ImportConfig) -> Result:
    """Convert, check, write; returns the report.

    Raises:
        ConfigError: the model computes something that our encoder does not.
        CheckFailed: the file is damaged, carries code, or is not exactly a ViT that we know.
    """
    refuse_to_overwrite(config.out)
    options = ImportOptions(
        model=config.model,
        key=config.key,
        prefix=config.prefix,
        image_size=config.image_size,
        num_heads=config.num_heads,
        decoder_num_heads=config.decoder_num_heads,
        norm_pix_loss=config.norm_pix_loss,
        licence=config.license,
        positions=config.positions,
        class_names=None if config.class_names is None else read_class_names(config.class_names),
        preprocess=PreprocessOptions(
            crop_mode=config.crop_mode,
            crop_pct=config.crop_pct,
            interpolation=config.interpolation,
            mean=config.mean,
            std=config.std,
        ),
    )
    imported = import_weights(config.source, options)
    check_distinct(imported.metadata.class_names or (), config.source, hint="give other names: --class-names FILE")
    model_of(LoadedWeights(imported.metadata, imported.tensors, {}))  # strict: every tensor has its place
    save_checkpoint(config.out, imported.tensors, imported.metadata)
    report: dict[str, Any] = {"out": str(config.out), **imported.report}
    then = next_command("export", config.out, out=f"{config.out}-bundle")
    return Result(report, facts_table(f"{config.source} → {config.out}", report_facts(report)), then=then)
