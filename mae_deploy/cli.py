"""The `mae-deploy` command: one short function a command; the work and its imports are elsewhere."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from mae_deploy import __version__
from mae_deploy.commands.benchmark.config import BenchmarkConfig
from mae_deploy.commands.benchmark_train.config import BenchmarkTrainConfig
from mae_deploy.commands.config import BuildEngineConfig, DoctorConfig, InfoConfig, PredictConfig, VerifyConfig
from mae_deploy.commands.data.config import PackConfig, StatsConfig
from mae_deploy.commands.quickstart.config import QuickstartConfig
from mae_deploy.commands.report.config import ReportConfig
from mae_deploy.commands.sweep.config import SweepConfig
from mae_deploy.commands.weights.config import ExportWeightsConfig, ImportConfig
from mae_deploy.distill.config import DistillConfig
from mae_deploy.errors import MaeDeployError, import_optional
from mae_deploy.evaluation.config import CompareConfig, EvalConfig, KnnConfig, LinprobeConfig
from mae_deploy.export.config import ExportConfig
from mae_deploy.options import command
from mae_deploy.pretrain.config import FinetuneConfig, PretrainConfig, ReconstructConfig

app = typer.Typer(
    name="mae-deploy",
    help="From a folder of unlabelled images to a vision backbone on an edge device.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


data = typer.Typer(
    help="Look at a data set, or pack it into shards.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(data, name="data")


@command(app, QuickstartConfig)
def quickstart(config: QuickstartConfig) -> Any:
    """Run the whole pipeline on real handwritten digits: pretrain, fine-tune, distil, export, verify, report."""
    return _needs_torch("mae_deploy.commands.quickstart.run").run_quickstart(config)


@command(app, PretrainConfig, recipes=True)
def pretrain(config: PretrainConfig) -> Any:
    """Pretrain a masked autoencoder on a folder of unlabelled images."""
    return _needs_torch("mae_deploy.pretrain.run").run_pretrain(config)


@command(app, FinetuneConfig, recipes=True)
def finetune(config: FinetuneConfig) -> Any:
    """Fine-tune a pretrained encoder on labelled images, or train the same network from scratch."""
    return _needs_torch("mae_deploy.pretrain.finetune").run_finetune(config)


@command(app, LinprobeConfig, recipes=True)
def linprobe(config: LinprobeConfig) -> Any:
    """Train a linear head on a frozen encoder: the paper's recipe, or on features that are computed once."""
    return _needs_torch("mae_deploy.evaluation.linprobe").run_linprobe(config)


@command(app, KnnConfig)
def knn(config: KnnConfig) -> Any:
    """Judge an encoder by the classes of an image's nearest neighbours: nothing is trained."""
    return _needs_torch("mae_deploy.evaluation.knn").run_knn(config)


@command(app, CompareConfig)
def compare(config: CompareConfig) -> Any:
    """Put several encoders side by side on the same probes: ours, bundles, timm models, random weights."""
    return _needs_torch("mae_deploy.evaluation.compare").run_compare(config)


@command(app, SweepConfig)
def sweep(config: SweepConfig) -> Any:
    """Pretrain at several mask ratios, or values of any setting, judge each, and draw the curve."""
    return _needs_torch("mae_deploy.commands.sweep.run").run_sweep(config)


@command(app, DistillConfig, recipes=True)
def distill(config: DistillConfig) -> Any:
    """Distil a pretrained or fine-tuned teacher into a smaller student."""
    return _needs_torch("mae_deploy.distill.run").run_distill(config)


@command(app, ReconstructConfig)
def reconstruct(config: ReconstructConfig) -> Any:
    """Draw original, masked and reconstructed images."""
    return _needs_torch("mae_deploy.pretrain.reconstruct").run_reconstruct(config)


@command(app, ImportConfig, name="import")
def import_(config: ImportConfig) -> Any:
    """Convert weights of the original MAE, timm, Hugging Face, mmpretrain or MAE-Lite into a checkpoint."""
    return _needs_torch("mae_deploy.commands.weights.import_weights").run_import(config)


@command(app, ExportWeightsConfig, name="export-weights")
def export_weights(config: ExportWeightsConfig) -> Any:
    """Write a checkpoint's weights as timm, transformers or the original MAE loads them, proven there."""
    return _needs_torch("mae_deploy.commands.weights.export_weights").run_export_weights(config)


@command(app, ExportConfig, recipes=True)
def export(config: ExportConfig) -> Any:
    """Export a checkpoint to a bundle whose graph is proven against PyTorch."""
    return _needs_torch("mae_deploy.export.run").run_export(config)


@command(app, BuildEngineConfig, name="build-engine")
def build_engine(config: BuildEngineConfig) -> Any:
    """Build a TensorRT engine on this machine's GPU, prove it and add it to a bundle; needs no torch."""
    from mae_deploy.commands.build_engine import run_build_engine

    return run_build_engine(config)


@command(app, VerifyConfig)
def verify(config: VerifyConfig) -> Any:
    """Prove that a bundle computes on this machine what PyTorch computed; needs no torch."""
    from mae_deploy.commands.verify import run_verify

    return run_verify(config)


@command(app, PredictConfig)
def predict(config: PredictConfig) -> Any:
    """Classify images, or write their features; needs no torch."""
    from mae_deploy.commands.predict import run_predict

    return run_predict(config)


@command(app, EvalConfig, name="eval")
def eval_(config: EvalConfig) -> Any:
    """Top-1 and top-5 of a checkpoint or a bundle on labelled images; a bundle needs no torch."""
    from mae_deploy.evaluation.evaluate import run_eval

    return run_eval(config)


@command(app, BenchmarkConfig)
def benchmark(config: BenchmarkConfig) -> Any:
    """Compare bundles, engines, numbers of patches and batch sizes on this machine, timed in turns; needs no torch."""
    from mae_deploy.commands.benchmark.run import run_benchmark

    return run_benchmark(config)


@command(app, BenchmarkTrainConfig, name="benchmark-train")
def benchmark_train(config: BenchmarkTrainConfig) -> Any:
    """Time a pretraining step against a plain one and the device's own rate, in turns."""
    return _needs_torch("mae_deploy.commands.benchmark_train.run").run_benchmark_train(config)


@command(app, ReportConfig)
def report(config: ReportConfig) -> Any:
    """Export trained classifiers in FP32 and INT8, and put top-1, operations and latency of all side by side."""
    return _needs_torch("mae_deploy.commands.report.run").run_report(config)


@command(app, InfoConfig)
def info(config: InfoConfig) -> Any:
    """Say what a run, checkpoint, weights file or bundle is, where it came from and what it may be used for."""
    from mae_deploy.commands.info import run_info

    return run_info(config)


@command(app, DoctorConfig)
def doctor(config: DoctorConfig) -> Any:
    """Say what is installed, which engines work here, and what is missing for which command."""
    from mae_deploy.commands.doctor import run_doctor

    return run_doctor(config)


@command(data, StatsConfig)
def stats(config: StatsConfig) -> Any:
    """Mean and deviation of every channel, sizes, formats, duplicates and unreadable files; needs no torch."""
    from mae_deploy.commands.data.stats import run_stats

    return run_stats(config)


@command(data, PackConfig)
def pack(config: PackConfig) -> Any:
    """Pack images into tar shards with an index, smaller and without duplicates on request; needs no torch."""
    from mae_deploy.commands.data.pack import run_pack

    return run_pack(config)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 failed, 2 usage, 3 something optional is missing, 143
    stopped by a signal.
    """
    try:
        app(args=arguments, prog_name="mae-deploy")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception as error:
        if os.environ.get("MAE_DEPLOY_DEBUG") == "1":
            traceback.print_exc()
        return _report(error)
    return 0


def _report(error: Exception) -> int:
    known = isinstance(error, MaeDeployError)
    message = " ".join(str(error).split())
    print(f"error: {message if known else f'{type(error).__name__}: {message}'}", file=sys.stderr)
    hint = error.hint if isinstance(error, MaeDeployError) else "MAE_DEPLOY_DEBUG=1 shows the traceback"
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    return error.exit_code if isinstance(error, MaeDeployError) else 1


def _needs_torch(module: str) -> Any:
    return import_optional(module, extra="train")
