"""Files whose structure was changed are read, or refused with an error of ours; `make fuzz` tries many more."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from mae_deploy.data.config import Columns
from mae_deploy.data.sources.open import unlabelled_images
from mae_deploy.errors import ConfigError
from mae_deploy.file_kinds import look_at
from tests.hostile.fuzz import TARGETS, one
from tests.hostile.structured import CHANGES


@pytest.mark.parametrize("target", CHANGES)
def test_changed_files(target: str, tmp_path: Path) -> None:
    contents = [(TARGETS[target][0], content) for content in TARGETS[target][1]()]
    assert [found for seed in range(12) if (found := one(target, seed, contents, tmp_path)) is not None] == []


def header(**fields: object) -> bytes:
    member = tarfile.TarInfo("a.png")
    for name, value in fields.items():
        setattr(member, name, value)
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    "content",
    [
        header(size=-512),  # whose next header would be itself
        header(type=tarfile.GNUTYPE_LONGNAME, size=1 << 40),
        header(type=tarfile.XHDTYPE, size=1 << 70),
        header(type=tarfile.XHDTYPE, size=17) + b"17 size=-1234567\n".ljust(512, b"\0") + header(size=1),
    ],
)
def test_tar_headers_that_lie(content: bytes, tmp_path: Path) -> None:
    """Python's tarfile reads the first for ever, and as much memory as the others say."""
    (tmp_path / "a.tar").write_bytes(header(size=512) + bytes(512) + content + bytes(1024))
    with pytest.raises(ConfigError, match="after 1 images in the middle"):
        unlabelled_images(tmp_path / "a.tar", Columns())
    assert look_at(tmp_path / "a.tar").words == "a damaged tar archive"
