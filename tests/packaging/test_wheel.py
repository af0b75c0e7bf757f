"""The wheel and the source distribution carry every module of the four source folders, under one namespace."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAGES = ("pretrain", "distill", "export")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository's own files: a `build/` left by an earlier build would put deleted modules into the
    wheel.
    """
    copy = tmp_path_factory.mktemp("sources")
    for name in repository_files():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    return copy


@pytest.fixture(scope="module")
def wheels(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of the tree, and of the source distribution of files of another time."""
    found: list[Path] = []
    for number, options in enumerate((["--wheel"], [])):
        for file in sources.rglob("*"):
            os.utime(file, (1e9 + number, 1e9 + number), follow_symlinks=False)
        out = tmp_path_factory.mktemp("dist")
        command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), *options, str(sources)]
        environment = {**os.environ, "SOURCE_DATE_EPOCH": "1577923200"}
        built = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert built.returncode == 0, built.stderr
        found += out.glob("*.whl")
    return found


def test_wheel_holds_every_module_and_recipe(wheels: list[Path]) -> None:
    for wheel in wheels:
        packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
        assert packed == expected_files()


def test_two_builds_are_the_same_file(wheels: list[Path]) -> None:
    one, other = wheels
    assert one.read_bytes() == other.read_bytes()


def test_source_distribution_holds_the_examples(sources: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", str(tmp_path), str(sources)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    examples = {name for name in repository_files() if name.startswith("examples/")}
    assert len(examples) >= 11
    assert examples <= names


def expected_files() -> set[str]:
    """Where each source file stands in the wheel."""
    expected = set()
    for name in repository_files():
        folder = name.split("/")[0]
        if name.endswith((".py", ".yaml", ".html", "py.typed")) and folder in ("mae_deploy", *STAGES):
            expected.add(f"mae_deploy/{name}" if folder in STAGES else name)
    return expected


def repository_files() -> list[str]:
    """Files that git tracks or would track; a symlink to a folder is one of them."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return sorted({name for name in listed if name and ((ROOT / name).is_symlink() or (ROOT / name).is_file())})
