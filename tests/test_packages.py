"""Which distributions give a module, and the remedy where it does not load."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

from mae_deploy import packages
from mae_deploy.errors import MissingDependency, import_optional
from mae_deploy.packages import distributions, remedy, requirements
from tests.commands.test_doctor import write_module

INSTALL = "pip install onnxruntime"
PLAIN, GPU = "onnxruntime", "onnxruntime_gpu"

Installed = Callable[..., None]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Installed:
    """A folder for packages, in which alone distributions are looked for."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(packages, "requirements", lambda: [("onnxruntime", ">=1.19", "")])

    def write(module: str, content: str | None, **versions: str) -> None:
        write_module(tmp_path, module, content, **versions)
        here = {entry.name: entry for entry in metadata.distributions(path=[str(tmp_path)])}
        monkeypatch.setattr(packages, "_by_module", lambda: {module: list(here)})
        monkeypatch.setattr(metadata, "distribution", here.__getitem__)

    return write


def test_what_is_installed_here() -> None:
    assert distributions("sklearn") == {"scikit-learn": metadata.version("scikit-learn")}
    assert distributions("PIL") == {"pillow": metadata.version("pillow")}
    assert distributions("nothing_of_the_kind") == {}
    assert ("onnxruntime", ">=1.19", "") in requirements()
    assert ("torch", ">=2.11", "train") in requirements()


def test_what_is_installed_by_name_beside_another_onnx_runtime() -> None:
    page = (Path(__file__).parents[1] / "docs" / "bundles.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^pip install --no-deps \.\npip install (.*)$", page, re.MULTILINE)
    assert sorted([*line.split(), "onnxruntime"]) == sorted(name for name, _, extra in requirements() if not extra)


@pytest.mark.parametrize(
    ("content", "versions", "absent", "expected"),
    [
        (None, {}, True, INSTALL),
        ("", {PLAIN: "1.20.1"}, True, INSTALL),
        ("", {PLAIN: "1.20.1"}, False, "pip install --force-reinstall --no-deps 'onnxruntime>=1.19'"),
        (None, {GPU: "1.20.1"}, True, "pip install --force-reinstall --no-deps 'onnxruntime-gpu>=1.19'"),
        (
            "",
            {GPU: "1.9.0"},
            False,
            "onnxruntime-gpu 1.9.0 is installed, mae-deploy needs 1.19 or later:"
            " pip install -U 'onnxruntime-gpu>=1.19'",
        ),
        (
            "",
            {PLAIN: "1.20.1", GPU: "1.22.0"},
            False,
            "pip uninstall -y onnxruntime-gpu onnxruntime, then install one of them: pip install --force-reinstall"
            " --no-deps 'onnxruntime-gpu>=1.19'",
        ),
    ],
)
def test_the_remedy(
    installed: Installed, content: str | None, versions: dict[str, str], absent: bool, expected: str
) -> None:
    installed("onnxruntime", content, **versions)
    assert remedy("onnxruntime", INSTALL, absent=absent) == expected


def test_sources_that_are_not_installed_ask_for_no_version(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise metadata.PackageNotFoundError("mae-deploy")

    installed("onnxruntime", "", **{PLAIN: "1.9.0"})
    monkeypatch.setattr(packages, "requirements", fail)
    assert remedy("onnxruntime", INSTALL) == "pip install --force-reinstall --no-deps onnxruntime"


def test_a_folder_that_is_left_is_no_module(installed: Installed) -> None:
    installed("hollow_engine", None, hollow_engine="1.0")
    with pytest.raises(MissingDependency, match=r"of hollow_engine only a folder is left, .*hollow_engine") as caught:
        import_optional("hollow_engine", extra="train")
    assert caught.value.hint == "pip install --force-reinstall --no-deps hollow-engine"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("raise OSError('libcuda.so: no such file')", "libcuda.so: no such file"),
        ("raise ImportError", "ImportError"),
        (
            "try:\n    raise AttributeError('_ARRAY_API')\nexcept AttributeError as e:\n    raise ImportError from e",
            "_ARRAY_API",
        ),
        ("import nothing_of_the_kind", "No module named 'nothing_of_the_kind'"),
    ],
)
def test_a_package_that_fails_in_any_way_is_a_missing_dependency(installed: Installed, content: str, said: str) -> None:
    installed("failing_engine", content)
    with pytest.raises(MissingDependency, match=f"cannot be imported .*{said}") as caught:
        import_optional("failing_engine", extra="train")
    assert caught.value.hint == "pip install 'mae-deploy[train]'"


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        ("onnxruntime", "ORT_DISABLE_TELEMETRY", "1"),
        ("mlflow", "MLFLOW_DISABLE_TELEMETRY", "true"),
        ("wandb", "WANDB_ERROR_REPORTING", "false"),
    ],
)
@pytest.mark.parametrize("own", [None, "mine"])
def test_a_package_is_imported_without_its_telemetry_unless_the_user_wants_it(
    monkeypatch: pytest.MonkeyPatch, module: str, name: str, value: str, own: str | None
) -> None:
    seen: list[str | None] = []
    monkeypatch.setenv(name, "")  # so that what is set here goes with the test
    monkeypatch.delenv(name)
    if own is not None:
        monkeypatch.setenv(name, own)

    def import_module(_: str) -> ModuleType:
        seen.append(os.environ.get(name))
        return ModuleType(module)

    monkeypatch.setattr(importlib, "import_module", import_module)
    import_optional(module, extra="train")
    assert seen == [own or value]
    page = (Path(__file__).parents[1] / "docs" / "commands.md").read_text(encoding="utf-8")
    assert f"`{name}={value}`" in page
