"""Give every hostile file to every command that reads such a file, and say how each ended.

Run: python -m tests.hostile.run [--only WORD] [--command WORD] [--out hostile.json]
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx

from mae_deploy.packages import QUIET
from tests.hostile.bounded import REFUSED, Ended, complaint, run_bounded
from tests.hostile.bundles import BUNDLES
from tests.hostile.data import DATA
from tests.hostile.doors import FEATURES, KEYS, MASKS, NAMES, TABLES, private_key
from tests.hostile.folders import FOLDERS
from tests.hostile.graphs import GRAPHS
from tests.hostile.pictures import HARMLESS, PICTURES
from tests.hostile.rare_pictures import RARE_PICTURES
from tests.hostile.rare_weights import RARE_WEIGHTS
from tests.hostile.runs import RUNS
from tests.hostile.texts import NUMBERS, RECIPES
from tests.hostile.videos import VIDEOS
from tests.hostile.weights import WEIGHTS_FILES

FIXTURES = Path(__file__).parents[1] / "fixtures" / "v1"

_CPU = ("--device", "cpu")
_TRAINING = ("--epochs", 1, "--batch-size", 4, "--num-workers", 0, *_CPU)
_STUDENT = ("--student", "vit_nano_patch4", "--student-width", 8, "--student-depth", 1, "--student-heads", 2)

Arguments = tuple[object, ...]

OUT = "OUT"
"""Stands for a path in commands that write; nothing half-written may be left there."""
FILE = "FILE"
"""Stands for what is hostile."""
_CERTIFICATE = ("verify", "bundles/visible", "--certificate", OUT + ".json", "--samples", "images", "--threads", 1)
_DISTILL = (
    *("distill", "images", "--teacher", "checkpoints/mae", "--out", OUT, "--patch-size", 5),
    *(*_STUDENT, *_TRAINING),
)
_REPORT = ("--repeats", 2, "--warmup", 1, "--max-latency", 1000, "--max-drop", 99)
_EXPORT = ("export", "checkpoints/mae", "--out", OUT, "--threads", 1, "--samples", "images")

CHECKPOINT_COMMANDS: dict[str, Arguments] = {
    "info": ("info", FILE),
    "import": ("import", FILE, "--out", OUT),
    "eval": ("eval", FILE, "labelled", "--num-workers", 0, *_CPU),
    "export": ("export", FILE, "--out", OUT, "--samples", "images", "--num-samples", 4, "--threads", 1),
    "export-weights": ("export-weights", FILE, "--to", "timm", "--out", OUT),
    "knn": ("knn", "labelled", "--init", FILE, "--k", 2, "--num-workers", 0, *_CPU),
    "compare": ("compare", FILE, "--data", "labelled", "--num-workers", 0, *_CPU),
    "linprobe": ("linprobe", "labelled", "--init", FILE, "--out", OUT, *_TRAINING),
    "finetune": ("finetune", "labelled", "--init", FILE, "--out", OUT, *_TRAINING),
    "pretrain": ("pretrain", "images", "--recipe", "tiny.yaml", "--init", FILE, "--out", OUT, *_TRAINING),
    "distill": ("distill", "images", "--teacher", FILE, "--out", OUT, "--patch-size", 5, *_STUDENT, *_TRAINING),
    "reconstruct": ("reconstruct", "images", "--checkpoint", FILE, "--out", OUT + ".png", *_CPU),
    "verify": ("verify", FILE, "--graph", "bundles/full/encoder.onnx", "--samples", "images", "--threads", 1),
    "against": (*_CERTIFICATE, "--against", FILE),
    "report": ("report", FILE, "--data", "labelled", "--out", OUT, *_REPORT),
    "distill --init": (*_DISTILL, "--init", FILE),
    "pretrain --teacher": (
        *("pretrain", "images", "--recipe", "tiny.yaml", "--target", "features", "--teacher", FILE, "--out", OUT),
        *_TRAINING,
    ),
    "export --pyramid": (*_EXPORT, "--pyramid", FILE),
    "teacher weights": (
        *("distill", "images", "--teacher", "timm/vit_tiny_patch16_224", "--teacher-weights", FILE, "--out", OUT),
        *("--patch-size", 5, *_STUDENT, *_TRAINING),
    ),
}

BUNDLE_COMMANDS: dict[str, Arguments] = {
    "info": ("info", FILE),
    "verify": ("verify", FILE, "--threads", 1),
    "verify --layers": ("verify", FILE, "--layers", "--threads", 1),
    "predict": ("predict", FILE, "images", "--out", OUT + ".npz", "--threads", 1),
    "knn": ("knn", "labelled", "--init", FILE, "--k", 2, "--num-workers", 0, *_CPU),
    "compare": ("compare", FILE, "--data", "labelled", "--num-workers", 0, *_CPU),
    "eval": ("eval", FILE, "labelled", "--num-workers", 0, "--threads", 1),
    "embed": ("embed", "images", FILE, "--out", OUT, "--threads", 1),
    "certificate": ("verify", FILE, "--certificate", OUT + ".json", "--threads", 1),
    "benchmark": ("benchmark", FILE, "--repeats", 2, "--warmup", 1, "--threads", 1, "--no-probe"),
    "build-engine": ("build-engine", FILE),
    "distill": ("distill", "images", "--teacher", FILE, "--out", OUT, "--patch-size", 5, *_STUDENT, *_TRAINING),
    "against": (*_CERTIFICATE, "--against", FILE),
    "sign": ("sign", FILE, "--key", "key.pem"),
    "push": ("push", FILE, "hf://me/hostile"),
    "search": ("search", "features", "--image", "images/000.png", "--bundle", FILE),
    "stream": ("stream", "images", FILE, "--out", OUT + ".npz", "--threads", 1),
    "stream-eval": ("stream-eval", "images", FILE, "--out", OUT, "--threads", 1),
}

GRAPH_COMMANDS: dict[str, Arguments] = {
    "verify": ("verify", "checkpoints/mae", "--graph", FILE, "--samples", "images", "--threads", 1),
    "benchmark": ("benchmark", "bundles/visible", "--against", FILE, "--repeats", 2, "--threads", 1, "--no-probe"),
}

IMAGE_COMMANDS: dict[str, Arguments] = {
    "predict": ("predict", "bundles/visible", FILE, "--out", OUT + ".npz", "--threads", 1),
    "predict classes": ("predict", "bundles/full", FILE, "--threads", 1),
    "predict bands": ("predict", "bundles/bands", FILE, "--out", OUT + ".npz", "--threads", 1),
    "data stats": ("data", "stats", FILE, "--num-workers", 0),
    "data pack": ("data", "pack", FILE, OUT, "--num-workers", 0),
    "reconstruct": ("reconstruct", FILE, "--checkpoint", "checkpoints/mae", "--out", OUT + ".png", *_CPU),
    "export": ("export", "checkpoints/mae", "--out", OUT, "--samples", FILE, "--num-samples", 1, "--threads", 1),
    "benchmark": ("benchmark", "bundles/visible", "--images", FILE, "--repeats", 2, "--threads", 1, "--no-probe"),
    "stream": ("stream", FILE, "bundles/visible", "--out", OUT + ".npz", "--threads", 1),
    "search": ("search", "features", "--image", FILE),
    "verify": (
        "verify",
        "checkpoints/mae",
        "--graph",
        "bundles/visible/encoder.onnx",
        "--samples",
        FILE,
        "--threads",
        1,
    ),
    "calibration": (*_EXPORT, "--precision", "int8", "--quantization", "static", "--calib-data", FILE),
    "report": ("report", "checkpoints/classifier", "--data", "labelled", "--out", OUT, *_REPORT, "--calib-data", FILE),
}

FOLDER_COMMANDS: dict[str, Arguments] = {name: CHECKPOINT_COMMANDS[name] for name in ("info", "import", "knn")}

PICKY = ("predict bands",)
"""Commands that do not take every whole file: an image of other channels, say."""

DATA_COMMANDS: dict[str, Arguments] = {
    "data stats": ("data", "stats", FILE, "--num-workers", 0),
    "data pack": ("data", "pack", FILE, OUT, "--num-workers", 0),
    "pretrain": ("pretrain", FILE, "--recipe", "tiny.yaml", "--out", OUT, *_TRAINING),
    "finetune": ("finetune", FILE, "--init", "checkpoints/mae", "--val-share", 0.5, "--out", OUT, *_TRAINING),
    "knn": ("knn", FILE, "--init", "checkpoints/mae", "--val-share", 0.5, "--k", 2, "--num-workers", 0, *_CPU),
    "predict": ("predict", "bundles/visible", FILE, "--out", OUT + ".npz", "--threads", 1),
    "embed": ("embed", FILE, "bundles/visible", "--out", OUT, "--threads", 1),
    "linprobe": ("linprobe", FILE, "--init", "checkpoints/mae", "--val-share", 0.5, "--out", OUT, *_TRAINING),
    "eval": ("eval", "checkpoints/classifier", FILE, "--num-workers", 0, *_CPU),
    "compare": ("compare", "random", "--data", FILE, "--num-workers", 0, *_CPU),
    "report": ("report", "checkpoints/classifier", "--data", FILE, "--out", OUT, *_REPORT),
    "distill": (
        *("distill", FILE, "--teacher", "checkpoints/mae", "--out", OUT, "--patch-size", 5),
        *(*_STUDENT, *_TRAINING),
    ),
    "distill --unlabelled": (*_DISTILL, "--unlabelled", FILE),
    "sweep": ("sweep", FILE, "--mask-ratio", 0.5, "--recipe", "tiny.yaml", "--out", OUT, *_CPU),
    "sweep --labelled": (
        *("sweep", "images", "--labelled", FILE, "--mask-ratio", 0.5, "--recipe", "tiny.yaml", "--out", OUT),
        *_CPU,
    ),
    "search": ("search", "features", "--outliers", "--data", FILE, "--out", OUT),
    "drop-like": ("data", "pack", "images", OUT, "--drop-like", FILE, "--num-workers", 0),
}

RECIPE_COMMANDS: dict[str, Arguments] = {
    "pretrain": ("pretrain", "images", "--recipe", FILE, "--out", OUT, "--plan", *_CPU),
    "dump": ("finetune", "labelled", "--recipe", FILE, "--out", OUT, "--dump-config", "-"),
    "sweep": ("sweep", "images", "--mask-ratio", 0.5, "--recipe", FILE, "--out", OUT, *_CPU),
    "sweep --finetune-recipe": (
        *("sweep", "images", "--labelled", "labelled", "--mask-ratio", 0.5, "--recipe", "tiny.yaml"),
        *("--finetune-recipe", FILE, "--out", OUT, *_CPU),
    ),
    "compare --finetune-recipe": (
        *("compare", "checkpoints/mae", "--data", "labelled", "--at-latency", 1000, "--finetune-recipe", FILE),
        *("--num-workers", 0, *_CPU),
    ),
}

KEY_COMMANDS: dict[str, Arguments] = {
    "sign": ("sign", "bundles/visible", "--key", FILE),
    "verify": ("verify", "signed", "--signature", FILE, "--threads", 1),
    "serve": ("serve", "bundles/visible", "--api-keys", FILE, "--host", "192.0.2.1"),
}
"""The address is none of any machine's (RFC 5737): `serve` ends with it, once it has read the keys."""

NAMES_COMMANDS: dict[str, Arguments] = {
    "import": ("import", "checkpoints/classifier", "--class-names", FILE, "--out", OUT)
}

MASK_COMMANDS: dict[str, Arguments] = {
    "predict": ("predict", "bundles/visible", "images", "--keep-mask", FILE, "--out", OUT + ".npz", "--threads", 1)
}

TABLE_COMMANDS: dict[str, Arguments] = {"drop-like": DATA_COMMANDS["drop-like"]}

FEATURES_COMMANDS: dict[str, Arguments] = {
    "search": ("search", FILE, "--image", "images/000.png"),
    "outliers": ("search", FILE, "--outliers", "--duplicates", "--k", 2, "--out", OUT),
    "embed again": ("embed", "images", "bundles/visible", "--out", FILE, "--threads", 1),
}

RUN_COMMANDS: dict[str, Arguments] = {
    "resume": ("pretrain", FILE, "--resume"),
    "info": ("info", FILE),
    "finetune": ("finetune", "labelled", "--init", FILE, "--out", OUT, *_TRAINING),
}

VIDEO_COMMANDS: dict[str, Arguments] = {
    "stream": ("stream", FILE, "bundles/visible", "--out", OUT + ".npz", "--threads", 1, "--max-frames", 20),
    "stream-eval": ("stream-eval", FILE, "bundles/visible", "--out", OUT, "--threads", 1, "--max-frames", 20),
}

NUMBER_COMMANDS: dict[str, Arguments] = {
    **{
        f"predict {option}": ("predict", "bundles/visible", "images", "--threads", 1, f"{option}={FILE}")
        for option in ("--batch-size", "--top-k", "--keep", "--num-keep", "--max-pixels", "--threads", "--seed")
    },
    **{
        f"pretrain {option}": (
            "pretrain",
            "images",
            "--recipe",
            "tiny.yaml",
            "--out",
            OUT,
            "--plan",
            *_TRAINING,
            f"{option}={FILE}",
        )
        for option in (
            "--lr",
            "--epochs",
            "--batch-size",
            "--mask-ratio",
            "--image-size",
            "--num-workers",
            "--warmup-epochs",
            "--mean",
            "--crop-pct",
            "--max-corrupt",
        )
    },
    "benchmark --repeats": ("benchmark", "bundles/visible", "--threads", 1, "--no-probe", f"--repeats={FILE}"),
    "export --batch": (*_EXPORT, f"--batch={FILE}"),
    "export --tokens": (*_EXPORT, f"--tokens=visible:{FILE}"),
    "export --profile": (*_EXPORT, f"--profile=B:{FILE}"),
    "knn --k": ("knn", "labelled", "--init", "checkpoints/mae", "--num-workers", 0, *_CPU, f"--k={FILE}"),
    "stream --every": ("stream", "images", "bundles/visible", "--threads", 1, f"--every={FILE}"),
}

Write = Callable[[Path], Path | str]
"""Writes a hostile file into a folder; returns what a command is given."""


@dataclass(frozen=True)
class Corpus:
    """Hostile files of a kind, and the commands that read such files."""

    files: Mapping[str, Write]
    commands: Mapping[str, Arguments]


def _checkpoint(write: Callable[[Path, Path], None]) -> Write:
    def make(folder: Path) -> Path:
        checkpoint = Path(shutil.copytree(FIXTURES / "checkpoints/mae", folder / "checkpoint"))
        write(checkpoint, folder / "CANARY")
        # What has no metadata is given by its file, as it is where it came from elsewhere.
        return checkpoint if (checkpoint / "metadata.json").exists() else next(iter(checkpoint.iterdir()))

    return make


def _bundle(write: Callable[[Path], object]) -> Write:
    def make(folder: Path) -> Path:
        for name, outside in (("encoder.onnx", "outside.onnx"), ("golden.npz", "outside.npz")):
            shutil.copyfile(FIXTURES / "bundles/visible" / name, folder / outside)
        (folder / "outside.data").write_bytes(bytes(1 << 16))
        bundle = Path(shutil.copytree(FIXTURES / "bundles/visible", folder / "bundle"))
        write(bundle)
        return bundle

    return make


def _other_graph(edit: Callable[[onnx.ModelProto], object]) -> Write:
    def make(folder: Path) -> Path:
        model = onnx.load(FIXTURES / "bundles/visible/encoder.onnx")
        edit(model)
        (folder / "other.onnx").write_bytes(model.SerializeToString())
        return folder / "other.onnx"

    return make


def _run(write: Callable[[Path], object]) -> Write:
    def make(folder: Path) -> Path:
        run = Path(shutil.copytree(FIXTURES / "runs/pretrain", folder / "run", symlinks=True))
        write(run)
        return run

    return make


def _recipe(content: bytes) -> Write:
    def make(folder: Path) -> Path:
        path = folder / "recipe.yaml"
        path.write_bytes(
            content.replace(b"RECIPE", os.fsencode(path)).replace(b"CANARY", os.fsencode(folder / "CANARY"))
        )
        return path

    return make


def _number(text: str) -> Write:
    return lambda _: text


CORPORA: dict[str, Corpus] = {
    "checkpoint": Corpus(
        {name: _checkpoint(write) for name, write in {**WEIGHTS_FILES, **RARE_WEIGHTS}.items()}, CHECKPOINT_COMMANDS
    ),
    "bundle": Corpus({name: _bundle(write) for name, write in BUNDLES.items()}, BUNDLE_COMMANDS),
    "folder": Corpus(FOLDERS, FOLDER_COMMANDS),
    "graph": Corpus({name: _other_graph(edit) for name, edit in GRAPHS.items()}, GRAPH_COMMANDS),
    "image": Corpus({**PICTURES, **RARE_PICTURES}, IMAGE_COMMANDS),
    "data": Corpus(DATA, DATA_COMMANDS),
    "recipe": Corpus({name: _recipe(content) for name, content in RECIPES.items()}, RECIPE_COMMANDS),
    "run": Corpus({name: _run(write) for name, write in RUNS.items()}, RUN_COMMANDS),
    "video": Corpus(VIDEOS, VIDEO_COMMANDS),
    "key": Corpus(KEYS, KEY_COMMANDS),
    "names": Corpus(NAMES, NAMES_COMMANDS),
    "mask": Corpus(MASKS, MASK_COMMANDS),
    "table": Corpus(TABLES, TABLE_COMMANDS),
    "features": Corpus(FEATURES, FEATURES_COMMANDS),
    "number": Corpus({f"{text[:20]!r}": _number(text) for text in NUMBERS}, NUMBER_COMMANDS),
}


@dataclass(frozen=True)
class Case:
    """A hostile file, a command, and how it ended."""

    kind: str
    name: str
    command: str
    complaint: str | None
    ended: Ended


def run_case(kind: str, name: str, command: str, scratch: Path, work: Path, inputs: Path = FIXTURES) -> Case:
    """Write the file, run the command, and look at what it said and left.

    Args:
        scratch: a folder that is not there yet, and is not there afterwards.
        work: a copy of the inputs, which is made again where a command changed them.
    """
    corpus = CORPORA[kind]
    own = scratch / "own"
    own.mkdir(parents=True)
    try:
        given = corpus.files[name](scratch)
        out = scratch / "out"
        words = [str(word).replace(OUT, str(out)).replace(FILE, str(given)) for word in corpus.commands[command]]
        before = set(scratch.rglob("*")) if kind != "data" else set(scratch.iterdir())
        ended = run_bounded(words, own, work)
        found = complaint(ended, (0,) if name.startswith(HARMLESS) and command not in PICKY else (0, *REFUSED))
        # A run that found no image keeps the list of those that it could not read.
        left = [
            path.name for path in scratch.iterdir() if path not in before and not (path / "unreadable.txt").is_file()
        ]
        if (scratch / "CANARY").exists() or list(work.rglob("CANARY")):
            found = "RAN what the file carries"
        elif ended.code and left:
            found = found or f"left {', '.join(left)}"
        return Case(kind, name, command, found, ended)
    finally:
        if _listing(work) != _listing(inputs):
            shutil.rmtree(work)
            shutil.copytree(inputs, work, symlinks=True)
        for module in (own / "modules").read_text().split() if (own / "modules").is_file() else ():
            with suppress(Exception):  # what only parts of a package may import
                importlib.import_module(module)  # here, for those that are forked after it
        shutil.rmtree(scratch)


def _listing(folder: Path) -> set[tuple[str, int, int]]:
    """Path, size and time of change of every file below a folder."""
    found = set()
    for place, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(place, name)
            state = os.lstat(path)
            found.add((os.path.relpath(path, folder), state.st_size, state.st_mtime_ns))
    return found


def cases(kinds: str = "", only: str = "", commands: str = "") -> Iterator[tuple[str, str, str]]:
    """Kind, file and command of all, or of those with these words in them."""
    for kind, corpus in CORPORA.items():
        for command, name in product(corpus.commands, corpus.files):
            if kinds in kind and only in name and (not commands or command in commands.split(",")):
                yield kind, name, command


def write_inputs(folder: Path) -> Path:
    """The fixtures, a key, a signed bundle, and features of the images."""
    shutil.copytree(FIXTURES, folder, symlinks=True)
    shutil.copytree(folder / "bundles/visible", folder / "signed")
    (folder / "key.pem").write_bytes(private_key())
    for command in (
        ("sign", "signed", "--key", "key.pem"),
        ("embed", "images", "bundles/visible", "--out", "features", "--threads", 1),
    ):
        with TemporaryDirectory() as own:
            ended = run_bounded(command, Path(own), folder)
            assert ended.code == 0, ended.err
    return folder


def prepare() -> None:
    """Import what commands import, once for all that are forked from here."""
    os.environ.update(QUIET["onnxruntime"])
    for module in _MODULES:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # a fork that looks at these objects would copy their memory


_MODULES = (
    *(
        "accelerate",
        "av",
        "matplotlib.pyplot",
        "onnx",
        "onnxruntime",
        "pyarrow.parquet",
        "tifffile",
        "timm",
        "torch",
        "yaml",
    ),
    *("webdataset", "PIL.Image"),
    *(
        f"mae_deploy.{name}"
        for name in (
            "cli",
            "commands.benchmark.run",
            "commands.data.pack",
            "commands.data.stats",
            "commands.info",
            "commands.predict",
            "commands.stream.run",
            "commands.stream_eval.run",
            "commands.sweep.run",
            "commands.weights.export_weights",
            "commands.weights.import_weights",
            "distill.run",
            "evaluation.compare",
            "evaluation.evaluate",
            "evaluation.knn",
            "evaluation.linprobe",
            "export.run",
            "pretrain.finetune",
            "pretrain.reconstruct",
            "pretrain.run",
        )
    ),
)


def main() -> int:
    """Returns 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", default="", help="those of this kind only")
    parser.add_argument("--only", default="", help="files with this in their names only")
    parser.add_argument("--command", default="", help="these commands only, separated by commas")
    parser.add_argument("--out", type=Path, help="write what was found as JSON")
    parser.add_argument("--show", action="store_true", help="show what is well, too")
    given = parser.parse_args()
    prepare()
    found: list[Case] = []
    with TemporaryDirectory() as folder:
        inputs = write_inputs(Path(folder) / "inputs")
        os.chdir(inputs)
        os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # where nobody is
        work = Path(shutil.copytree(inputs, Path(folder) / "work", symlinks=True))
        for kind, name, command in cases(given.kind, given.only, given.command):
            case = run_case(kind, name, command, Path(folder) / "case", work, inputs)
            found.append(case)
            if case.complaint or given.show:
                print(f"{kind} | {name} | {command} | {case.complaint} | {_words(case.ended)}", flush=True)
    wrong = sum(case.complaint is not None for case in found)
    for kind, number in Counter(case.kind for case in found).items():
        of_kind = [case for case in found if case.kind == kind]
        codes = Counter(case.ended.code for case in of_kind)
        print(
            f"{kind}: {number} of {len({case.name for case in of_kind})} files,"
            f" {sum(case.complaint is not None for case in of_kind)} wrong; exit codes {dict(sorted(codes.items()))};"
            f" at most {max(case.ended.seconds for case in of_kind):.1f} s,"
            f" {max(case.ended.bytes for case in of_kind) >> 20} MiB"
        )
    if given.out:
        given.out.write_text(json.dumps([asdict(case) for case in found], indent=1) + "\n", encoding="utf-8")
    return int(wrong > 0)


def _words(ended: Ended) -> str:
    lines = ended.err.strip().splitlines()
    error = next((line for line in lines if line.startswith("error")), " ".join(lines[-1:]))
    return f"{ended.code}, {ended.seconds:.1f} s, {ended.bytes >> 20} MiB: {error[:250]}"


if __name__ == "__main__":
    sys.exit(main())
