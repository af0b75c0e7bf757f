"""The command that made a report: parsed again, it gives the same settings, and nothing in it can be left out."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import typer

from mae_deploy.commands.benchmark_train.config import BenchmarkTrainConfig
from mae_deploy.config import section, setting
from mae_deploy.models.config import DecoderConfig, EncoderConfig
from mae_deploy.options import command
from mae_deploy.reporting.command_line import command_line


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    """Inner."""

    width: int = 5
    """Its width."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outer:
    """Outer."""

    runs: tuple[Path, ...] = setting(argument=True, flag="RUN")
    """Runs."""
    sizes: tuple[int, ...] | None = (3, 7)
    """Sizes."""
    settings: tuple[str, ...] = setting((), repeated=True, flag="--with")
    """Settings."""
    search: bool = True
    """Search."""
    inner: Inner = section(Inner, width=11)


def parsed(config: type, line: str) -> Any:
    """What the command line makes of it."""
    found: list[Any] = []
    app = typer.Typer()
    command(app, config, name="show")(found.append)
    app(shlex.split(line)[2:], standalone_mode=False)  # an app of one command is that command
    return found[0]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({}, []),
        ({"sizes": (2,), "search": False}, ["--sizes", "2", "--no-search"]),
        ({"settings": ("a=1,2", "b=c")}, ["--with", "a=1,2", "--with", "b=c"]),
        # 5 is the class's default and not the section's.
        ({"inner": Inner(width=5)}, ["--width", "5"]),
        ({"inner": Inner(width=11)}, []),
    ],
)
def test_what_has_its_default_is_left_out(more: dict[str, Any], words: list[str]) -> None:
    config = Outer(runs=(Path("a b"), Path("c")), inner=Inner(width=11))
    config = replace(config, **more)
    line = command_line("show", config)
    assert shlex.split(line) == ["mae-deploy", "show", "a b", "c", *words]


def test_numbers_that_follow_from_a_models_name_are_left_out() -> None:
    config = BenchmarkTrainConfig(
        model=EncoderConfig(name="vit_nano_patch4", image_size=(12, 20)), decoder=DecoderConfig(decoder_embed_dim=32)
    )
    line = command_line("show", config)
    assert "--model vit_nano_patch4" in line
    assert "--depth" not in line
    assert "--decoder-num-heads" not in line
    assert parsed(BenchmarkTrainConfig, line) == config
