"""One setting of pretraining at several values: pretrain, evaluate, draw the curve (the paper's figure 5 and tables 1
and 2).

Each value and seed has a folder with its runs; what is finished in it is not done again, so the same command goes on
after a kill.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from mae_deploy.commands.experiment import Parts, open_folder, slug
from mae_deploy.commands.sweep.config import SweepConfig
from mae_deploy.config import differences, from_dict, merge, to_dict
from mae_deploy.data.config import ValidationConfig
from mae_deploy.data.sources.splits import labelled_splits
from mae_deploy.errors import ConfigError
from mae_deploy.evaluation.features import EncoderFeatures, FeatureSet, extract
from mae_deploy.evaluation.knn import knn
from mae_deploy.evaluation.linear import fit_linear
from mae_deploy.pretrain import finetune
from mae_deploy.pretrain import run as pretrain
from mae_deploy.pretrain.config import FinetuneConfig, PretrainConfig
from mae_deploy.progress import heading, notice
from mae_deploy.recipe import RUN_CONFIG, parse_assignment, read_recipe
from mae_deploy.reporting.command_line import command_line
from mae_deploy.reporting.markdown import Page, Picture, write_report
from mae_deploy.reporting.plots import Curve, draw_curves
from mae_deploy.reporting.tables import Column, Row, Table, mean_of
from mae_deploy.results import Result
from mae_deploy.training.device import resolve_device
from mae_deploy.weights.load import read_weights

C = TypeVar("C")

CONFIG = "sweep.yaml"
RESULT = "result.json"

EPOCHS, FINETUNE_EPOCHS = 50, 20
"""Of pretraining and fine-tuning where nobody says how many: the paper's 800 and 100 would take days for each value."""

_CURVES = (
    Curve("fine-tuning", "finetune_top1"),
    Curve("linear", "linear_top1"),
    Curve("k-NN", "knn_top1"),
    Curve("from scratch", "scratch_top1", flat=True),
)


@dataclass(frozen=True, slots=True)
class Cell:
    """One value and seed: its folder and its pretraining."""

    value: Any
    seed: int
    folder: Path
    pretrain: PretrainConfig


def run_sweep(config: SweepConfig) -> Result:
    """Run what is missing of the experiment and report it whole.

    Raises:
        ConfigError: settings that no run can have, no labelled images, or a folder of another sweep.
    """
    setting, values = _varied(config)
    labelled = config.labelled or config.data
    labelled_splits(labelled, config.validation, seed=config.seed)
    resolve_device(config.device)
    seeds = [config.seed + seed for seed in config.seeds]
    # Every setting is checked before the first hour of training.
    cells = [[_cell(config, setting, value, seed) for seed in seeds] for value in values]
    tuned = None
    if config.finetune or config.scratch:
        tuned = _finetune_config(config, cells[0][0].pretrain.out, config.out, seeds[0])
    open_folder(config, CONFIG)
    notice("plan:", _plan(config, cells, tuned))
    rows: list[Row] = []
    report: dict[str, Any] = {}
    for value, of_value in zip(values, cells, strict=True):
        rows.append({"value": value, **mean_of([_probe(config, setting, cell) for cell in of_value])})
        # After each value, so that a long sweep can be looked at while it runs.
        report = _report(config, setting, seeds, rows)
    return Result(report, Table(f"{setting}: {config.out}", _columns(setting), rows))


def _plan(config: SweepConfig, cells: list[list[Cell]], tuned: FinetuneConfig | None) -> str:
    """What is going to be trained, in a line, before the first hour of it."""
    runs = [cell.pretrain for of_value in cells for cell in of_value]
    models = ", ".join(dict.fromkeys(run.model.name for run in runs))
    sizes = ", ".join(dict.fromkeys("x".join(map(str, run.model.image_size)) for run in runs))
    epochs = sorted({run.optim.epochs for run in runs})
    total = sum(run.optim.epochs for run in runs)
    parts = [f"{models} at {sizes} pretrained {len(runs)} times for {'-'.join(map(str, epochs))} epochs"]
    if tuned is not None:
        times = len(runs) * config.finetune + len(config.seeds) * config.scratch
        parts.append(f"fine-tuned {times} times for {tuned.optim.epochs}")
        total += times * tuned.optim.epochs
    return f"{', '.join(parts)}: {total} epochs in all; what is finished is not run again"


def _varied(config: SweepConfig) -> tuple[str, list[Any]]:
    """The setting and its values."""
    if config.mask_ratio is not None:
        setting, values = "mask_ratio", list(config.mask_ratio)
    else:
        assert config.over is not None
        setting, _, text = config.over.partition("=")
        # YAML's own list, so that [32, 32] is one value of two numbers.
        parsed = parse_assignment(f"values=[{text}]")["values"]
        setting, values = setting.strip(), list(parsed)
    if not setting or not values or len({slug(value) for value in values}) < len(values):
        raise ConfigError(
            f"--over {config.over or values} needs a setting and values, each once",
            hint="such as decoder.decoder_depth=1,2,4,8",
        )
    return setting, values


def _cell(config: SweepConfig, setting: str, value: Any, seed: int) -> Cell:
    folder = config.out / f"{setting.rpartition('.')[2]}-{slug(value)}" / f"seed-{seed}"
    varied: dict[str, Any] = value
    for part in reversed(setting.split(".")):
        varied = {part: varied}
    given = {
        "data": _unlabelled(config.data),
        "out": folder / "pretrain",
        "resume": True,
        "seed": seed,
        "device": config.device,
    }
    chosen = {
        "model": {"name": config.model} if config.model is not None else {},
        "optim": {
            **({"epochs": config.epochs} if config.epochs is not None else {}),
            **({"batch_size": config.batch_size} if config.batch_size is not None else {}),
        },
    }
    start = {} if config.recipe else {"optim": {"epochs": EPOCHS}}
    values = merge(_values(config.recipe, config.settings, start), chosen)
    return Cell(value, seed, folder, _build(PretrainConfig, values, varied, given))


def _unlabelled(data: str) -> str:
    """The images to pretrain on: those of the training split, where there are splits."""
    if (Path(data) / "train").is_dir():
        return str(Path(data) / "train")
    return str(Path(data) / "train-*.tar") if any(Path(data).glob("train-*.tar")) else data


def _finetune_config(config: SweepConfig, init: Path, out: Path, seed: int, **more: Any) -> FinetuneConfig:
    given = {
        "data": str(config.labelled or config.data),
        "init": init,
        "out": out,
        "resume": True,
        "seed": seed,
        "device": config.device,
        **({"validation": to_dict(config.validation)} if config.validation != ValidationConfig() else {}),
        **more,
    }
    start = {} if config.finetune_recipe else {"optim": {"epochs": FINETUNE_EPOCHS}}
    values = _values(config.finetune_recipe, config.finetune_settings, start)
    if config.batch_size is not None:
        values = merge(values, {"optim": {"batch_size": config.batch_size}})
    return _build(FinetuneConfig, values, {}, given)


def _values(recipe: str | None, settings: tuple[str, ...], start: dict[str, Any]) -> dict[str, Any]:
    """Recipe, then `--set`."""
    values = read_recipe(recipe) if recipe else start
    for assignment in settings:
        values = merge(values, parse_assignment(assignment))
    return values


def _build(cls: type[C], values: dict[str, Any], varied: dict[str, Any], given: dict[str, Any]) -> C:
    """With the varied setting; the sweep's own folders, seed and device win."""
    if taken := [key for key in given if key in varied]:
        raise ConfigError(f"{taken[0]} cannot be varied", hint="several seeds are --seeds")
    return from_dict(cls, {**merge(values, varied), **given})


# --- one value and seed ----------------------------------------------------------------------------------------------


def _probe(config: SweepConfig, setting: str, cell: Cell) -> dict[str, float]:
    """Pretrain and evaluate; figures that `result.json` has are taken from it."""
    heading(f"{setting} {cell.value}, seed {cell.seed}")
    _check_unchanged(cell.pretrain)
    parts = Parts(cell.folder / RESULT)
    parts.do("pretrain", lambda: {"loss": pretrain.run_pretrain(cell.pretrain)["last_loss"]})
    if (config.knn and not parts.has("knn")) or (config.linear != "none" and not parts.has("linear")):
        train, val, num_classes = _features(config, cell)
        if config.knn:
            parts.do("knn", lambda: _knn(config, train, val, num_classes))
        if config.linear != "none":
            parts.do("linear", lambda: _linear(config, cell, train, val, num_classes))
    if config.finetune:
        _check_unchanged(_finetune_config(config, cell.pretrain.out, cell.folder / "finetune", cell.seed))
        parts.do(
            "finetune",
            lambda: {"finetune_top1": _finetune(config, cell.pretrain.out, cell.folder / "finetune", cell.seed)},
        )
    return parts.figures | (_scratch(config, setting, cell) if config.scratch else {})


def _features(config: SweepConfig, cell: Cell) -> tuple[FeatureSet, FeatureSet, int]:
    """Features of the labelled images, and the number of classes."""
    labelled = config.labelled or config.data
    train, val = labelled_splits(labelled, config.validation, seed=cell.seed)
    features = replace(config.features, batch_size=config.batch_size or config.features.batch_size)
    source = EncoderFeatures(read_weights(cell.pretrain.out), features, config.device)
    known, asked = (
        extract(source, images, features, title=title) for title, images in (("train", train), ("val", val))
    )
    return known, asked, len(train.class_names or ())


def _knn(config: SweepConfig, train: FeatureSet, val: FeatureSet, num_classes: int) -> dict[str, float]:
    (found,) = knn(
        train, val, num_classes, (config.k,), temperature=config.temperature, device=resolve_device(config.device)
    ).values()
    return {"knn_top1": found["top1"]}


def _linear(config: SweepConfig, cell: Cell, train: FeatureSet, val: FeatureSet, num_classes: int) -> dict[str, float]:
    assert config.linear != "none"
    device = resolve_device(config.device)
    fitted = fit_linear(
        config.linear,
        train.features,
        train.labels,
        num_classes,
        held_out=config.held_out,
        seed=cell.seed,
        device=device,
    )
    return {"linear_top1": fitted.accuracy(val.features, val.labels).top1}


def _finetune(config: SweepConfig, init: Path, out: Path, seed: int, *, from_scratch: bool = False) -> float:
    return float(finetune.run_finetune(_finetune_config(config, init, out, seed, from_scratch=from_scratch))["top1"])


def _scratch(config: SweepConfig, setting: str, cell: Cell) -> dict[str, float]:
    """Fine-tuning of random weights: once for each seed, or for each value where the values are of the encoder
    itself.
    """
    folder = cell.folder / "scratch" if setting.startswith("model.") else config.out / "scratch" / f"seed-{cell.seed}"
    out = folder / "finetune"
    # Only the network is taken from it: a run that was interrupted under another value goes on with the one that it was
    # started with.
    network = Path(read_recipe(out / RUN_CONFIG)["init"]) if (out / RUN_CONFIG).is_file() else cell.pretrain.out
    parts = Parts(folder / RESULT)
    parts.do("scratch", lambda: {"scratch_top1": _finetune(config, network, out, cell.seed, from_scratch=True)})
    return parts.figures


def _check_unchanged(config: PretrainConfig | FinetuneConfig) -> None:
    """A recipe's file may have been edited since a run that is finished, and is not opened again."""
    stored = config.out / RUN_CONFIG
    if stored.is_file() and (changed := differences(from_dict(type(config), read_recipe(stored)), config)):
        raise ConfigError(
            f"{config.out} was run with other settings: {'; '.join(changed)}",
            hint="repeat the same settings, or choose another --out",
        )


# --- the report ------------------------------------------------------------------------------------------------------


def _report(config: SweepConfig, setting: str, seeds: list[int], rows: list[Row]) -> dict[str, Any]:
    """Write sweep.json, sweep.md and sweep.png for the values so far."""
    command = command_line("sweep", config)
    report = {
        "command": command,
        "setting": setting,
        "seeds": seeds,
        "data": config.data,
        "labelled": str(config.labelled or config.data),
        "rows": rows,
    }
    values = [row["value"] for row in rows]
    page = Page(
        title=setting,
        command=command,
        parts=[
            *(f"{stage}: {what}" for stage, what in _settings(config).items()),
            f"Top-1 in per cent on the validation images; mean and range over the seeds {','.join(map(str, seeds))}.",
            Table("", _columns(setting), rows),
            Picture(
                f"top-1 against {setting}",
                partial(draw_curves, rows=rows, curves=_CURVES, label=setting, values=values),
            ),
        ],
    )
    write_report(config.out, "sweep", report, page)
    return report


def _settings(config: SweepConfig) -> dict[str, str]:
    """What was asked for beside the varied setting, in a line for each stage."""
    chosen = [("--model", config.model), ("--epochs", config.epochs), ("--batch-size", config.batch_size)]
    options = [f"`{name} {value}`" for name, value in chosen if value is not None]
    found = {}
    for stage, recipe, settings, default, more in (
        ("Pretraining", config.recipe, config.settings, EPOCHS, options),
        ("Fine-tuning", config.finetune_recipe, config.finetune_settings, FINETUNE_EPOCHS, []),
    ):
        start = f"recipe {recipe}" if recipe else f"defaults, {default} epochs"
        found[stage] = ", ".join([start, *(f"`{assignment}`" for assignment in settings), *more])
    return found


def _columns(setting: str) -> list[Column]:
    return [
        Column(setting, "value"),
        Column("loss", "loss", "{:.4f}"),
        *(Column(f"{curve.title}, %", curve.key, "{:.2f}") for curve in _CURVES),
    ]
