"""Archives of arrays (.npz) from files that nobody has looked at: nothing is unpickled, and a small file fills no
memory.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from mae_deploy.errors import reason
from mae_deploy.images.arrays import Array
from mae_deploy.text import as_size

_MOST_BYTES = 1 << 30
"""Of all arrays together, unpacked; the samples of a ViT-H have a third of that."""


def read_npz(path: Path) -> dict[str, Array]:
    """The arrays by their names.

    Raises:
        ValueError: it cannot be read, is no such archive or damaged, holds objects, or unpacks to more than 1 GiB.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())  # no more than that is unpacked
        if size > _MOST_BYTES:
            raise ValueError(f"it unpacks to {as_size(size)}, more than {as_size(_MOST_BYTES)}")
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except Exception as error:  # of any kind: what NumPy raises follows from the bytes of the header
        raise ValueError(reason(error)) from error
    if other := [name for name, array in found.items() if not isinstance(array, np.ndarray)]:
        raise ValueError(f"'{other[0]}' is no array")
    return found
