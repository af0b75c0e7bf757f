"""A pickled checkpoint runs nothing, in whatever form it comes; what it keeps beside the weights is passed over."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import os
import pickle
import pickletools
import sys
import tarfile
import types
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mae_deploy.errors import CheckFailed
from mae_deploy.weights.read.files import read_content
from mae_deploy.weights.read.unpickle import Hollow, read_pickle

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3)}


class Runs:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"echo run > '{self.marker}'",)


class Evaluates(Runs):
    """The same by a builtin."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return eval, (f"__import__('pathlib').Path({str(self.marker)!r}).write_text('run')",)


class GetsAttribute(Runs):
    """The same by way of getattr, whose name is allowed, and an import."""

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return getattr, (Evaluates(self.marker), "write")


class Calls(Runs):
    """The same by a function that getattr would give, called by the file."""

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        import subprocess

        return subprocess.call, (["touch", str(self.marker)],)


def nested(payload: object) -> dict[str, Any]:
    return {"model": TENSORS, "args": argparse.Namespace(deep=[{"deeper": argparse.Namespace(payload=payload)}])}


def write_zip(path: Path, payload: object) -> None:
    torch.save({"model": TENSORS, "payload": payload}, path)


def write_nested(path: Path, payload: object) -> None:
    torch.save(nested(payload), path)


def write_legacy(path: Path, payload: object) -> None:
    torch.save({"model": TENSORS, "payload": payload}, path, _use_new_zipfile_serialization=False)


def write_nested_legacy(path: Path, payload: object) -> None:
    torch.save(nested(payload), path, _use_new_zipfile_serialization=False)


def write_plain(path: Path, payload: object) -> None:
    path.write_bytes(pickle.dumps({"model": {}, "payload": payload}, protocol=2))


def write_tar(path: Path, payload: object) -> None:
    """The form of PyTorch before 0.2: pickles in a tar archive."""
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            content = pickle.dumps(payload)
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


FORMS = {
    "checkpoint.pth": write_zip,
    "nested.pth": write_nested,
    "pytorch_model.bin": write_legacy,
    "nested.bin": write_nested_legacy,
    "plain.pt": write_plain,
    "last_epoch_ckpt.pth.tar": write_tar,
}


@pytest.mark.parametrize("payload", [Runs, Evaluates, GetsAttribute, Calls])
@pytest.mark.parametrize("name", FORMS)
def test_nothing_is_run(tmp_path: Path, name: str, payload: type[Runs]) -> None:
    marker, file = tmp_path / "marker", tmp_path / name
    FORMS[name](file, payload(marker))
    with pytest.raises(CheckFailed, match=r"refused to unpickle|the tar form of early PyTorch") as caught:
        read_content(file)
    assert not marker.exists()
    assert "\n" not in str(caught.value)
    assert "safetensors" in (caught.value.hint or "")
    assert "weights_only" not in (caught.value.hint or "")


@pytest.mark.parametrize("payload", [Runs, Evaluates, GetsAttribute, Calls])
def test_the_payloads_do_run_where_nobody_refuses(tmp_path: Path, payload: type[Runs]) -> None:
    marker = tmp_path / "marker"
    with contextlib.suppress(AttributeError):  # of what the evaluation gave
        pickle.loads(pickle.dumps(payload(marker)))
    assert marker.exists()


def test_what_it_wants_to_run_is_named(tmp_path: Path) -> None:
    for payload, name in ((Runs, f"{os.name}.system"), (Evaluates, "eval"), (Calls, r"(subprocess|commands)\.call")):
        write_nested(tmp_path / "checkpoint.pth", payload(tmp_path / "marker"))
        with pytest.raises(CheckFailed, match=rf"it wants to run {name}$"):
            read_pickle(tmp_path / "checkpoint.pth")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.98])
def test_a_file_that_was_cut_off(tmp_path: Path, share: float, legacy: bool) -> None:
    file = tmp_path / "cut.pth"
    torch.save({"model": {"w": torch.zeros(5000)}}, file, _use_new_zipfile_serialization=not legacy)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckFailed, match="cut off") as caught:
        read_content(file)
    assert "copy it again" in (caught.value.hint or "")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_is_read_is_what_is_there_whatever_its_name(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"weights{suffix}"
    torch.save({"model": TENSORS}, file)
    assert torch.equal(read_content(file)["model"]["a.weight"], TENSORS["a.weight"])
    save_file(TENSORS, file)
    assert torch.equal(read_content(file)["model"]["a.weight"], TENSORS["a.weight"])


def test_a_program_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and its files are still about
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "model.pt")
    with pytest.raises(CheckFailed, match="is a TorchScript program"):
        read_content(tmp_path / "model.pt")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_numbers_of_numpy_and_paths_are_passed_over(tmp_path: Path, legacy: bool) -> None:
    content = {
        "model": TENSORS,
        "best": np.float64(83.6),
        "epoch": np.int64(3),
        "curve": np.arange(3.0),
        "names": np.array(["a", "b"]),
        "out": PurePosixPath("runs"),
        "args": argparse.Namespace(output_dir=PurePosixPath("runs"), accuracy=np.float32(0.5), input_size=32),
        "order": OrderedDict(a=1),
    }
    torch.save(content, tmp_path / "checkpoint.pth", _use_new_zipfile_serialization=not legacy)
    read = read_pickle(tmp_path / "checkpoint.pth")
    assert torch.equal(read["model"]["a.weight"], TENSORS["a.weight"])
    assert read["args"].input_size == 32
    assert all(type(read[name]) is Hollow for name in ("best", "epoch", "curve", "names", "out"))
    assert type(read["args"].accuracy) is Hollow


def test_the_curves_of_mmengine_are_passed_over_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As mmengine 0.10 writes them: a class of its own, whose methods are pickled as getattr(HistoryBuffer, 'mean').
    module = types.ModuleType("mmengine.logging.history_buffer")
    exec("class HistoryBuffer:\n    def mean(self): ...\n", module.__dict__)
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    buffer = module.HistoryBuffer()
    buffer._statistics_methods = {"mean": module.HistoryBuffer.mean}
    buffer._log_history = np.arange(3.0)
    file = tmp_path / "epoch_3.pth"
    torch.save({"state_dict": TENSORS, "message_hub": {"log_scalars": OrderedDict(loss=buffer)}}, file)
    monkeypatch.undo()
    assert "mmengine" not in sys.modules
    names = [
        str(argument)
        for _, argument, _ in pickletools.genops(torch.PyTorchFileReader(str(file)).get_record("data.pkl"))
    ]
    assert {"mmengine.logging.history_buffer HistoryBuffer", "__builtin__ getattr"} <= set(names)
    read = read_pickle(file)
    assert torch.equal(read["state_dict"]["a.weight"], TENSORS["a.weight"])
    assert type(read["message_hub"]["log_scalars"]["loss"]) is Hollow


def test_the_settings_of_training_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As Lightning and Hydra write them, whose packages are not needed to read them.
    classes = {}
    for name in ("pytorch_lightning.utilities.parsing.AttributeDict", "omegaconf.dictconfig.DictConfig"):
        folder, _, kind = name.rpartition(".")
        module = types.ModuleType(folder)
        classes[kind] = type(kind, (dict,) if kind == "AttributeDict" else (), {"__module__": folder})
        setattr(module, kind, classes[kind])
        for parent in (folder.partition(".")[0], folder.rpartition(".")[0]):
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        monkeypatch.setitem(sys.modules, folder, module)
    settings = classes["DictConfig"]()
    settings.__dict__ = {"_content": {"lr": 0.1}, "_parent": None}
    content = {
        "state_dict": TENSORS,
        "hyper_parameters": classes["AttributeDict"](lr=0.1, sizes=[1, 2]),
        "cfg": settings,
        "log": defaultdict(list, loss=[1.0]),
        "when": datetime.datetime(2024, 5, 17),
    }
    torch.save(content, tmp_path / "last.ckpt")
    monkeypatch.undo()
    read = read_pickle(tmp_path / "last.ckpt")
    assert torch.equal(read["state_dict"]["a.weight"], TENSORS["a.weight"])
    assert (read["hyper_parameters"], read["log"]) == ({"lr": 0.1, "sizes": [1, 2]}, {"loss": [1.0]})
    assert type(read["cfg"]) is type(read["when"]) is Hollow


def test_other_classes_are_refused_by_name(tmp_path: Path) -> None:
    torch.save({"model": TENSORS, "shape": types.SimpleNamespace(a=1)}, tmp_path / "checkpoint.pth")
    with pytest.raises(CheckFailed, match=r"it wants to run types\.SimpleNamespace"):
        read_pickle(tmp_path / "checkpoint.pth")


def test_what_was_allowed_for_one_file_is_not_for_the_next(tmp_path: Path) -> None:
    torch.save({"model": TENSORS, "args": argparse.Namespace(a=1)}, tmp_path / "checkpoint.pth")
    read_pickle(tmp_path / "checkpoint.pth")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "checkpoint.pth", weights_only=True)
