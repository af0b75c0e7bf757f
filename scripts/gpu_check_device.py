"""`mae-deploy build-engine` and `verify` for a Python with TensorRT and NumPy alone, where the command line has no
typer and no rich to run with.

python -m scripts.gpu_check_device build-engine BUNDLE [--profile PROFILES] [--json]
python -m scripts.gpu_check_device verify BUNDLE [--engine ENGINE] [--json]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mae_deploy.errors import CheckFailed, MaeDeployError
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.profiles import read_profiles
from mae_deploy.runtime.tensorrt.add_engine import build_engine
from mae_deploy.runtime.verify import verify_bundle


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, print its result as JSON, and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("build-engine", "verify"))
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--profile")
    parser.add_argument("--engine", default="tensorrt")
    parser.add_argument("--json", action="store_true", help="of no effect: the result is JSON")
    given = parser.parse_args(arguments)
    try:
        bundle = Bundle.load(given.bundle)
        print(
            json.dumps(
                _build(bundle, given.profile) if given.command == "build-engine" else _verify(bundle, given.engine)
            )
        )
    except MaeDeployError as error:
        print(f"error: {error}", *([f"hint: {error.hint}"] if error.hint else []), sep="\n", file=sys.stderr)
        return error.exit_code
    return 0


def _build(bundle: Bundle, profiles: str | None) -> dict[str, Any]:
    built = build_engine(bundle, profiles=read_profiles(profiles))
    return {"bundle": str(bundle.path), **built.entry, "rejected": built.rejected}


def _verify(bundle: Bundle, engine: str) -> dict[str, Any]:
    verification = verify_bundle(bundle, engine)
    if not verification.passed:
        raise CheckFailed(f"{bundle.path} misses parity: {'; '.join(verification.failures)}")
    return verification.to_dict()


if __name__ == "__main__":
    sys.exit(main())
