"""Read pickled checkpoints without running what they carry: tensors and plain values are let in, records that no tensor
depends on arrive hollow.
"""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from mae_deploy.errors import CheckFailed

_HINT = (
    "where you trust whoever made it, convert it on a machine that holds nothing of value: torch.load(FILE,"
    " weights_only=False), then safetensors.torch.save_file of its tensors"
)


class Hollow:
    """Stands for an object of a record beside the weights; it takes whatever it is given and keeps nothing."""

    def __new__(cls, *_: object, **__: object) -> Hollow:
        """An empty one, whatever it would have been made of."""
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, state: object) -> None:
        """Drop the state."""


_HOLLOW = [
    # Accuracies and losses, as NumPy scalars and arrays: timm, mmpretrain and training scripts leave them beside the
    # weights.
    *(
        f"{module}.{name}"
        for module in ("numpy.core.multiarray", "numpy._core.multiarray")
        for name in ("scalar", "_reconstruct")
    ),
    *(f"numpy.{name}" for name in ("ndarray", "dtype")),
    # mmpretrain's curve of every loss, which names its own methods by way of getattr.
    "mmengine.logging.history_buffer.HistoryBuffer",
    "builtins.getattr",
    *(f"pathlib.{name}" for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
]
"""Their names are read, and a hollow object is put in their place: none of them is called."""


def read_pickle(file: Path) -> Any:
    """The content of a file of torch.save, on the CPU.

    Raises:
        CheckFailed: the file wants to run something, is of a form that only running it reads, or is damaged.
    """
    _refuse_programs(file)
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *((Hollow, name) for name in _HOLLOW)]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|global) ([\w.]+)", str(error))
        reason = (
            f"it wants to run {found.group(1)}"
            if found
            else "it is damaged, or holds more than tensors and plain values"
        )
        raise CheckFailed(f"refused to unpickle {file}: {reason}", hint=_HINT) from error
    # a damaged file makes torch raise whatever its bytes lead to: struct.error, IndexError, AssertionError, …
    except Exception as error:
        raise CheckFailed(f"cannot read {file}: {' '.join(str(error).split())}") from error


def _refuse_programs(file: Path) -> None:
    """The two forms of torch.save and torch.jit.save that nothing but running them reads; torch would advise just
    that.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            is_script = any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        is_script = False  # no zip archive, or a damaged one: torch says how
    if is_script:
        hint = _HINT.replace("torch.load(FILE, weights_only=False)", "torch.jit.load(FILE)")
        raise CheckFailed(f"refused to read {file}: it is a TorchScript program", hint=hint)
    with file.open("rb") as content:
        is_tar = content.read(262)[257:] == b"ustar"
    if is_tar:
        raise CheckFailed(
            f"refused to unpickle {file}: it has the tar form of early PyTorch, which torch reads only by running it",
            hint=_HINT,
        )
