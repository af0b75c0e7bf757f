"""Print what the installed `tensorrt` module offers, as JSON: its classes with their attributes and signatures, its
enumerations, its functions.

`check_tensorrt_api.sh` runs it on the bindings of several versions; the listings in tests/packaging/tensorrt_api/ are
its output. Standard library only.
"""

from __future__ import annotations

import inspect
import json
import re
from typing import Any

import tensorrt

_LEFT_OUT = re.compile(
    r"Plugin|Calibrator|^Uff|^Caffe|^Dims[A-Z0-9]|^Field|^Algorithm|^IAlgorithm|^IRNN|^RNN"
    r"|^Permutation|^Safe|^Tiling|^Debug|^IDebug"
)
"""Classes that no code here has a use for; they would double the listings."""


_FUNCTIONS = ("nptype", "volume", "init_libnvinfer_plugins", "get_plugin_registry")


def listing(module: Any) -> dict[str, Any]:
    """Everything public of the module, by kind.

    A class has the names of its bases and its attributes: of a property its type, with `settable` where it can be set;
    of a method a list of `name, shape -> bool`, one for each way to call it, in which a parameter with a default value
    ends with `=`.
    """
    classes: dict[str, dict[str, Any]] = {}
    enums: dict[str, dict[str, int]] = {}
    functions: dict[str, list[str]] = {}
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or inspect.ismodule(value) or _LEFT_OUT.search(name):
            continue
        if hasattr(value, "__members__"):
            enums[name] = _members(value)
        elif inspect.isclass(value):
            bases = [base.__name__ for base in value.__bases__ if hasattr(module, base.__name__)]
            classes[name] = {
                "bases": bases,
                "attributes": {attribute: _described(module, found) for attribute, found in _attributes(value)},
            }
            enums.update(
                {
                    f"{name}.{inner}": _members(found)
                    for inner, found in _attributes(value)
                    if inspect.isclass(found) and hasattr(found, "__members__")
                }
            )
        elif name in _FUNCTIONS:
            functions[name] = _signatures(module, value)
    return {"version": module.__version__, "classes": classes, "enums": enums, "functions": functions}


def _members(enum: Any) -> dict[str, int]:
    return {name: int(number) for name, number in enum.__members__.items()}


def _attributes(kind: type) -> list[tuple[str, Any]]:
    """Its own public attributes and its constructor."""
    return sorted((name, value) for name, value in vars(kind).items() if name == "__init__" or not name.startswith("_"))


def _described(module: Any, value: Any) -> str | list[str]:
    if isinstance(value, property):
        kind = next(iter(_signatures(module, value.fget)), "")[len("-> ") :]
        return kind if value.fset is None else f"{kind} settable".strip()
    return _signatures(module, value) if callable(value) and not inspect.isclass(value) else ""


def _signatures(module: Any, value: Any) -> list[str]:
    if inspect.isfunction(value):
        return [
            ", ".join(
                name + ("=" if parameter.default is not parameter.empty else "")
                for name, parameter in inspect.signature(value).parameters.items()
            )
        ]
    found = re.findall(r"^(?:\d+\. )?\w*\((.*)\) -> (.+)$", value.__doc__ or "", flags=re.MULTILINE)
    return list(dict.fromkeys(_signature(module, *call) for call in found))


def _signature(module: Any, arguments: str, result: str) -> str:
    names = [_parameter(text) for text in _split(arguments)]
    names = names[1:] if names[:1] in (["self"], ["arg0"]) else names
    return f"{', '.join(names)} -> {_type(module, result)}".strip()


def _split(arguments: str) -> list[str]:
    """At the commas that stand in no brackets."""
    parts, depth = [""], 0
    for character in arguments:
        depth += (character in "[(<{") - (character in "])>}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def _parameter(text: str) -> str:
    return text.partition(":")[0].strip() + ("=" if " = " in text else "")


def _type(module: Any, text: str) -> str:
    """Without namespaces; some signatures have the C++ name of a class that Python knows without its I."""

    def name(match: re.Match[str]) -> str:
        own = match[0].rpartition(":")[2].rpartition(".")[2]
        return own if hasattr(module, own) or not hasattr(module, own[1:]) else own[1:]

    return re.sub(r"[\w.:]+", name, text).replace("List[", "list[")


if __name__ == "__main__":
    print(json.dumps(listing(tensorrt), indent=1, sort_keys=True))
