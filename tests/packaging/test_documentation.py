"""What the documentation shows works: its programs run, its command lines parse, its settings load, and no command is
left out.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from mae_deploy import cli
from mae_deploy.cli import main
from mae_deploy.config import to_yaml
from mae_deploy.files import write_text
from mae_deploy.models.config import EncoderConfig
from mae_deploy.pretrain.config import PretrainConfig
from mae_deploy.recipe import RUN_CONFIG
from mae_deploy.runtime import Backbone
from tests.data.image_folders import write_noise
from tests.export.tiny_exports import write_checkpoint
from tests.models.tiny_models import tiny_encoder
from tests.runtime.tiny_bundle import CLASS_NAMES, D, N, write_bundle

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
OPTIONS: dict[str, list[str]] = json.loads((ROOT / "tests" / "command_options.json").read_text())

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")


def blocks(page: Path, language: str) -> list[str]:
    return [text for found, text in FENCE.findall(page.read_text(encoding="utf-8")) if found == language]


def inline_code(page: Path) -> list[str]:
    return INLINE.findall(FENCE.sub("", page.read_text(encoding="utf-8")))


def command_lines(page: Path) -> list[list[str]]:
    """The arguments of every `mae-deploy …`, and of `… -m mae_deploy …`, in a page's shell blocks."""
    found = []
    for line in "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        words = words[: words.index(">")] if ">" in words else words
        for program in ("mae-deploy", "mae_deploy"):
            if program in words:
                found.append(words[words.index(program) + 1 :])
    return found


def command_in(words: list[str]) -> str:
    """The command that a line begins with: one word, or two for a command of a group."""
    pair = " ".join(words[:2])
    return pair if pair in OPTIONS else words[0]


# What measured the results needs bundles of a ViT-B, and minutes: it is not run here.
PROGRAMS = [(page, text) for page in PAGES if page.parent.name != "results" for text in blocks(page, "python")]
COMMANDS = [(page, line) for page in PAGES for line in command_lines(page)]
RECIPES = [(page, text) for page in PAGES for text in blocks(page, "yaml")]


def identity(value: object) -> str:
    return value.name if isinstance(value, Path) else " ".join(value)[:60] if isinstance(value, list) else ""


def test_something_was_found() -> None:
    assert {page.relative_to(ROOT).as_posix() for page, _ in PROGRAMS} == {
        "README.md",
        "docs/bundles.md",
        "docs/guide/serve.md",
        "docs/guide/streams.md",
        "docs/guide/verify.md",
        "docs/jetson.md",
        "docs/start.md",
        "docs/streams.md",
        "docs/workers.md",
    }
    assert {line[0] for _, line in COMMANDS} >= {
        "pretrain",
        "finetune",
        "distill",
        "reconstruct",
        "import",
        "export",
        "verify",
        "predict",
        "info",
        "doctor",
    }
    assert len(RECIPES) >= 1


def test_the_readme_is_short_and_its_badges_are_true() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
    versions = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)
    assert f"/python-{versions[0]}_to_{versions[-1]}-" in text
    assert 'license = "Apache-2.0"' in project
    assert "/licence-Apache--2.0-" in text
    assert re.search(r"^strict = true$", project.partition("[tool.mypy]")[2], re.MULTILINE)
    assert "/types-mypy_strict-" in text


# --- programs --------------------------------------------------------------------------------------------------------


GIVEN = {"image": np.zeros((17, 13, 3), np.uint8), "frames": np.zeros((3, 40, 40, 3), np.uint8)}
"""What programs of the documentation have already."""


@pytest.fixture(scope="session")
def streams(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of `--tokens cached`, of a network for images of 32 pixels."""
    folder = tmp_path_factory.mktemp("streams")
    encoder = tiny_encoder(EncoderConfig(name="vit_nano_patch4", image_size=(32, 32)))
    checkpoint = write_checkpoint(folder / "checkpoint", encoder, licence="own")
    assert main(["export", str(checkpoint), "--out", str(folder / "cached"), "--tokens", "cached"]) == 0
    return folder / "cached"


@pytest.fixture
def bundles(tmp_path: Path, streams: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundles and photos that the documentation speaks of, in the current folder."""
    monkeypatch.chdir(tmp_path)
    write_noise(Path("photos"), 2)
    write_bundle(Path("bundles/visible"))
    write_bundle(Path("bundles/classifier"), token_mode="full")
    shutil.copytree(streams, "bundles/cached")


@pytest.mark.usefixtures("bundles")
@pytest.mark.parametrize(("page", "program"), PROGRAMS, ids=identity)
def test_programs_run(page: Path, program: str) -> None:
    exec(compile(program, str(page), "exec"), GIVEN.copy())


@pytest.mark.usefixtures("bundles")
def test_what_the_readmes_program_prints(capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = blocks(ROOT / "README.md", "python")
    assert len([line for line in program.splitlines() if line.strip()]) < 10
    exec(compile(program, "README.md", "exec"), {})
    assert capsys.readouterr().out == f"(1, {D}) (1, {N}, {D})\n(1, {D}) (1, 4, {D})\n"


@pytest.mark.usefixtures("bundles")
def test_what_the_classifiers_program_prints(capsys: pytest.CaptureFixture[str]) -> None:
    program = blocks(ROOT / "docs" / "bundles.md", "python")[0]
    exec(compile(program, "bundles.md", "exec"), GIVEN.copy())
    assert re.fullmatch(rf"\[\d+\] {re.escape(str(CLASS_NAMES))}\n", capsys.readouterr().out)


@pytest.mark.usefixtures("bundles")
def test_what_the_programs_with_workers_answer() -> None:
    server, pool, data_set = blocks(ROOT / "docs" / "workers.md", "python")
    photos = sorted(Path("photos").iterdir())
    with Backbone.load("bundles/classifier") as backbone:
        expected = [backbone(Image.open(photo)) for photo in photos]
    classes = [int(features.logits.argmax()) for features in expected]
    Path("pool.py").write_text(pool.replace("*.jpg", "*"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "pool.py"], capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines() == [f"{photo} {answer}" for photo, answer in zip(photos, classes, strict=True)], (
        done.stderr
    )
    names: dict[str, Any] = {}
    exec(compile(server, "app.py", "exec"), names)
    for photo, answer in zip(photos, classes, strict=True):
        request = {"wsgi.input": io.BytesIO(photo.read_bytes())}
        assert names["app"](request, lambda status, _: None) == [str(answer).encode()]
    exec(compile(data_set, "data.py", "exec"), names)
    loaded = torch.utils.data.DataLoader(names["Embedded"]("bundles/classifier", photos), num_workers=1)
    for row, features in zip(loaded, expected, strict=True):
        np.testing.assert_allclose(row, features.pooled, atol=1e-5)


# --- command lines ---------------------------------------------------------------------------------------------------


class AnyFunction:
    """A module whose every function is this one."""

    def __init__(self, function: Callable[[Any], None]) -> None:
        self.function = function

    def __getattr__(self, name: str) -> Callable[[Any], None]:
        return self.function


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What each command was asked to do; nothing is done, but `verify`, which runs for real."""
    asked: list[Any] = []
    monkeypatch.setattr(cli, "_needs_torch", lambda _: AnyFunction(asked.append))
    monkeypatch.setattr(cli, "_trained", lambda found: found)
    monkeypatch.setattr("mae_deploy.flags.local", Path)  # no model hub is asked
    monkeypatch.setattr("mae_deploy.commands.verify.check_signature", lambda *_: None)  # nothing there is signed
    monkeypatch.setattr("mae_deploy.commands.verify._certified", lambda *given: given[-1])
    for module, function in (
        ("commands.verify", "_other_graph"),
        ("commands.predict", "run_predict"),
        ("commands.embed.run", "run_embed"),
        ("commands.search.run", "run_search"),
        ("commands.push", "run_push"),
        ("commands.sign", "run_sign"),
        ("commands.benchmark.run", "run_benchmark"),
        ("commands.info", "run_info"),
        ("commands.doctor", "run_doctor"),
        ("commands.build_engine", "run_build_engine"),
        ("commands.data.stats", "run_stats"),
        ("commands.data.pack", "run_pack"),
        ("commands.stream.run", "run_stream"),
        ("commands.stream_eval.run", "run_stream_eval"),
        ("commands.serve.run", "run_serve"),
        ("evaluation.evaluate", "run_eval"),
    ):
        monkeypatch.setattr(f"mae_deploy.{module}.{function}", lambda config, *_: asked.append(config))
    return asked


@pytest.mark.usefixtures("bundles")
@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=identity)
def test_command_lines_are_understood(
    page: Path, line: list[str], configs: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    if line[0] == "verify" and "--graph" not in line and not Path(line[1]).exists():
        write_bundle(Path(line[1]))
    if line[1:2] == ["--resume"]:
        write_text(Path(line[2]) / RUN_CONFIG, to_yaml(PretrainConfig(data="photos", out=Path(line[2]))))
    assert main(line) == 0, capsys.readouterr().err
    assert len(configs) == (0 if line[0] in ("verify", "schema") and "--graph" not in line else 1)
    if "--dump-config" in OPTIONS[command_in(line)]:
        capsys.readouterr()
        assert main([*line, "--dump-config", "-"]) == 0
        settings = yaml.safe_load(capsys.readouterr().out)
        assert settings["out"] == line[line.index("--resume" if line[1:2] == ["--resume"] else "--out") + 1]
    assert len(configs) <= 1, "--dump-config runs nothing"


@pytest.mark.usefixtures("bundles")
@pytest.mark.parametrize(
    "line",
    [
        ["verify", "bundles/nowhere"],
        ["predict", "bundles/visible"],
        ["export", "runs/a", "--outt", "b"],
        ["finetune", "a"],
    ],
)
def test_a_wrong_line_would_be_noticed(line: list[str], configs: list[Any]) -> None:
    assert main(line) == 2
    assert configs == []


@pytest.mark.parametrize(("page", "text"), RECIPES, ids=identity)
def test_settings_load_as_a_recipe(page: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    assert (
        main(["pretrain", "photos", "--out", "run", "--recipe", str(tmp_path / "recipe.yaml"), "--dump-config", "-"])
        == 0
    )
    dumped, given = yaml.safe_load(capsys.readouterr().out), yaml.safe_load(text)
    given.pop("extends", None)
    for section, values in given.items():
        assert {key: dumped[section][key] for key in values} == values


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=identity)
def test_commands_and_options_that_are_named_exist(page: Path) -> None:
    known = {form for options in OPTIONS.values() for option in options for form in option.split("/")} | {
        "--help",
        "--version",
        "--install-completion",
        "--show-completion",
    }
    for code in inline_code(page):
        words = code.split()
        if words[0] == "mae-deploy" and len(words) > 1 and not words[1].startswith("-"):
            command = command_in(words[1:])
            assert command in OPTIONS, code
            own = {form for option in OPTIONS[command] for form in option.split("/")}
            assert {word for word in words if word.startswith("--")} <= own, code
        if words[0].startswith("--"):
            assert words[0].split("=")[0] in known, code


def test_every_command_is_in_the_table() -> None:
    table = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "commands.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(command_in(row.split()) for row in table) == sorted(OPTIONS)
    for row in table:
        words = row.split()
        own = {form for option in OPTIONS.get(command_in(words), []) for form in option.split("/")}
        assert {word for word in words if word.startswith("--")} <= own, row
