"""Read pickled checkpoints without running what they carry: tensors and plain values are let in, records that no tensor
depends on arrive hollow.
"""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from mae_deploy.errors import CheckFailed
from mae_deploy.file_kinds import AGAIN

_HINT = (
    "only tensors and plain values are read: ask whoever made it for a .safetensors file, or for torch.save of"
    " model.state_dict() alone"
)


class Hollow:
    """Stands for an object of a record beside the weights; it takes whatever it is given and keeps nothing."""

    def __new__(cls, *_: object, **__: object) -> Hollow:
        """An empty one, whatever it would have been made of."""
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, state: object) -> None:
        """Drop the state."""


class Plain:
    """Stands for a dictionary of another type, and gives a plain one that the file's entries go into."""

    def __new__(cls, *_: object, **__: object) -> dict[Any, Any]:  # type: ignore[misc]
        """An empty one."""
        return {}


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
    # Settings that Hydra and Lightning keep.
    *(f"omegaconf.{name}" for name in ("dictconfig.DictConfig", "listconfig.ListConfig")),
    *(f"omegaconf.base.{name}" for name in ("ContainerMetadata", "Metadata")),
    *(
        f"omegaconf.nodes.{kind}Node"
        for kind in ("Any", "Boolean", "Bytes", "Enum", "Float", "Integer", "Path", "String")
    ),
    "typing.Any",
    *(f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "str", "tuple")),
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
]
"""Their names are read, and a hollow object is put in their place: none of them is called."""

_PLAIN = [
    "collections.defaultdict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
    "yacs.config.CfgNode",
    "easydict.EasyDict",
    "addict.addict.Dict",
    "mmengine.config.config.ConfigDict",
    "mmcv.utils.config.ConfigDict",
]
"""A plain dictionary is put in their place."""


def _stand_ins() -> list[tuple[type, str]]:
    return [*((Hollow, name) for name in _HOLLOW), *((Plain, name) for name in _PLAIN)]


def read_pickle(file: Path) -> Any:
    """The content of a file of torch.save, on the CPU.

    Raises:
        CheckFailed: the file wants to run something, is of a form that only running it reads, or is damaged.
    """
    try:
        with (
            file.open("rb") as opened,  # by its name, torch takes a file called .safetensors for one
            warnings.catch_warnings(),
            torch.serialization.safe_globals([argparse.Namespace, *_stand_ins()]),
        ):
            warnings.simplefilter("ignore")  # about the protocol of bare pickles
            return torch.load(opened, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|global) ([\w.]+)", str(error))
        reason = (
            f"it wants to run {found.group(1)}"
            if found
            else "it is damaged, or holds more than tensors and plain values"
        )
        if found is None and "Unsupported operand" in str(error):
            reason += ", or was written with another pickle_protocol than torch.save's own, 2"
        raise CheckFailed(f"refused to unpickle {file}: {reason}", hint=_HINT) from error
    # a damaged file makes torch raise whatever its bytes lead to: struct.error, IndexError, AssertionError, …
    except Exception as error:
        words = " ".join(str(error).split()) or type(error).__name__
        cut = isinstance(error, EOFError) or "unexpected EOF" in words
        raise CheckFailed(
            f"{file} is cut off, or damaged" if cut else f"cannot read {file}: {words}", hint=AGAIN
        ) from error
