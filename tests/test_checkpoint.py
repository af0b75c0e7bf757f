"""A checkpoint is written whole, found by any of its names, and read strictly; the licence travels."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from mae_deploy.checkpoint import (
    NON_COMMERCIAL,
    OWN_LICENCE,
    UNKNOWN_LICENCE,
    Metadata,
    find_checkpoint,
    inherited_licence,
    open_checkpoint,
    save_checkpoint,
)
from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.files import sha256

METADATA = Metadata(
    kind="classifier",
    encoder={"name": "tiny", "depth": 2},
    preprocess={"image_size": [6, 10]},
    pool="avg",
    num_classes=3,
    class_names=("ant", "bee", "cow"),
    licence="MIT",
    provenance={"stage": "finetune", "parent": {"stage": "pretrain"}},
    metrics={"top1": 0.75},
    step=17,
)
TENSORS = {"a": torch.arange(15, dtype=torch.float32).reshape(3, 5), "b.c": torch.tensor([2.5]).bfloat16()}


def saved(folder: Path) -> Path:
    save_checkpoint(folder, TENSORS, METADATA)
    return folder


def test_round_trip(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(saved(tmp_path / "checkpoint"))
    assert checkpoint.metadata == METADATA
    tensors = checkpoint.tensors()
    assert tensors.keys() == TENSORS.keys()
    assert all(
        torch.equal(tensors[name], tensor) and tensors[name].dtype == tensor.dtype for name, tensor in TENSORS.items()
    )
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint"}
    assert {path.name for path in checkpoint.path.iterdir()} == {"model.safetensors", "metadata.json"}


def test_tensors_may_be_views_and_need_gradients(tmp_path: Path) -> None:
    weight = torch.arange(6, dtype=torch.float32).reshape(2, 3).requires_grad_()
    save_checkpoint(tmp_path / "checkpoint", {"transposed": weight.T}, METADATA)
    assert torch.equal(open_checkpoint(tmp_path / "checkpoint").tensors()["transposed"], weight.detach().T)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    class Unwritable:
        def detach(self) -> Unwritable:
            raise OSError("disk full")

    bad: Any = {"a": Unwritable()}
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path / "checkpoint", bad, METADATA)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_not_overwritten(tmp_path: Path) -> None:
    saved(tmp_path / "checkpoint")
    with pytest.raises(OSError, match="checkpoint"):
        save_checkpoint(tmp_path / "checkpoint", {}, METADATA)
    assert open_checkpoint(tmp_path / "checkpoint").tensors().keys() == TENSORS.keys()


def test_every_name_of_a_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    last = saved(run / "checkpoints" / "last")
    assert find_checkpoint(last) == last
    assert find_checkpoint(last / "model.safetensors") == last
    assert find_checkpoint(run) == last
    best = saved(run / "checkpoints" / "best")
    assert find_checkpoint(run) == best, "the best one where there is one"


def test_a_run_copied_without_links(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    for step in (9, 10):
        saved(checkpoints / f"step-{step}")
    (checkpoints / "step-11").mkdir()
    assert find_checkpoint(tmp_path / "run") == checkpoints / "step-10"
    assert "has neither best nor last, which are links: taking step-10" in " ".join(capsys.readouterr().err.split())
    (checkpoints / "best").write_text("step-9", encoding="utf-8")  # as on a file system without links
    assert find_checkpoint(tmp_path / "run") == checkpoints / "step-9"


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    for path in (tmp_path, tmp_path / "model.safetensors", tmp_path / "absent"):
        assert find_checkpoint(path) is None
        with pytest.raises(ConfigError, match="no checkpoint at"):
            open_checkpoint(path)


def change_metadata(folder: Path, **values: Any) -> None:
    file = folder / "metadata.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schema_version": 2}, r"schema version 2; mae-deploy [\d.]+ reads version 1"),
        ({"schema_version": None}, "schema version None"),
        ({"kind": "detector"}, r"metadata\.kind 'detector' is not one of mae, encoder, classifier"),
        ({"colour": "red"}, r"unknown setting 'metadata\.colour'"),
        ({"step": "many"}, r"metadata\.step 'many' is not a whole number"),
    ],
)
def test_metadata_is_read_strictly(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    change_metadata(saved(tmp_path / "checkpoint"), **values)
    with pytest.raises(ConfigError, match=message):
        open_checkpoint(tmp_path / "checkpoint")


@pytest.mark.parametrize("text", ["[]", "{", ""])
def test_metadata_that_is_no_mapping(tmp_path: Path, text: str) -> None:
    (saved(tmp_path / "checkpoint") / "metadata.json").write_text(text)
    with pytest.raises(ConfigError, match=r"metadata\.json"):
        open_checkpoint(tmp_path / "checkpoint")


@pytest.mark.parametrize("size", [None, 0, 3, 40])
def test_damaged_weights(tmp_path: Path, size: int | None) -> None:
    file = saved(tmp_path / "checkpoint") / "model.safetensors"
    content = file.read_bytes()
    file.unlink()
    if size is not None:
        file.write_bytes(content[:size])
    with pytest.raises(CheckFailed, match=r"cannot read .*model\.safetensors"):
        open_checkpoint(tmp_path / "checkpoint").tensors()


@pytest.mark.parametrize("name", ["model.safetensors", "metadata.json"])
def test_a_pointer_in_the_place_of_a_file_is_said(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path / "checkpoint")
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 343279349\n")
    with pytest.raises((CheckFailed, ConfigError), match=rf"cannot read .*{name}: it is a Git LFS pointer") as caught:
        open_checkpoint(folder).tensors()
    assert caught.value.hint == "git lfs pull fetches it"


@pytest.mark.parametrize(
    ("provenance", "positions"),
    [
        ({"stage": "import", "layout": "timm", "architecture": "vit_tiny_patch16_224"}, "timm"),
        ({"stage": "import", "layout": "timm", "architecture": "flexivit_small.300ep_in1k"}, "timm-flexivit"),
        ({"stage": "import", "layout": "original or timm"}, "bicubic"),
        ({"stage": "finetune", "parent": {"layout": "timm"}}, "bicubic"),
    ],
)
def test_whose_interpolation_it_is_before_that_was_recorded(
    tmp_path: Path, provenance: dict[str, Any], positions: str
) -> None:
    save_checkpoint(tmp_path / "checkpoint", TENSORS, replace(METADATA, provenance=provenance))
    file = tmp_path / "checkpoint" / "metadata.json"
    data = json.loads(file.read_text())
    del data["positions"]
    file.write_text(json.dumps(data))
    assert open_checkpoint(tmp_path / "checkpoint").metadata.positions == positions


def test_record_for_what_is_derived(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(saved(tmp_path / "checkpoint"))
    assert checkpoint.record() == {
        "path": str(tmp_path / "checkpoint"),
        "sha256": sha256(tmp_path / "checkpoint" / "model.safetensors"),
        "kind": "classifier",
        "metrics": {"top1": 0.75},
        "stage": "finetune",
        "parent": {"stage": "pretrain"},
    }


@pytest.mark.parametrize(
    ("licences", "inherited"),
    [
        ((), OWN_LICENCE),
        ((OWN_LICENCE, OWN_LICENCE), OWN_LICENCE),
        ((OWN_LICENCE, NON_COMMERCIAL), NON_COMMERCIAL),
        ((NON_COMMERCIAL, OWN_LICENCE), NON_COMMERCIAL),
        ((UNKNOWN_LICENCE, OWN_LICENCE), UNKNOWN_LICENCE),
        # Neither may hide the other, whichever comes first.
        ((UNKNOWN_LICENCE, NON_COMMERCIAL), f"{UNKNOWN_LICENCE} AND {NON_COMMERCIAL}"),
        (("MIT", NON_COMMERCIAL), f"MIT AND {NON_COMMERCIAL}"),
        ((f"MIT AND {NON_COMMERCIAL}", NON_COMMERCIAL, "MIT"), f"MIT AND {NON_COMMERCIAL}"),
    ],
)
def test_inherited_licence(licences: tuple[str, ...], inherited: str) -> None:
    assert inherited_licence(*licences) == inherited


def test_a_full_disk_is_told_as_python_tells_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: object, **more: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        save_checkpoint(tmp_path / "checkpoint", {"a": torch.zeros(1)}, METADATA)
    assert caught.value.filename == str(tmp_path / "checkpoint")
