"""A tag becomes a release only where everything that names its version agrees, and what describes the package beside
pyproject.toml says the same.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from mae_deploy import __version__

ROOT = Path(__file__).parents[2]
NAMES_A_VERSION = ("mae_deploy/__init__.py", "CITATION.cff", "recipe/recipe.yaml", "CHANGELOG.md", "docs/migration.md")


@pytest.fixture(scope="module")
def release() -> ModuleType:
    """`scripts/release.py`."""
    spec = importlib.util.spec_from_file_location("release", ROOT / "scripts" / "release.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    """`[project]` of pyproject.toml."""
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return found


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """What a release reads, as it is when everything is ready for 7.8.9."""
    for name in NAMES_A_VERSION:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / name)
    replace(tmp_path / "mae_deploy/__init__.py", f'"{__version__}"', '"7.8.9"')
    replace(tmp_path / "CITATION.cff", f"version: {__version__}", "version: 7.8.9")
    replace(tmp_path / "recipe/recipe.yaml", f'version: "{__version__}"', 'version: "7.8.9"')
    replace(tmp_path / "CHANGELOG.md", "## [Unreleased]", "## [7.8.9] - 2026-12-24")
    replace(tmp_path / "docs/migration.md", "## Unreleased", "## 7.8.9")
    return tmp_path


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text, (path, old)
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_notes_are_the_changelogs(release: ModuleType, sources: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert release.main(["v7.8.9"], sources) == 0
    notes = capsys.readouterr().out
    assert notes.startswith("### Added\n")
    assert "\n## " not in notes


@pytest.mark.parametrize(
    ("name", "old", "new", "words"),
    [
        ("mae_deploy/__init__.py", "7.8.9", "7.8.8", "the tag is v7.8.9, and mae_deploy.__version__ is 7.8.8"),
        ("CITATION.cff", "7.8.9", "7.8.8", "CITATION.cff has the version 7.8.8"),
        ("recipe/recipe.yaml", "7.8.9", "7.8.8", "recipe/recipe.yaml has the version 7.8.8"),
        ("CHANGELOG.md", "[7.8.9]", "[Unreleased]", "CHANGELOG.md has no section [7.8.9]"),
        ("CHANGELOG.md", "[7.8.9]", "[7.8.90]", "CHANGELOG.md has no section [7.8.9]"),
        ("docs/migration.md", "## 7.8.9", "## Unreleased", "docs/migration.md has no section 7.8.9"),
    ],
)
def test_what_does_not_agree_is_named(
    release: ModuleType, sources: Path, name: str, old: str, new: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    replace(sources / name, old, new)
    assert release.main(["v7.8.9"], sources) == 1
    assert words in capsys.readouterr().err


def test_the_recipe_of_a_release(release: ModuleType, sources: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (sources / "a-7.8.9.tar.gz").write_bytes(b"abc")
    assert (
        release.main(["v7.8.9", "--recipe", str(sources / "a-7.8.9.tar.gz"), "--url", "https://host/v7.8.9"], sources)
        == 0
    )
    source = yaml.safe_load(capsys.readouterr().out)["source"]
    assert source == {
        "url": "https://host/v7.8.9/a-7.8.9.tar.gz",
        "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    }


def test_the_recipe_is_pyprojects(project: dict[str, Any]) -> None:
    found = yaml.safe_load((ROOT / "recipe" / "recipe.yaml").read_text(encoding="utf-8"))
    assert found["context"] == {"version": __version__, "python_min": project["requires-python"].removeprefix(">=")}
    assert [line.replace(" ", "") for line in found["requirements"]["run"][1:]] == project["dependencies"]
    assert found["about"]["summary"] == project["description"]
    assert found["about"]["license"] == project["license"]
    assert found["about"]["license_file"] == project["license-files"]
    assert found["build"]["python"]["entry_points"] == [" = ".join(pair) for pair in project["scripts"].items()]


def test_the_citation_is_of_this_version() -> None:
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(found["version"]) == __version__
    assert found["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(found)


def test_the_wheel_is_tried_on_every_python_before_it_is_published(project: dict[str, Any]) -> None:
    jobs = workflow("release.yml")["jobs"]
    named = [line.rsplit(" ", 1)[1] for line in project["classifiers"] if re.search(r"Python :: 3\.\d+$", line)]
    assert jobs["try"]["strategy"]["matrix"]["python"] == named
    assert [jobs[name].get("needs") for name in ("try", "publish", "announce")] == ["build", "try", "publish"]
    # Trusted publishing: this job alone may ask for an identity, and none holds a token of a registry.
    granted = {name: job.get("permissions", {}) for name, job in jobs.items()}
    assert [name for name, rights in granted.items() if "id-token" in rights] == ["publish"]
    assert "secrets." not in (ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_what_a_workflow_or_form_names_is_there(path: Path) -> None:
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    for job in found.get("jobs", {}).values():
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)
            assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", step.get("uses", "a/b@v1")), step
            for name in re.findall(r"(?<!\S)(?:scripts|\.ci)/[\w.-]+", step.get("run", "")):
                assert (ROOT / name).is_file(), name
    for part in found.get("body", []):
        assert {"type", "id", "attributes"} <= set(part)
        assert "label" in part["attributes"]


def test_the_devcontainer_reads() -> None:
    found = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8"))
    assert found["postCreateCommand"].startswith("make install")


def workflow(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text(encoding="utf-8"))
    return found


def test_what_is_installed_by_hash_is_what_the_constraints_name() -> None:
    def pins(name: str) -> list[str]:
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        return [line.removesuffix(" \\") for line in lines if line and not line.startswith(("#", " "))]

    assert pins("requirements-hashed.txt") == pins("constraints.txt")
    assert (ROOT / "requirements-hashed.txt").read_text(encoding="utf-8").count("--hash=sha256:") > 1000
