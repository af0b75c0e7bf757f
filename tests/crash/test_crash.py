"""A few commands killed a few times; `make crash` kills all of them 50 times each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

COMMANDS = ("pretrain", "export", "predict", "build-engine")


def test_nothing_half_written_is_accepted_and_the_same_command_goes_on(tmp_path: Path) -> None:
    names = [word for name in COMMANDS for word in ("--only", name)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.crash.run", "--kills", "2", *names, "--out", str(tmp_path / "found.json")],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    found = json.loads((tmp_path / "found.json").read_text())
    assert found == {"kills": dict.fromkeys(COMMANDS, 2), "faults": []}
    assert done.returncode == 0
