"""The `mae-deploy` command: one short function a command; the work and its imports are elsewhere."""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mae_deploy import __version__
from mae_deploy.completion import COMPLETIONS
from mae_deploy.errors import import_optional, report_error, reporting_threads
from mae_deploy.help_page import Group
from mae_deploy.interrupts import Interrupted, interruptible
from mae_deploy.options import command as register

if TYPE_CHECKING:  # settings are imported for the command that is called
    from mae_deploy.commands.benchmark.config import BenchmarkConfig
    from mae_deploy.commands.benchmark_train.config import BenchmarkTrainConfig
    from mae_deploy.commands.config import (
        BuildEngineConfig,
        DoctorConfig,
        InfoConfig,
        PredictConfig,
        PushConfig,
        SchemaConfig,
        SignConfig,
        VerifyConfig,
    )
    from mae_deploy.commands.data.config import PackConfig, StatsConfig
    from mae_deploy.commands.embed.config import EmbedConfig
    from mae_deploy.commands.quickstart.config import QuickstartConfig
    from mae_deploy.commands.report.config import ReportConfig
    from mae_deploy.commands.search.config import SearchConfig
    from mae_deploy.commands.serve.config import ServeConfig
    from mae_deploy.commands.stream.config import StreamCommandConfig
    from mae_deploy.commands.stream_eval.config import StreamEvalConfig
    from mae_deploy.commands.sweep.config import SweepConfig
    from mae_deploy.commands.weights.config import ExportWeightsConfig, ImportConfig
    from mae_deploy.distill.config import DistillConfig
    from mae_deploy.evaluation.config import CompareConfig, EvalConfig, KnnConfig, LinprobeConfig
    from mae_deploy.export.config import ExportConfig
    from mae_deploy.pretrain.config import FinetuneConfig, PretrainConfig, ReconstructConfig

START, TRAIN, EVALUATE, DEPLOY = "Start", "Train", "Evaluate", "Export and deploy"
DATA, WEIGHTS = "Data", "Weights"

command = functools.partial(register, completions=COMPLETIONS)


class _Commands(Group):
    panels = (START, TRAIN, EVALUATE, DEPLOY, DATA, WEIGHTS)
    last = "mae-deploy COMMAND --help explains a command. New here? mae-deploy quickstart"


app = typer.Typer(
    name="mae-deploy",
    cls=_Commands,
    help="From a folder of unlabelled images to a vision backbone on an edge device.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


data = typer.Typer(
    name="data",
    cls=Group,
    help="Look at a data set, or pack it into shards.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(data)


@command(app, "mae_deploy.commands.quickstart.config:QuickstartConfig", panel=START)
def quickstart(config: QuickstartConfig) -> Any:
    """Try the whole pipeline on handwritten digits.

    Pretrain, fine-tune, distil, export, verify and report, on real images, in minutes.
    """
    return _needs_torch("mae_deploy.commands.quickstart.run").run_quickstart(config)


@command(app, "mae_deploy.commands.config:DoctorConfig", panel=START)
def doctor(config: DoctorConfig) -> Any:
    """Show what is installed and which engines work here.

    For each command, it says what is missing and how to install it.
    """
    return import_module("mae_deploy.commands.doctor").run_doctor(config)


@command(app, "mae_deploy.commands.config:InfoConfig", panel=START)
def info(config: InfoConfig) -> Any:
    """Describe a run, checkpoint, weights file or bundle.

    What it is, where it came from and what it may be used for.
    """
    return import_module("mae_deploy.commands.info").run_info(config)


@command(app, "mae_deploy.commands.config:SchemaConfig", panel=START)
def schema(config: SchemaConfig) -> Any:
    """Print the JSON Schema of a command's settings.

    With it, an editor completes and checks recipes.
    """
    return import_module("mae_deploy.commands.schema").run_schema(config)


@command(app, "mae_deploy.pretrain.config:PretrainConfig", panel=TRAIN, recipes=True)
def pretrain(config: PretrainConfig) -> Any:
    """Pretrain a masked autoencoder on unlabelled images."""
    return _trained(_needs_torch("mae_deploy.pretrain.run").run_pretrain(config))


@command(app, "mae_deploy.pretrain.config:FinetuneConfig", panel=TRAIN, recipes=True)
def finetune(config: FinetuneConfig) -> Any:
    """Fine-tune an encoder on labelled images.

    With --from-scratch, the same network is trained from random weights, as a baseline.
    """
    return _trained(_needs_torch("mae_deploy.pretrain.finetune").run_finetune(config))


@command(app, "mae_deploy.distill.config:DistillConfig", panel=TRAIN, recipes=True)
def distill(config: DistillConfig) -> Any:
    """Distil a teacher into a smaller student.

    The teacher is a pretrained or fine-tuned encoder, of this project or another.
    """
    return _trained(_needs_torch("mae_deploy.distill.run").run_distill(config))


@command(app, "mae_deploy.commands.sweep.config:SweepConfig", panel=TRAIN)
def sweep(config: SweepConfig) -> Any:
    """Pretrain at several values of a setting and compare.

    Each value is evaluated by k-NN, a linear probe and fine-tuning, and the curve is drawn.
    """
    return _needs_torch("mae_deploy.commands.sweep.run").run_sweep(config)


@command(app, "mae_deploy.pretrain.config:ReconstructConfig", panel=EVALUATE)
def reconstruct(config: ReconstructConfig) -> Any:
    """Draw original, masked and reconstructed images."""
    return _needs_torch("mae_deploy.pretrain.reconstruct").run_reconstruct(config)


@command(app, "mae_deploy.evaluation.config:LinprobeConfig", panel=EVALUATE, recipes=True)
def linprobe(config: LinprobeConfig) -> Any:
    """Train a linear head on a frozen encoder.

    With the paper's recipe, or on features that are computed once.
    """
    return _trained(_needs_torch("mae_deploy.evaluation.linprobe").run_linprobe(config))


@command(app, "mae_deploy.evaluation.config:KnnConfig", panel=EVALUATE)
def knn(config: KnnConfig) -> Any:
    """Classify by nearest neighbours; nothing is trained.

    Top-1 of an encoder's features: each validation image is classified by its nearest training images.
    """
    return _needs_torch("mae_deploy.evaluation.knn").run_knn(config)


@command(app, "mae_deploy.evaluation.config:CompareConfig", panel=EVALUATE)
def compare(config: CompareConfig) -> Any:
    """Compare encoders by k-NN and a linear probe.

    Side by side, also at equal latency: checkpoints, bundles, timm models, random weights.
    """
    if config.at_latency is not None:
        return _needs_torch("mae_deploy.commands.compare.run").run_compare_at_latency(config)
    return _needs_torch("mae_deploy.evaluation.compare").run_compare(config)


@command(app, "mae_deploy.evaluation.config:EvalConfig", name="eval", panel=EVALUATE)
def eval_(config: EvalConfig) -> Any:
    """Measure top-1 and top-5 of a checkpoint or bundle.

    A bundle needs no PyTorch.
    """
    return import_module("mae_deploy.evaluation.evaluate").run_eval(config)


@command(app, "mae_deploy.commands.report.config:ReportConfig", panel=EVALUATE)
def report(config: ReportConfig) -> Any:
    """Compare classifiers in FP32 and INT8.

    Exports each of them in both, and puts top-1, parameters, operations and latency side by side.
    """
    return _needs_torch("mae_deploy.commands.report.run").run_report(config)


@command(app, "mae_deploy.export.config:ExportConfig", panel=DEPLOY, recipes=True)
def export(config: ExportConfig) -> Any:
    """Export a checkpoint to a bundle for deployment.

    The graph is checked against PyTorch before the bundle is written.
    """
    return _needs_torch("mae_deploy.export.run").run_export(config)


@command(app, "mae_deploy.commands.config:BuildEngineConfig", name="build-engine", panel=DEPLOY)
def build_engine(config: BuildEngineConfig) -> Any:
    """Build a TensorRT engine for this machine's GPU.

    The engine is checked and added to the bundle. Needs no PyTorch.
    """
    return import_module("mae_deploy.commands.build_engine").run_build_engine(config)


@command(app, "mae_deploy.commands.config:VerifyConfig", panel=DEPLOY)
def verify(config: VerifyConfig) -> Any:
    """Check that a bundle is right on this machine.

    Its outputs are compared with those that PyTorch computed at export. Needs no PyTorch.
    """
    return import_module("mae_deploy.commands.verify").run_verify(config)


@command(app, "mae_deploy.commands.config:PredictConfig", panel=DEPLOY)
def predict(config: PredictConfig) -> Any:
    """Classify images, or write their features.

    Needs no PyTorch.
    """
    return import_module("mae_deploy.commands.predict").run_predict(config)


@command(app, "mae_deploy.commands.embed.config:EmbedConfig", panel=DEPLOY)
def embed(config: EmbedConfig) -> Any:
    """Write the features of a whole collection.

    In shards of Parquet, each image once whatever is killed on the way; on one machine or a cluster. Needs no PyTorch.
    """
    return import_module("mae_deploy.commands.embed.run").run_embed(config)


@command(app, "mae_deploy.commands.search.config:SearchConfig", panel=DATA)
def search(config: SearchConfig) -> Any:
    """Find neighbours, duplicates and outliers by features.

    Among what embed has written, with pictures and tables. Needs no PyTorch.
    """
    return import_module("mae_deploy.commands.search.run").run_search(config)


@command(app, "mae_deploy.commands.stream.config:StreamCommandConfig", panel=DEPLOY)
def stream(config: StreamCommandConfig) -> Any:
    """Follow a camera or a video, computing what changed.

    Several are computed in one batch. Features to a file, labels as they change, a report. Needs no PyTorch.
    """
    return import_module("mae_deploy.commands.stream.run").run_stream(config)


@command(app, "mae_deploy.commands.serve.config:ServeConfig", panel=DEPLOY)
def serve(config: ServeConfig) -> Any:
    """Serve bundles over HTTP, with a page to try them.

    Requests are computed in batches; a bundle that fails verify never serves. Needs no PyTorch.
    """
    from mae_deploy.commands.serve.run import run_serve

    return run_serve(config)


@command(app, "mae_deploy.commands.config:SignConfig", panel=DEPLOY)
def sign(config: SignConfig) -> Any:
    """Sign a bundle with your private key.

    verify --signature then tells whether anything in it was changed. Needs no PyTorch.
    """
    from mae_deploy.commands.sign import run_sign

    return run_sign(config)


@command(app, "mae_deploy.commands.config:PushConfig", panel=DEPLOY)
def push(config: PushConfig) -> Any:
    """Share a bundle on a model hub.

    With a model card; anybody may then use hf://ORG/NAME in the place of a bundle. Needs no PyTorch.
    """
    return import_module("mae_deploy.commands.push").run_push(config)


@command(app, "mae_deploy.commands.benchmark.config:BenchmarkConfig", panel=DEPLOY)
def benchmark(config: BenchmarkConfig) -> Any:
    """Measure latency, memory and accuracy of bundles.

    Bundles, engines, numbers of patches and batch sizes, timed in turns. Needs no PyTorch.
    """
    return import_module("mae_deploy.commands.benchmark.run").run_benchmark(config)


@command(app, "mae_deploy.commands.stream_eval.config:StreamEvalConfig", name="stream-eval", panel=EVALUATE)
def stream_eval(config: StreamEvalConfig) -> Any:
    """Measure what a stream is worth on your videos.

    Beside what else its cost would buy: old features, every n-th frame, changed patches. Needs no PyTorch.
    """
    return import_module("mae_deploy.commands.stream_eval.run").run_stream_eval(config)


@command(data, "mae_deploy.commands.data.config:StatsConfig", panel=DATA)
def stats(config: StatsConfig) -> Any:
    """Report mean, deviation, sizes and duplicates.

    Of every channel, and formats and unreadable files too. Needs no PyTorch.
    """
    return import_module("mae_deploy.commands.data.stats").run_stats(config)


@command(data, "mae_deploy.commands.data.config:PackConfig", panel=DATA)
def pack(config: PackConfig) -> Any:
    """Pack images into tar shards with an index.

    On request smaller and without duplicates. Needs no PyTorch.
    """
    return import_module("mae_deploy.commands.data.pack").run_pack(config)


@command(app, "mae_deploy.commands.weights.config:ImportConfig", name="import", panel=WEIGHTS)
def import_(config: ImportConfig) -> Any:
    """Convert weights of another library to a checkpoint.

    From the original MAE, timm, Hugging Face, mmpretrain or MAE-Lite.
    """
    return _needs_torch("mae_deploy.commands.weights.import_weights").run_import(config)


@command(app, "mae_deploy.commands.weights.config:ExportWeightsConfig", name="export-weights", panel=WEIGHTS)
def export_weights(config: ExportWeightsConfig) -> Any:
    """Convert a checkpoint for timm or transformers.

    Or for the original MAE; the result is loaded there and compared.
    """
    return _needs_torch("mae_deploy.commands.weights.export_weights").run_export_weights(config)


@command(app, "mae_deploy.commands.benchmark_train.config:BenchmarkTrainConfig", name="benchmark-train", panel=TRAIN)
def benchmark_train(config: BenchmarkTrainConfig) -> Any:
    """Time a pretraining step.

    In turns with a plain one and the device's own rate of matrix products.
    """
    return _needs_torch("mae_deploy.commands.benchmark_train.run").run_benchmark_train(config)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 failed, 2 usage, 3 something optional is missing, 130
    Ctrl-C, 129 the end of the terminal, 143 SIGTERM, or a training run that any signal stopped.
    """
    try:
        with interruptible(), reporting_threads():
            app(args=arguments, prog_name="mae-deploy")
    except Interrupted as stop:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {stop}", file=sys.stderr)
        return stop.exit_code
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception as error:
        if os.environ.get("MAE_DEPLOY_DEBUG") == "1":
            traceback.print_exc()
        return report_error(error)
    return 0


def _trained(found: Any) -> Any:
    from mae_deploy.reporting.runs import run_result

    return run_result(found)


def _needs_torch(module: str) -> Any:
    import_optional("torch", extra="train")  # first: it is the package whose absence says most
    return import_optional(module, extra="train")
