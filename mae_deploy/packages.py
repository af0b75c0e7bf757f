"""What is installed: which distributions give a module, which version of them is asked for, and what to do where the
module does not load. Several may give the same one: onnxruntime, onnxruntime-gpu, onnxruntime-directml, …

`importlib.metadata` is imported where it is asked: it takes longer than the rest of `mae-deploy --help`.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.machinery import ModuleSpec
from types import ModuleType

PACKAGE = "mae-deploy"

QUIET = {
    "onnxruntime": {"ORT_DISABLE_TELEMETRY": "1"},  # from 1.29 on: a device id and a database below HOME, and sent
    "mlflow": {"MLFLOW_DISABLE_TELEMETRY": "true"},  # from 3.2 on: which calls are used
    "ray": {"RAY_USAGE_STATS_ENABLED": "0"},  # what is run where; sent to its makers
    "wandb": {"WANDB_ERROR_REPORTING": "false"},  # crash reports to its makers; the run's metrics go where it says
}
"""What is set in the environment before a package is imported, unless the user has set it: each is read then."""

_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)\s*(?P<versions>[^;]*?)\s*(?:;.*extra == [\"'](?P<extra>[\w-]+)[\"'].*)?")
"""A line of a package's metadata: `torch>=2.11; extra == "train"`."""


def distributions(module: str) -> dict[str, str]:
    """Name and version of each installed distribution that gives this module, whatever it is called itself."""
    from importlib import metadata

    found: dict[str, str] = {}
    for name in sorted(set(_by_module().get(module, []))):
        package = metadata.distribution(name)
        if any(file.parts == (module, "__init__.py") for file in package.files or ()):
            found[package.name] = package.version
    return found


def requirements() -> list[tuple[str, str, str]]:
    """What this package asks for: names, versions such as `>=1.19`, and extras, "" for the package itself.

    Raises:
        importlib.metadata.PackageNotFoundError: it runs from its sources and is not installed.
    """
    from importlib import metadata

    found = []
    for line in metadata.requires(PACKAGE) or []:
        match = _REQUIREMENT.fullmatch(line)
        assert match is not None, line
        found.append((match["name"], match["versions"], match["extra"] or ""))
    return found


def is_hollow(module: ModuleType) -> bool:
    """Whether it is only a folder that an uninstalled package left behind, which Python imports all the same."""
    spec = getattr(module, "__spec__", None)
    return spec is not None and is_hollow_spec(spec)


def is_hollow_spec(spec: ModuleSpec) -> bool:
    """As `is_hollow`, of a module that is not imported yet."""
    return spec.origin is None and spec.submodule_search_locations is not None


def remedy(module: str, install: str, *, absent: bool = False) -> str:
    """What to do about a module that does not load.

    Args:
        module: a top-level one.
        install: how it is installed, where no distribution gives it.
        absent: Python finds no such module.
    """
    from importlib import metadata

    found = distributions(module)
    if len(found) > 1:
        names = sorted(found, key=lambda name: (name == module, name))
        return f"pip uninstall -y {' '.join(names)}, then install one of them: {install_one(module, names[0])}"
    if not found:
        return install
    ((name, version),) = found.items()
    asked = _versions_asked(module)
    if asked.startswith(">=") and _numbers(version) < _numbers(asked):
        return f"{name} {version} is installed, {PACKAGE} needs {asked[2:]} or later: pip install -U '{name}{asked}'"
    there = metadata.distribution(name).locate_file(f"{module}/__init__.py")
    return install if absent and there.exists() else install_one(module, name)  # type: ignore[attr-defined]


def install_one(module: str, name: str) -> str:
    """How one of a module's distributions is installed again, over what another has left, and nothing else with it."""
    asked = _versions_asked(module)
    return "pip install --force-reinstall --no-deps " + (f"'{name}{asked}'" if asked else name)


def upgrade(written_by: object = None) -> str:
    """How a version is installed that reads a file of a later one.

    Args:
        written_by: what the file says of the version that wrote it.
    """
    known = isinstance(written_by, str) and re.fullmatch(r"\d+(\.\d+)*[\w.+-]*", written_by)
    return f"pip install --upgrade '{PACKAGE}>={written_by}'" if known else f"pip install --upgrade {PACKAGE}"


def is_later(version: str, than: str) -> bool:
    """Whether a version is later than another."""
    return _numbers(version) > _numbers(than)


@cache
def _by_module() -> dict[str, list[str]]:
    from importlib import metadata

    return {module: list(names) for module, names in metadata.packages_distributions().items()}


def _versions_asked(module: str) -> str:
    from importlib import metadata

    try:
        return next((versions for name, versions, _ in requirements() if name.replace("-", "_") == module), "")
    except metadata.PackageNotFoundError:
        return ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])
