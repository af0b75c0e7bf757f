"""A config class becomes a command: its options, help and precedence, and what it prints."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import typer
import yaml

from mae_deploy.cli import app as shipped_app
from mae_deploy.config import section, setting
from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.flags import Flag, flags_of
from mae_deploy.options import command
from mae_deploy.results import Result, show

SNAPSHOT = Path(__file__).with_name("command_options.json")
"""Every argument and option of every command. Programs rely on them: a change here is one that users see, and stands in
the changelog."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Oven:
    """Oven settings."""

    degrees: float = 180.0
    """Temperature in °C."""
    fan: bool = True
    """Whether the air moves."""
    light: bool = False
    """Whether there is light."""
    gas_mark: int | None = setting(None, hidden=True)
    """Not on the command line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cake:
    """A cake."""

    name: str = setting(argument=True, flag="CAKE")
    """What it is called."""
    out: Path
    """Where it goes."""
    shape: Literal["round", "square"] = "round"
    """Form of the tin."""
    size: tuple[int, int] = setting((26, 28), metavar="L[,W]", basic=True)
    """Length and width."""
    label: str | None = setting(None, flag="--tag")
    """Text on top."""
    seed: int = 0
    """Seed of the sprinkles."""
    pan: int = 0
    """Not used: this oven has none."""
    oven: Oven = section(Oven, degrees=160.0)


def cake_command(bake: Callable[[Cake], Any]) -> Callable[..., int]:
    """Run a command of `Cake` with these arguments; returns Typer's exit code or raises what the command raised."""
    app = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False)
    command(app, Cake, name="bake", recipes=True)(bake)

    def run(*arguments: str) -> int:
        with pytest.raises(SystemExit) as stop:
            app(args=list(arguments))
        assert isinstance(stop.value.code, int)
        return stop.value.code

    return run


def baked(*arguments: str) -> Cake:
    """The config that a command gets from these arguments."""
    got: list[Cake] = []
    assert cake_command(got.append)(*arguments) == 0
    return got[0]


def completed(app: typer.Typer) -> set[str]:
    """What a shell is told that asks as its environment variables say."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        app(prog_name="prog")
    return set(printed.getvalue().split())


# --- options ---------------------------------------------------------------------------------------------------------


def test_flags_of_a_config() -> None:
    flags = {flag.name: flag for flag in flags_of(Cake)}
    assert list(flags) == [
        "CAKE",
        "--out",
        "--shape",
        "--size",
        "--tag",
        "--seed",
        "--pan",
        "--degrees",
        "--fan",
        "--light",
    ]
    assert flags["CAKE"] == Flag(
        path=("name",),
        name="CAKE",
        kind=str,
        panel="Options",
        help="What it is called.",
        default=None,
        argument=True,
        required=True,
        takes="TEXT",
        basic=True,
    )
    assert flags["--degrees"] == Flag(
        path=("oven", "degrees"),
        name="--degrees",
        kind=float,
        panel="Oven settings",
        help="Temperature in °C.",
        default="160",
        argument=False,
        required=False,
        takes="NUMBER",
        basic=False,
    )
    assert (flags["--size"].kind, flags["--size"].default) == (str, "26,28")
    assert (flags["--fan"].kind, flags["--fan"].default) == (bool, "yes")
    assert (flags["--tag"].path, flags["--tag"].default) == (("label",), None)
    assert (flags["--seed"].panel, flags["--out"].panel) == ("Common", "Options")
    assert flags["--degrees"].variable == "oven_degrees"


def test_defaults() -> None:
    assert baked("plum", "--out", "table") == Cake(name="plum", out=Path("table"), oven=Oven(degrees=160))


def test_every_kind_of_option() -> None:
    given = baked(
        "plum",
        "--out",
        "t",
        "--shape",
        "square",
        "--size",
        "3,5",
        "--tag",
        "x",
        "--seed",
        "7",
        "--degrees",
        "1e2",
        "--no-fan",
    )
    assert given == Cake(
        name="plum", out=Path("t"), shape="square", size=(3, 5), label="x", seed=7, oven=Oven(degrees=100, fan=False)
    )
    assert baked("plum", "--out", "t", "--size", "3").size == (3, 3)


def test_precedence(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: apple\nout: recipe\nsize: 3\nlabel: recipe\nseed: 3\noven: {fan: false, gas_mark: 3}\n")
    base = ("--recipe", str(recipe))
    # Defaults < recipe: what it leaves out keeps the section's own default.
    assert baked(*base) == Cake(
        name="apple",
        out=Path("recipe"),
        size=(3, 3),
        label="recipe",
        seed=3,
        oven=Oven(degrees=160, fan=False, gas_mark=3),
    )
    # recipe < --set, and a later --set < nothing but a flag.
    assigned = (*base, "--set", "seed=4", "--set", "oven.gas_mark=4", "--set", "label=set", "--set", "seed=5")
    assert baked(*assigned) == Cake(
        name="apple",
        out=Path("recipe"),
        size=(3, 3),
        label="set",
        seed=5,
        oven=Oven(degrees=160, fan=False, gas_mark=4),
    )
    # --set < flags.
    given = baked("plum", *assigned, "--seed", "6", "--fan", "--out", "flag")
    assert given == Cake(
        name="plum", out=Path("flag"), size=(3, 3), label="set", seed=6, oven=Oven(degrees=160, fan=True, gas_mark=4)
    )


def test_a_flag_that_is_false_wins_over_a_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("seed: 3\noven: {fan: true}\n")
    given = baked("plum", "--out", "t", "--recipe", str(recipe), "--no-fan", "--seed", "0")
    assert (given.oven.fan, given.seed) == (False, 0)


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (("--out", "t"), "CAKE is missing", "What it is called."),
        (("plum",), "--out is missing", "Where it goes."),
        (
            ("plum", "--out", "t", "--set", "size=[1,2,3]"),
            "size '1,2,3' is not one value or 2 separated by commas",
            None,
        ),
        (("plum", "--out", "t", "--set", "oven.degree=3"), "unknown setting 'oven.degree'", "did you mean 'degrees'?"),
        (("plum", "--out", "t", "--set", "seed=["), "--set seed=[: the value is not YAML", None),
        (("plum", "--out", "t", "--recipe", "none"), "no recipe 'none'", None),
    ],
)
def test_what_cannot_be_used_is_refused_before_the_command_runs(
    arguments: tuple[str, ...], message: str, hint: str | None
) -> None:
    app = typer.Typer(pretty_exceptions_enable=False)
    command(app, Cake, name="bake", recipes=True)(lambda _: pytest.fail("it ran"))
    with pytest.raises(ConfigError) as caught:
        app(args=list(arguments), standalone_mode=False)
    assert str(caught.value) == message
    assert hint is None or caught.value.hint == hint


def test_dump_config_writes_a_recipe_and_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = cake_command(lambda _: pytest.fail("it ran"))
    dumped = tmp_path / "deep" / "cake.yaml"
    arguments = ("plum", "--out", "t", "--degrees", "1e-5", "--set", "oven.gas_mark=3")
    assert run(*arguments, "--dump-config", str(dumped)) == 0
    assert run(*arguments, "--dump-config", "-") == 0
    printed = capsys.readouterr().out
    assert printed == dumped.read_text()
    with pytest.raises(ConfigError, match=r"--dump-config .*cake.yaml already exists"):
        run(*arguments, "--dump-config", str(dumped))
    assert yaml.safe_load(printed)["oven"] == {"degrees": 1e-5, "fan": True, "light": False, "gas_mark": 3}
    # It is a recipe: with nothing else given, the same settings come back.
    assert baked("--recipe", str(dumped)) == Cake(name="plum", out=Path("t"), oven=Oven(degrees=1e-5, gas_mark=3))


@pytest.fixture
def help_of_cake(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """The help page of a command of `Cake` that has few options, or too many to show them all."""

    def bake(_: Cake) -> None:
        """Bake a cake.

        It takes a while.
        """

    def read(option: str) -> str:
        assert cake_command(bake)(option) == 0
        return capsys.readouterr().out

    monkeypatch.setenv("COLUMNS", "100")
    return read


def headings(page: str) -> list[str]:
    return [line for line in page.splitlines() if re.fullmatch(r"[A-Z][a-z ]+", line)]


def test_help_of_a_small_command_shows_every_option_under_its_section(help_of_cake: Callable[[str], str]) -> None:
    page = help_of_cake("--help")
    assert page.startswith("Usage: ")
    assert " CAKE --out PATH [OPTIONS]\n\nBake a cake.\n\nIt takes a while.\n" in page
    assert headings(page) == ["Arguments", "Options", "Oven settings", "Common"]
    for expected in (
        r"^  CAKE +What it is called\. \[required\]$",
        r"^  --out PATH +Where it goes\. \[required\]$",
        r"^  --shape round\|square +Form of the tin\. \[default: round\]$",
        r"^  --size L\[,W\] +Length and width\. \[default: 26,28\]$",
        r"^  --tag TEXT +Text on top\.$",
        r"^  --degrees NUMBER +Temperature in °C\. \[default: 160\]$",
        r"^  --fan/--no-fan +Whether the air moves\. \[default: yes\]$",
        r"^  --light +Whether there is light\.$",
        r"^  --seed INTEGER +Seed of the sprinkles\. \[default: 0\]$",
    ):
        assert re.search(expected, page, re.MULTILINE), expected
    assert "gas-mark" not in page
    assert "--pan" not in page, "it is not used"
    assert "more options" not in page


def test_help_of_a_large_command_shows_what_matters(
    help_of_cake: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = help_of_cake("--help")
    monkeypatch.setattr("mae_deploy.options.SMALL", 3)
    page = help_of_cake("--help")
    named = re.findall(r"^  (--[\w-]+|CAKE)", page, re.MULTILINE)
    assert named == ["CAKE", "--out", "--size", "--recipe", "--json", "--help", "--help-all"]
    hidden = ["--shape", "--tag", "--degrees", "--fan", "--light", "--seed", "--set", "--dump-config"]
    assert page.splitlines()[-1].startswith(f"… {len(hidden)} more options: ")
    assert page.splitlines()[-1].endswith(" --help-all")
    everything = help_of_cake("--help-all")
    assert set(re.findall(r"^  (--[\w-]+|CAKE)", everything, re.MULTILINE)) == {*named, *hidden}
    assert headings(everything) == headings(small)


def test_an_option_that_is_not_used_is_hidden_and_accepted() -> None:
    assert baked("plum", "--out", "t", "--pan", "3") == Cake(name="plum", out=Path("t"), pan=3, oven=Oven(degrees=160))


def test_a_commands_settings_are_imported_when_it_is_called() -> None:
    app = typer.Typer(pretty_exceptions_enable=False)
    command(app, "no_such_module:Cake", name="bake")(lambda _: None)
    assert app.registered_commands[0].name == "bake"
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        app(args=["plum"], standalone_mode=False)


def test_a_name_on_the_field_is_what_completes_its_values(monkeypatch: pytest.MonkeyPatch) -> None:
    app = typer.Typer(pretty_exceptions_enable=False)
    asked: list[str] = []

    def sizes(incomplete: str) -> list[str]:
        asked.append(incomplete)
        return ["26,28", "31,37"]

    command(app, Cake, name="bake", completions={"L[,W]": sizes})(lambda _: None)
    app.callback()(lambda: None)
    for words, expected in (
        ("prog bake --size 3", {"31,37"}),
        ("prog bake --sha", {"--shape"}),
        ("prog bake --shape s", {"square"}),
        ("prog bake --p", set()),
    ):
        monkeypatch.setenv("_PROG_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
        assert completed(app) == expected, words
    assert asked == ["3"]


# --- results ---------------------------------------------------------------------------------------------------------


def test_results_as_json_are_nothing_but_json(capsys: pytest.CaptureFixture[str]) -> None:
    run = cake_command(
        lambda cake: Result(
            {"name": cake.name, "out": cake.out, "list": [1, 0.5, None, True], "ö": "[bold]ß"}, view="not this"
        )
    )
    assert run("plum", "--out", "t", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "name": "plum",
        "out": "t",
        "list": [1, 0.5, None, True],
        "ö": "[bold]ß",
    }


def test_results_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    show(
        {"loss": 0.123456789, "size": (3, 5), "done": True, "metrics": {"top1": 0.5}, "path": "runs/[/red]/[bold]a"},
        as_json=False,
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["loss  0.123457", "size  3,5", "done  yes", "metrics  top1 0.5", "path  runs/[/red]/[bold]a"]
    show(Result({"a": 1}, view="a view"), as_json=False)
    assert capsys.readouterr().out == "a view\n"
    show(None, as_json=False)
    assert capsys.readouterr().out == ""


def test_a_failed_check_still_shows_what_it_found(capsys: pytest.CaptureFixture[str]) -> None:
    app = typer.Typer(pretty_exceptions_enable=False)

    def bake(_: Cake) -> None:
        raise CheckFailed("burnt", result=Result({"colour": "black"}))

    command(app, Cake, name="bake")(bake)
    with pytest.raises(CheckFailed, match="burnt"):
        app(args=["plum", "--out", "t", "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out) == {"colour": "black"}


# --- the commands that ship ------------------------------------------------------------------------------------------


def parameters_of_commands() -> dict[str, list[Any]]:
    group: Any = typer.main.get_command(shipped_app)
    found: dict[str, list[Any]] = {}
    for name, one in group.commands.items():
        within = getattr(one, "commands", {})
        found |= (
            {f"{name} {inner}": list(each.build().params) for inner, each in within.items()}
            if within
            else {name: list(one.build().params)}
        )
    return found


def options_of_commands() -> dict[str, list[str]]:
    return {
        name: [
            (
                parameter.metavar
                if parameter.param_type_name == "argument"
                else "/".join([*parameter.opts, *parameter.secondary_opts])
            )
            for parameter in parameters
        ]
        for name, parameters in parameters_of_commands().items()
    }


def test_options_are_those_that_programs_rely_on() -> None:
    expected = json.loads(SNAPSHOT.read_text())
    found = options_of_commands()
    assert list(found) == list(expected)
    for name, options in found.items():
        assert options == expected[name], (
            f"{name}: where this change is meant, update {SNAPSHOT.name} and the changelog"
        )


@pytest.mark.parametrize("name", parameters_of_commands())
def test_options_of_a_command_are_unique_and_explained(name: str) -> None:
    parameters = parameters_of_commands()[name]
    names = [option for parameter in parameters for option in (*parameter.opts, *parameter.secondary_opts)]
    assert len(names) == len(set(names))
    assert len({parameter.name for parameter in parameters}) == len(parameters)
    assert [parameter.name for parameter in parameters if not parameter.help] == []
    assert {"--seed", "--device", "--json"} <= set(names)
