"""Triton repositories, read back from the protobuf text that a server would read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from mae_deploy.config import to_dict
from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.serving.triton import LABELS, QUEUE_DELAY, largest_batch, model_folder, write_triton
from tests.runtime.tensorrt.planned_bundle import PLAN, plan_of, planned
from tests.runtime.tiny_bundle import CLASS_NAMES, CLASSES, D, H, N, W, write_bundle

TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "uint8": "TYPE_UINT8"}

Message = dict[str, list[Any]]


def parse(text: str) -> Message:
    """Protobuf's text format as far as it is used: every field a list of its values."""
    return fields(iter(re.findall(r'"(?:[^"\\]|\\.)*"|[{}\[\]:,]|[^\s{}\[\]:,]+', text)))


def fields(tokens: Iterator[str]) -> Message:
    found: Message = {}
    for name in tokens:
        if name == "}":
            break
        assert re.fullmatch(r"[a-z_]+", name), name
        mark = next(tokens)
        assert mark in "{:", (name, mark)
        found.setdefault(name, []).extend([fields(tokens)] if mark == "{" else values(tokens))
    return found


def values(tokens: Iterator[str]) -> list[Any]:
    first = next(tokens)
    if first != "[":
        return [value(first)]
    return [value(token) for token in iter(lambda: next(tokens), "]") if token != ","]


def value(token: str) -> Any:
    if re.fullmatch(r"TYPE_\w+|KIND_\w+", token):
        return token
    assert not re.match(r'"(TYPE|KIND)_', token), "an enumerator has no quotes"
    return json.loads(token)


def config_of(model: Path) -> Message:
    return parse((model / "config.pbtxt").read_text(encoding="utf-8"))


def tensors(messages: list[Message]) -> dict[str, tuple[str, list[int]]]:
    return {message["name"][0]: (message["data_type"][0], message["dims"]) for message in messages}


def by_key(messages: list[Message]) -> dict[str, Message]:
    return {message["key"][0]: message["value"][0] for message in messages}


# --- inputs and outputs
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", ["float32", "float16", "uint8"])
@pytest.mark.parametrize("batch", [None, 3])
@pytest.mark.parametrize(
    ("mode", "keep"), [("full", None), ("visible", None), ("visible", 4), ("ragged", 8), ("reconstruct", None)]
)
def test_tensors_of_the_graph(tmp_path: Path, mode: str, keep: int | None, batch: int | None, images: str) -> None:
    outputs = ("pixels",) if mode == "reconstruct" else ("cls", "tokens", "logits")
    features = "float16" if images == "float16" else "float32"
    path = write_bundle(
        tmp_path / "tiny", token_mode=mode, keep=keep, batch=batch, images=images, features=features, outputs=outputs
    )
    model = write_triton(Bundle.load(path), tmp_path / "models")
    config = config_of(model)
    rows = [] if batch is None else [batch]
    patches = N if mode == "full" else keep or -1
    wanted = {"images": (TYPES[images], [*rows, *((H, W, 3) if images == "uint8" else (3, H, W))])}
    if mode != "full":
        wanted["ids_keep"] = ("TYPE_INT64", [*rows, patches])
    if mode == "ragged":
        wanted["num_keep"] = ("TYPE_INT64", rows or [1])
    results = {"cls": [D], "tokens": [patches, D], "logits": [CLASSES], "pixels": [N, 12]}
    assert model == tmp_path / "models" / "tiny"
    assert config["name"] == ["tiny"]
    assert config["backend"] == ["onnxruntime"]
    assert config["max_batch_size"] == [0 if batch else 32]
    assert tensors(config["input"]) == wanted
    assert tensors(config["output"]) == {name: (TYPES[features], [*rows, *results[name]]) for name in outputs}
    assert [message["name"] for message in config["input"] if "reshape" in message] == (
        [["num_keep"]] if mode == "ragged" and batch is None else []
    )


def test_a_number_for_each_image_is_reshaped(tmp_path: Path) -> None:
    model = write_triton(Bundle.load(write_bundle(tmp_path / "ragged", token_mode="ragged")), tmp_path / "models")
    (reshape,) = config_of(model)["input"][2]["reshape"]
    assert reshape == {"shape": []}, "dims [1] for the client, (B,) for the graph"


@pytest.mark.parametrize(
    ("tensorrt", "dtype", "wanted"), [("8.6.0", np.int32, "TYPE_INT32"), ("10.3.0", np.int64, "TYPE_INT64")]
)
def test_integers_are_what_tensorrt_binds(tmp_path: Path, tensorrt: str, dtype: type, wanted: str) -> None:
    bundle = planned(tmp_path / "tiny", token_mode="visible", keep=4, entry={"tensorrt": tensorrt})
    model = write_triton(bundle, tmp_path / "models", plan_of(bundle))
    config = config_of(model)
    assert tensors(config["input"])["ids_keep"] == (wanted, [4])
    assert by_key(config["model_warmup"][0]["inputs"])["ids_keep"]["data_type"] == [wanted]
    assert np.fromfile(model / "warmup" / "ids_keep-8-4", dtype).tolist() == [0, 1, 2, 3]


def test_labels(tmp_path: Path) -> None:
    model = write_triton(Bundle.load(write_bundle(tmp_path / "tiny", token_mode="full")), tmp_path / "models")
    assert {message["name"][0]: message.get("label_filename") for message in config_of(model)["output"]}["logits"] == [
        LABELS
    ]
    assert (model / LABELS).read_text().splitlines() == CLASS_NAMES
    probs = write_triton(Bundle.load(write_bundle(tmp_path / "probs", outputs=("probs",))), tmp_path / "models")
    assert config_of(probs)["output"][0]["label_filename"] == [LABELS]
    assert (probs / LABELS).read_text().splitlines() == CLASS_NAMES
    headless = write_triton(Bundle.load(write_bundle(tmp_path / "features", outputs=("cls",))), tmp_path / "models")
    assert not (headless / LABELS).exists()
    assert "label" not in (headless / "config.pbtxt").read_text()


def test_text_is_escaped_and_preprocessing_is_told(tmp_path: Path) -> None:
    licence = 'a "b" \\ c\nd: {é'
    bundle = Bundle.load(write_bundle(tmp_path / "tiny", change=lambda manifest: manifest.update(licence=licence)))
    parameters = by_key(config_of(write_triton(bundle, tmp_path / "models"))["parameters"])
    assert parameters["licence"] == {"string_value": [licence]}
    assert json.loads(parameters["preprocess"]["string_value"][0]) == to_dict(bundle.preprocess)


# --- instances, batches, CUDA graphs
# -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "kind"), [("fp32", "KIND_AUTO"), ("fp16", "KIND_AUTO"), ("bf16", "KIND_CPU"), ("int8", "KIND_CPU")]
)
def test_where_a_graph_runs(tmp_path: Path, precision: str, kind: str) -> None:
    config = config_of(
        write_triton(Bundle.load(write_bundle(tmp_path / "tiny", precision=precision)), tmp_path / "models")
    )
    assert config["instance_group"] == [{"count": [1], "kind": [kind]}]
    assert config["dynamic_batching"] == [{"max_queue_delay_microseconds": [QUEUE_DELAY]}]
    assert "optimization" not in config


def test_a_plan_with_two_profiles(tmp_path: Path) -> None:
    profiles = [{"B": [1, 1, 4], "K": [2, 4, 21]}, {"B": [1, 16, 24], "K": [2, 5, 21]}]
    bundle = planned(tmp_path / "tiny", token_mode="visible", entry={"profiles": profiles})
    model = write_triton(bundle, tmp_path / "models", plan_of(bundle))
    config = config_of(model)
    assert (model / "1" / "model.plan").read_bytes() == PLAN
    assert sorted(path.name for path in (model / "1").iterdir()) == ["model.plan"]
    assert config["backend"] == ["tensorrt"]
    assert config["instance_group"] == [{"count": [1], "kind": ["KIND_GPU"], "profile": ["0", "1"]}]
    assert config["max_batch_size"] == [24]
    assert config["dynamic_batching"] == [
        {"preferred_batch_size": [16, 24], "max_queue_delay_microseconds": [QUEUE_DELAY]}
    ]
    (cuda,) = config["optimization"][0]["cuda"]
    assert cuda["graphs"] == [True]
    graphs = [
        (spec["batch_size"][0], {name: shape["dim"] for name, shape in by_key(spec["input"]).items()})
        for spec in cuda["graph_spec"]
    ]
    assert graphs == [(batch, {"images": [3, H, W], "ids_keep": [keep]}) for batch, keep in [(1, 4), (1, 5), (16, 5)]]
    warmups = [
        (warmup["batch_size"][0], by_key(warmup["inputs"])["ids_keep"]["dims"]) for warmup in config["model_warmup"]
    ]
    assert warmups == [(1, [4]), (16, [5])]


def test_a_plan_of_a_fixed_batch(tmp_path: Path) -> None:
    bundle = planned(tmp_path / "tiny", token_mode="visible", batch=3, keep=4)
    model = write_triton(bundle, tmp_path / "models", plan_of(bundle))
    config = config_of(model)
    assert config["max_batch_size"] == [0]
    assert "dynamic_batching" not in config
    (spec,) = config["optimization"][0]["cuda"][0]["graph_spec"]
    assert spec["batch_size"] == [0]
    assert {name: shape["dim"] for name, shape in by_key(spec["input"]).items()} == {
        "images": [3, 3, H, W],
        "ids_keep": [3, 4],
    }
    (warmup,) = config["model_warmup"]
    assert warmup["batch_size"] == [1]
    assert by_key(warmup["inputs"])["ids_keep"]["dims"] == [3, 4]
    assert np.fromfile(model / "warmup" / "ids_keep-3-4", np.int64).tolist() == [0, 1, 2, 3] * 3


def test_a_plan_that_takes_no_single_image_gets_whole_batches(tmp_path: Path) -> None:
    bundle = planned(
        tmp_path / "tiny", token_mode="visible", keep=4, entry={"profiles": [{"B": [2, 4, 8], "K": [4, 4, 4]}]}
    )
    config = config_of(write_triton(bundle, tmp_path / "models", plan_of(bundle)))
    assert config["max_batch_size"] == [0]
    assert tensors(config["input"])["images"] == ("TYPE_FP32", [-1, 3, H, W])
    assert by_key(config["optimization"][0]["cuda"][0]["graph_spec"][0]["input"])["ids_keep"] == {"dim": [4, 4]}


@pytest.mark.parametrize(
    ("profiles", "said"),
    [
        (
            [{"B": [1, 1, 1], "K": [4, 4, 4]}, {"B": [8, 32, 64], "K": [1, 4, 21]}],
            "max_batch_size is 0, for no profile takes a batch of 1 at every number of patches; one from 1 to 64 would",
        ),
        (
            [{"B": [1, 1, 1], "K": [1, 4, 21]}, {"B": [8, 32, 64], "K": [1, 4, 21]}],
            "max_batch_size is 1, for no profile takes a batch of 2 at every number of patches; one from 1 to 64 would",
        ),
        ([{"B": [1, 32, 64], "K": [1, 4, 21]}], None),
        ([{"B": [1, 1, 1], "K": [1, 4, 21]}], None),
    ],
)
def test_profiles_that_keep_requests_apart_are_named(
    tmp_path: Path, profiles: Any, said: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = planned(tmp_path / "tiny", token_mode="visible", entry={"profiles": profiles})
    write_triton(bundle, tmp_path / "models", plan_of(bundle))
    shown = capsys.readouterr().err
    assert said in " ".join(shown.split()) if said is not None else shown == ""


def test_a_graph_of_any_batch_is_batched_whatever_its_profile(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "tiny", change=lambda manifest: manifest["profile"].update(B=[2, 4, 8]))
    assert config_of(write_triton(Bundle.load(path), tmp_path / "models"))["max_batch_size"] == [8]


def test_ragged_batches_have_no_cuda_graph(tmp_path: Path) -> None:
    for batch in (None, 2):
        bundle = planned(tmp_path / f"tiny{batch}", token_mode="ragged", keep=8, batch=batch)
        model = write_triton(bundle, tmp_path / "models", plan_of(bundle))
        assert ("optimization" in config_of(model)) == (batch == 2)
        assert np.fromfile(next((model / "warmup").glob("num_keep*")), np.int64).tolist() == [8] * (batch or 1)


@pytest.mark.parametrize(
    ("profiles", "largest"),
    [
        ([{"B": [1, 8, 32]}], 32),
        ([{"B": [2, 8, 32]}], 0),
        ([{"B": [1, 1, 1]}, {"B": [8, 32, 64]}], 1),
        ([{"B": [2, 32, 64]}, {"B": [1, 1, 1]}], 64),
        ([{"B": [1, 1, 1], "K": [4, 4, 4]}, {"B": [8, 32, 64], "K": [2, 4, 9]}], 0),
        ([{"B": [1, 1, 5], "K": [4, 4, 4]}, {"B": [1, 8, 9], "K": [2, 4, 9]}], 9),
        ([{"B": [1, 1, 5], "K": [4, 4, 4]}, {"B": [1, 2, 3], "K": [7, 8, 9]}], 3),
    ],
)
def test_batches_that_every_profile_can_take(profiles: list[dict[str, list[int]]], largest: int) -> None:
    assert largest_batch(profiles) == largest


# --- files
# -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("external", [None, "encoder.onnx.data"])
def test_the_graph_is_whole(tmp_path: Path, external: str | None) -> None:
    bundle = Bundle.load(write_bundle(tmp_path / "tiny", external=external))
    model = write_triton(bundle, tmp_path / "models") / "1" / "model.onnx"
    assert model.is_dir() == (external is not None), "a graph with weights beside it is a folder of that name"
    assert onnx.load(model if external is None else model / "model.onnx") == onnx.load(bundle.graph())


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    bundle = Bundle.load(write_bundle(tmp_path / "tiny"))
    model = write_triton(bundle, tmp_path / "models")
    before = sorted(model.rglob("*"))
    with pytest.raises(ConfigError, match=re.escape(f"--triton {model} already exists")) as raised:
        write_triton(bundle, tmp_path / "models")
    assert "--triton" in str(raised.value.hint)
    assert sorted(model.rglob("*")) == before
    assert model_folder(tmp_path / "other", tmp_path / "models") == tmp_path / "models" / "other"


@pytest.mark.parametrize("planned_one", [False, True])
def test_a_changed_file_is_not_served(tmp_path: Path, planned_one: bool) -> None:
    bundle = planned(tmp_path / "tiny")
    entry = plan_of(bundle) if planned_one else None
    changed = bundle.path / (entry["file"] if entry else "encoder.onnx")
    changed.write_bytes(changed.read_bytes() + b"\x00")
    with pytest.raises(CheckFailed, match="is not the file that was exported"):
        write_triton(bundle, tmp_path / "models", entry)
    assert list((tmp_path / "models").iterdir()) == []


def test_what_triton_cannot_run(tmp_path: Path) -> None:
    stripped = planned(tmp_path / "stripped", entry={"stripped": True})
    with pytest.raises(ConfigError, match="without its weights"):
        write_triton(stripped, tmp_path / "models", plan_of(stripped))
    strong = Bundle.load(
        write_bundle(tmp_path / "strong", precision="bf16", change=lambda manifest: manifest.update(typing="strong"))
    )
    with pytest.raises(ConfigError, match="ONNX Runtime does not compute in BF16"):
        write_triton(strong, tmp_path / "models")
    assert not (tmp_path / "models").exists()
