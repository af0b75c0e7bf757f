"""What a device imports, and every help text, loads no training framework."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "torchvision", "timm", "onnx", "transformers", "accelerate", "sklearn")

LIST_OF_COMMANDS = """
import contextlib, io
from mae_deploy.cli import main

with contextlib.redirect_stdout(io.StringIO()) as printed:
    assert main(["--help"]) == 0
assert "pretrain" in printed.getvalue()
"""

HELP_OF_EVERY_COMMAND = """
import contextlib, io
from mae_deploy.cli import app, main

commands = [command.name or command.callback.__name__ for command in app.registered_commands]
assert len(commands) > 5, commands
for arguments in ([], ["data", "stats"], ["data", "pack"], *([name] for name in commands)):
    sys.argv = ["mae-deploy", *arguments, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            code = main()
        except SystemExit as stop:
            code = stop.code
    assert not code and "Usage: mae-deploy" in printed.getvalue(), (arguments, code, printed.getvalue())
"""


@pytest.mark.parametrize(
    "statements",
    [
        "import mae_deploy.runtime",
        "from mae_deploy.runtime import Backbone, Bundle",
        "import mae_deploy.cli",
        "import mae_deploy.commands.data.stats, mae_deploy.commands.data.pack",
        HELP_OF_EVERY_COMMAND,
    ],
    ids=["runtime", "backbone", "cli", "data", "help"],
)
def test_loads_nothing_heavy(statements: str) -> None:
    assert modules_loaded_by(statements) == set()


def test_the_list_of_commands_waits_for_no_settings() -> None:
    """What costs time at every `--help`: the settings of 23 commands, and NumPy, which some of them import."""
    waited_for = ("numpy", "mae_deploy.commands.config", "mae_deploy.pretrain.config", "mae_deploy.models.config")
    assert modules_loaded_by(LIST_OF_COMMANDS, waited_for) == set()
    assert "numpy" in modules_loaded_by("import mae_deploy.commands.config", waited_for)


def test_the_probe_sees_a_heavy_module() -> None:
    assert "onnx" in modules_loaded_by("import onnx")


def modules_loaded_by(statements: str, modules: tuple[str, ...] = HEAVY) -> set[str]:
    """Which of these modules a fresh interpreter has after it ran some statements."""
    probe = f"import sys\n{statements}\nprint(*sorted(set(sys.modules) & set({modules!r})))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())
