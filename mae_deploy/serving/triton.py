"""A model repository for Triton Inference Server from a bundle: its ONNX graph, or a TensorRT plan that was built from
it.

https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/model_configuration.html
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from mae_deploy.config import to_dict
from mae_deploy.errors import ConfigError
from mae_deploy.files import atomic_path, refuse_to_overwrite
from mae_deploy.images.read import Array
from mae_deploy.progress import notice
from mae_deploy.runtime.bundle import Bundle, external_data
from mae_deploy.runtime.manifest import CLASS_OUTPUTS, IDS_KEEP, IMAGES, NUM_KEEP, EngineEntry, TensorEntry

QUEUE_DELAY = 100
"""Microseconds for which a request waits for others to be batched with."""

LABELS = "labels.txt"

_TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "uint8": "TYPE_UINT8",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
}

_ANY_DEVICE = ("fp32", "fp16")
"""Precisions whose graphs ONNX Runtime computes on GPUs as it does on CPUs, where they were checked."""


def write_triton(bundle: Bundle, repository: Path, engine: EngineEntry | None = None) -> Path:
    """Write a model into a Triton repository, named as the bundle's folder; returns the model's folder.

    Args:
        engine: the plan to serve, one of the bundle's; None serves the ONNX graph on ONNX Runtime.

    Raises:
        ConfigError: a model of this name is there, or Triton cannot run it.
        CheckFailed: a file of the bundle is not the one that was exported.
    """
    model = model_folder(bundle.path, repository)
    if reason := reason_against_triton(bundle, engine):
        raise ConfigError(f"Triton cannot serve {bundle.path}: {reason}")
    with atomic_path(model) as aside:
        (aside / "1").mkdir(parents=True)
        served = _Served(bundle, engine)
        _copy_model(bundle, engine, aside / "1")
        (aside / "config.pbtxt").write_text(_text(served.config(model.name)), encoding="utf-8")
        if served.labels:
            (aside / LABELS).write_text(
                "".join(f"{' '.join(name.split())}\n" for name in served.labels), encoding="utf-8"
            )
        for name, values in served.warmup_files().items():
            (aside / "warmup").mkdir(exist_ok=True)
            (aside / "warmup" / name).write_bytes(values.tobytes())
    most = max(profile["B"][2] for profile in served.profiles)
    if engine is not None and bundle.fixed_batch is None and served.max_batch_size < most:
        notice(
            "Triton:",
            f"max_batch_size is {served.max_batch_size}, for no profile takes a batch of {served.max_batch_size + 1} at"
            f" every number of patches; one from 1 to {most} would let it put {most} requests together",
        )
    return model


def model_folder(bundle: Path, repository: Path) -> Path:
    """Where a bundle's model goes in a repository.

    Raises:
        ConfigError: something is there.
    """
    folder = repository / bundle.resolve().name
    refuse_to_overwrite(folder, option="--triton")
    return folder


def reason_against_triton(bundle: Bundle, engine: EngineEntry | None) -> str | None:
    """Why Triton cannot run a bundle's plan or, without one, its graph; None if it can."""
    if bundle.token_mode == "cached":
        return "it does not keep what a stream remembers; export with --tokens visible"
    if engine is not None:
        return f"{engine['file']} was built without its weights" if engine["stripped"] else None
    if (bundle.precision, bundle.manifest["typing"]) == ("bf16", "strong"):
        return "ONNX Runtime does not compute in BF16, and there is no TensorRT engine"
    return None


@dataclass(frozen=True)
class _Served:
    """What a server is told of a bundle's plan or graph."""

    bundle: Bundle
    engine: EngineEntry | None

    @property
    def profiles(self) -> Sequence[Mapping[str, Sequence[int]]]:
        return [self.bundle.manifest["profile"]] if self.engine is None else self.engine["profiles"]

    @property
    def max_batch_size(self) -> int:
        """The largest batch that requests are put together to; 0: requests are batches, as the graph takes them."""
        if self.bundle.fixed_batch is not None:
            return 0
        # A graph of any batch takes the small ones too, and with 0 Triton would make batches of 4 all the same.
        return largest_batch(self.profiles) if self.engine is not None else self.bundle.manifest["profile"]["B"][2]

    @property
    def labels(self) -> list[str] | None:
        return self.bundle.class_names if self.bundle.class_output is not None else None

    def config(self, name: str) -> dict[str, Any]:
        """`config.pbtxt` as a mapping."""
        outputs = [self._tensor(entry) for entry in self.bundle.manifest["graph"]["outputs"]]
        if self.labels:
            for output in outputs:
                if output["name"] in CLASS_OUTPUTS:
                    output["label_filename"] = LABELS
        return {
            "name": name,
            "backend": "onnxruntime" if self.engine is None else "tensorrt",
            "max_batch_size": self.max_batch_size,
            "input": [self._tensor(entry) for entry in self.bundle.inputs],
            "output": outputs,
            "instance_group": [self._instances()],
            **self._batching(),
            **self._cuda_graphs(),
            "model_warmup": [self._warmup(sizes) for sizes in self._usual_sizes()],
            "parameters": [
                {"key": "preprocess", "value": {"string_value": json.dumps(to_dict(self.bundle.preprocess))}},
                {"key": "licence", "value": {"string_value": self.bundle.licence}},
            ],
        }

    def warmup_files(self) -> dict[str, Array]:
        """What the token inputs of the warm-up requests hold: the first K patches."""
        files: dict[str, Array] = {}
        for sizes in self._usual_sizes() if self.bundle.token_mode != "full" else ():
            rows = 1 if self.max_batch_size else sizes["B"]
            for entry in self.bundle.inputs:
                values = {IDS_KEEP: np.arange(sizes["K"]), NUM_KEEP: np.array([sizes["K"]])}.get(entry["name"])
                if values is not None:
                    files[_warmup_file(entry["name"], sizes)] = np.tile(values, rows).astype(self._dtype(entry))
        return files

    def _tensor(self, entry: TensorEntry) -> dict[str, Any]:
        dims = [-1 if isinstance(size, str) else size for size in self._shape(entry)]
        # Triton refuses an empty shape: each request gives one number, which the graph takes as (B,).
        return {
            "name": entry["name"],
            "data_type": self._type(entry),
            "dims": dims or [1],
            **({} if dims else {"reshape": {"shape": []}}),
        }

    def _shape(self, entry: TensorEntry) -> list[int | str]:
        """Without the batch where Triton makes batches."""
        return entry["shape"][1 if self.max_batch_size else 0 :]

    def _sized(self, entry: TensorEntry, sizes: Mapping[str, int]) -> list[int]:
        return [sizes[size] if isinstance(size, str) else size for size in self._shape(entry)]

    def _dtype(self, entry: TensorEntry) -> str:
        old = self.engine is not None and int(self.engine["tensorrt"].partition(".")[0]) < 10
        return "int32" if old and entry["dtype"] == "int64" else entry["dtype"]  # TensorRT 8 has no INT64

    def _type(self, entry: TensorEntry) -> _Word:
        return _Word(_TYPES[self._dtype(entry)])

    def _instances(self) -> dict[str, Any]:
        if self.engine is None:
            return {"count": 1, "kind": _Word("KIND_AUTO" if self.bundle.precision in _ANY_DEVICE else "KIND_CPU")}
        return {"count": 1, "kind": _Word("KIND_GPU"), "profile": [str(index) for index in range(len(self.profiles))]}

    def _batching(self) -> dict[str, Any]:
        if self.max_batch_size <= 1:
            return {}
        delay = {"max_queue_delay_microseconds": QUEUE_DELAY}
        if self.engine is None:
            return {"dynamic_batching": delay}
        # TensorRT chose its kernels for the usual size of each profile; Triton's guide advises against preferred sizes
        # elsewhere. 1 would end all waiting.
        usual = {min(profile["B"][1], self.max_batch_size) for profile in self.profiles}
        return {"dynamic_batching": {"preferred_batch_size": sorted({*usual, self.max_batch_size} - {1}), **delay}}

    def _usual_sizes(self) -> list[dict[str, int]]:
        """Each profile's usual B and K; B at most what Triton batches."""
        most = self.max_batch_size
        usual = [{name: numbers[1] for name, numbers in profile.items()} for profile in self.profiles]
        return _each_once([{**sizes, "B": min(sizes["B"], most) if most else sizes["B"]} for sizes in usual])

    def _cuda_graphs(self) -> dict[str, Any]:
        # A reshaped input (num_keep) has one shape in the request and another in the engine: which of them finds a
        # graph is not documented.
        if self.engine is None or (self.bundle.token_mode == "ragged" and self.max_batch_size):
            return {}
        usual = self._usual_sizes()
        alone = [{**sizes, "B": 1} for sizes in usual] if self.max_batch_size else []
        specs = [self._graph_spec(sizes) for sizes in _each_once(alone + usual) if self._is_taken(sizes)]
        return {"optimization": {"cuda": {"graphs": True, "graph_spec": specs}}}

    def _is_taken(self, sizes: Mapping[str, int]) -> bool:
        return any(
            all(profile[name][0] <= size <= profile[name][2] for name, size in sizes.items())
            for profile in self.profiles
        )

    def _graph_spec(self, sizes: Mapping[str, int]) -> dict[str, Any]:
        inputs = [{"key": entry["name"], "value": {"dim": self._sized(entry, sizes)}} for entry in self.bundle.inputs]
        return {"batch_size": sizes["B"] if self.max_batch_size else 0, "input": inputs}

    def _warmup(self, sizes: Mapping[str, int]) -> dict[str, Any]:
        inputs = []
        for entry in self.bundle.inputs:
            data = (
                {"random_data": True}
                if entry["name"] == IMAGES
                else {"input_data_file": _warmup_file(entry["name"], sizes)}
            )
            inputs.append(
                {
                    "key": entry["name"],
                    "value": {"data_type": self._type(entry), "dims": self._sized(entry, sizes) or [1], **data},
                }
            )
        name = " ".join(f"{name}={size}" for name, size in sizes.items())
        return {"name": name, "batch_size": sizes["B"] if self.max_batch_size else 1, "inputs": inputs}


def largest_batch(profiles: Sequence[Mapping[str, Sequence[int]]]) -> int:
    """The largest M such that every batch from 1 to M is taken, whatever the number of patches; 0: not even 1 is.

    Triton batches requests as they come: a batch size that falls between two profiles would be an error at run time.
    """
    keeps = {K for profile in profiles for K in range(profile.get("K", [0])[0], profile.get("K", [0])[-1] + 1)}
    return min(
        _reach([profile["B"] for profile in profiles if "K" not in profile or profile["K"][0] <= K <= profile["K"][2]])
        for K in keeps
    )


def _reach(ranges: Sequence[Sequence[int]]) -> int:
    reached = 0
    for least, _, most in sorted(map(tuple, ranges)):
        if least <= reached + 1:
            reached = max(reached, most)
    return reached


def _each_once(sizes: list[dict[str, int]]) -> list[dict[str, int]]:
    return list({tuple(size.items()): size for size in sizes}.values())


def _warmup_file(name: str, sizes: Mapping[str, int]) -> str:
    return f"{name}-{sizes['B']}-{sizes['K']}"


def _copy_model(bundle: Bundle, engine: EngineEntry | None, version: Path) -> None:
    if engine is not None:
        shutil.copyfile(bundle.file(engine["file"]), version / "model.plan")
        return
    graph = bundle.graph()
    locations = external_data(graph)
    target = version / "model.onnx"
    if locations:  # a model of several files is a folder of the name that one file would have
        target.mkdir()
        target /= "model.onnx"
    shutil.copyfile(graph, target)
    for location in locations:
        copy = target.parent / location
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.file(str(PurePosixPath(bundle.manifest["graph"]["file"]).parent / location)), copy)


class _Word(str):
    """An enumerator: written without quotes."""


def _text(message: Mapping[str, Any], indent: str = "") -> str:
    """A message in protobuf's text format."""
    lines = []
    for name, value in message.items():
        for item in value if isinstance(value, list) and value and isinstance(value[0], Mapping) else [value]:
            if isinstance(item, Mapping):
                lines.append(f"{indent}{name} {{\n{_text(item, indent + '  ')}{indent}}}\n")
            else:
                lines.append(f"{indent}{name}: {_value(item)}\n")
    return "".join(lines)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, _Word) else json.dumps(value, ensure_ascii=False)
