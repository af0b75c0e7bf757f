"""What a device imports, and every help text, loads no training framework."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "torchvision", "timm", "onnx", "transformers", "accelerate", "sklearn")

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


def test_the_probe_sees_a_heavy_module() -> None:
    assert "onnx" in modules_loaded_by("import onnx")


def modules_loaded_by(statements: str) -> set[str]:
    """The heavy top-level modules in a fresh interpreter after it ran some statements."""
    probe = f"import sys\n{statements}\nprint(*sorted(set(sys.modules) & set({HEAVY!r})))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())
