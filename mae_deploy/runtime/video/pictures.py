"""Image files as the frames of a source, in the order of the numbers in their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mae_deploy.errors import CheckFailed
from mae_deploy.images.find import find_images
from mae_deploy.images.read import UnreadableImage
from mae_deploy.progress import notice
from mae_deploy.runtime.video.counts import Counts


class Pictures:
    """Image files one after the other."""

    def __init__(self, source: str, read: Callable[[Path], Any], counts: Counts) -> None:
        """Find them.

        Raises:
            ConfigError: there is none.
        """
        self.name, self._read, self._counts = source, read, counts
        self.paths = sorted(find_images(Path(source)), key=_by_number)

    def frames(self) -> Iterator[tuple[Any, None, tuple[str, ...]]]:
        """Each image; one that cannot be read is left out, counted and said.

        Raises:
            CheckFailed: none of them can be read.
        """
        skipped: tuple[str, ...] = ()
        size: tuple[int, int] | None = None
        for path in self.paths:
            try:
                image = self._read(path)
            except UnreadableImage as error:
                notice("skipped", str(error))
                self._counts.corrupt += 1
                skipped += (f"skipped {error}",)
                continue
            found = image.size if hasattr(image, "getbands") else image.shape[1::-1]
            self._counts.resized += size not in (None, found)
            size = found
            yield image, None, skipped
            skipped = ()
        if size is None:
            raise CheckFailed(f"none of the {len(self.paths)} images in {self.name} can be read")

    def close(self) -> None:
        """Nothing is open."""


def _by_number(path: Path) -> list[tuple[int, str]]:
    """`frame-10` behind `frame-9`."""
    parts = re.split(r"(\d+)", str(path))
    return [(int(part) if part.isdecimal() else 0, part) for part in parts]
