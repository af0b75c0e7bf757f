"""Follows the objects of TensorRT through our source and looks every name up in a listing of one version's bindings.

What a value is comes from the listing itself (the result of `builder.create_network()` is an `INetworkDefinition`),
from annotations, and from the arguments, results and attributes of our own functions and classes. A condition on the
major version, on `hasattr` or on a missing `getattr` is decided as that version would, so that a branch is checked for
the versions that take it and for no other. Nothing is run.
"""

from __future__ import annotations

import ast
import functools
import json
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_MAJOR_FUNCTION, _IMPORT_FUNCTION = "major_version", "import_optional"
"""Of ours: what gives the major version of the module it is given, and the module of a name."""

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda left, right: left in right,
    ast.NotIn: lambda left, right: left not in right,
}


@dataclass(frozen=True, slots=True)
class Value:
    """What an expression is, as far as it is known; `A|B` is of one of two classes."""

    kind: str
    """unknown, mixed (one thing here, another there), plain (a number, a text …), constant, module, class, enum,
    object, method, list (of `name`), and of ours: own (an object), own class, own function, own module."""
    name: str = ""
    owner: str = ""
    """Of a method its class, of a function its module."""
    constant: Any = None

    @property
    def element(self) -> Value:
        """What iterating over it or subscripting it gives."""
        return _decoded(self.name) if self.kind == "list" else UNKNOWN


UNKNOWN, MIXED, PLAIN, NONE, MODULE = (
    Value("unknown"),
    Value("mixed"),
    Value("plain"),
    Value("constant"),
    Value("module"),
)

Environment = dict[str, Value]


def list_of(element: Value) -> Value:
    """A list, a tuple or the values of a dict."""
    return (
        Value("list", f"{element.kind}:{element.name}")
        if element.kind in ("object", "own", "class", "enum")
        else UNKNOWN
    )


def _decoded(text: str) -> Value:
    kind, _, name = text.partition(":")
    return Value(kind, name)


def joined(first: Value, second: Value) -> Value:
    """What is either, an object of one class or another; one that may be None, or unknown elsewhere, counts as the
    object.
    """
    if first == second:
        return first
    if first.kind == second.kind == "object":
        return Value("object", "|".join(sorted({*first.name.split("|"), *second.name.split("|")})))
    for one, other in ((first, second), (second, first)):
        if other in (UNKNOWN, NONE):
            return UNKNOWN if one.kind in ("constant", "plain") else one
    return MIXED


@dataclass(frozen=True)
class Listing:
    """The names of one version's bindings, as `scripts/record_tensorrt_api.py` prints them."""

    version: str
    classes: dict[str, dict[str, Any]]
    enums: dict[str, dict[str, int]]
    functions: dict[str, list[str]]

    @classmethod
    def read(cls, path: Path) -> Listing:
        """One of tests/packaging/tensorrt_api/."""
        return cls(**json.loads(path.read_text()))

    @property
    def major(self) -> int:
        """8, 10 or 11."""
        return int(self.version.partition(".")[0])

    @functools.cached_property
    def attribute_names(self) -> set[str]:
        """Of all classes."""
        return {name for entry in self.classes.values() for name in entry["attributes"]}

    def attribute(self, kind: str, name: str) -> str | list[str] | None:
        """The entry of a class's own or inherited attribute; None where there is none."""
        entry = self.classes[kind]
        own: str | list[str] | None = entry["attributes"].get(name)
        return (
            own
            if own is not None
            else next((found for base in entry["bases"] if (found := self.attribute(base, name)) is not None), None)
        )

    def result(self, text: str) -> Value:
        """What the bindings mean with the name of a type."""
        if text.startswith("list["):
            return list_of(self.result(text[len("list[") : -1]))
        return Value("object", text) if text in self.classes or text in self.enums else PLAIN


@dataclass
class Findings:
    """What became of the names."""

    problems: set[str] = field(default_factory=set)
    """Names that this version lacks, calls that it does not take, attributes of which it is unclear whose they are."""
    used: set[str] = field(default_factory=set)
    """Names that it has, such as `IExecutionContext.execute_async_v3`."""


def check(sources: Mapping[str, str], listing: Listing) -> Findings:
    """Look up every name of TensorRT's in Python sources, which are given by the names of their modules, such as
    `mae_deploy.runtime.tensorrt.plans`.
    """
    project = _Project({name: ast.parse(text) for name, text in sources.items()}, listing)
    while project.follow():
        pass
    return project.findings


class _Project:
    """All sources, and what is known of their functions, classes and attributes so far."""

    def __init__(self, trees: Mapping[str, ast.Module], listing: Listing) -> None:
        self.trees, self.listing = trees, listing
        self.findings = Findings()
        self.classes = {
            node.name: node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
        }
        self.functions = {
            (owner, node.name): node for name, tree in trees.items() for owner, node in _functions(tree, name)
        }
        self.results: dict[tuple[str, str], Value] = {}
        self.parameters: dict[tuple[str, str, str | None], Value] = {}
        self.attributes: dict[tuple[str, str | None], Value] = {}
        own = {name for _, name in self.functions} | {
            part.target.id
            for node in self.classes.values()
            for part in node.body
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
        }
        self.telling_names = {name for name in listing.attribute_names - own if "_" in name}
        """Attributes that are TensorRT's, whatever they are asked of; a word such as `code` may be anybody's."""

    def follow(self) -> bool:
        """One pass over everything; returns whether it learned something, so that what one function passes on to the
        next is known in the next pass.
        """
        known = [dict(table) for table in (self.results, self.parameters, self.attributes)]
        self.findings = Findings()
        for name, tree in self.trees.items():
            _Function(self, name, name, {}).block(tree.body)
        return known != [self.results, self.parameters, self.attributes]

    def learn(self, table: dict[Any, Value], key: Any, value: Value) -> None:
        """Add what was seen to what is known."""
        table[key] = joined(table[key], value) if key in table else value


def _functions(tree: ast.AST, owner: str) -> list[tuple[str, ast.FunctionDef]]:
    """Functions with the class or the module that they belong to, at any depth."""
    found: list[tuple[str, ast.FunctionDef]] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            found.append((owner, node))
        found += _functions(node, node.name if isinstance(node, ast.ClassDef) else owner)
    return found


class _Function:
    """Goes through the statements of one function, of a class or of a module."""

    def __init__(
        self, project: _Project, source: str, owner: str, environment: Environment, function: str = ""
    ) -> None:
        self.project, self.listing, self.source = project, project.listing, source
        self.owner, self.function = owner, function
        self.environment = environment

    # --- statements --------------------------------------------------------------------------------------------------

    def block(self, statements: Sequence[ast.stmt]) -> bool:
        """Whether the last statement is never passed: it returns or raises."""
        return any(self.statement(statement) for statement in statements)

    def statement(self, node: ast.stmt) -> bool:
        """Whether what follows is never reached."""
        handler = getattr(self, f"_{type(node).__name__}", None)
        if handler is not None:
            return bool(handler(node))
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self.value(child)
        return isinstance(node, (ast.Raise, ast.Break, ast.Continue))

    def _FunctionDef(self, node: ast.FunctionDef) -> None:
        inner = _Function(self.project, self.source, self.owner, dict(self.environment), node.name)
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        for index, argument in enumerate(arguments):
            seen = self.project.parameters.get((self.owner, node.name, argument.arg), UNKNOWN)
            if index == 0 and argument.arg in ("self", "cls"):
                seen = Value("own" if argument.arg == "self" else "own class", self.owner)
            elif argument.arg == "trt":
                seen = MODULE
            inner.environment[argument.arg] = joined(self._annotated(argument.annotation), seen)
        inner.block(node.body)
        self.environment[node.name] = Value("own function", node.name, self.owner)

    def _ClassDef(self, node: ast.ClassDef) -> None:
        for base in node.bases:
            known = self.value(base)
            if known.kind == "class":
                self._check_overrides(node, known.name)
        inner = _Function(self.project, self.source, node.name, dict(self.environment))
        for statement in node.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                self.project.learn(
                    self.project.attributes, (node.name, statement.target.id), self._annotated(statement.annotation)
                )
            else:
                inner.statement(statement)

    def _check_overrides(self, node: ast.ClassDef, base: str) -> None:
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                entry = self._attribute(method, Value("object", base), method.name)
                names = [argument.arg for argument in method.args.args[1:]]
                ways = [_parameters(way) for way in self.listing.attribute(base, method.name) or []]
                if entry.kind == "method" and ways and all(len(way) != len(names) for way in ways):
                    self._problem(
                        method, f"{base}.{method.name} is called with {len(ways[0])} arguments, not {len(names)}"
                    )

    def _ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            module = f"{node.module}.{alias.name}"
            found = (
                Value("own module", module)
                if module in self.project.trees
                else self._of_source(str(node.module), alias.name)
            )
            self.environment[alias.asname or alias.name] = found

    def _Return(self, node: ast.Return) -> bool:
        if node.value is not None:
            self.project.learn(self.project.results, (self.owner, self.function), self.value(node.value))
        return True

    def _Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            if (
                isinstance(target, ast.Tuple)
                and isinstance(node.value, ast.Tuple)
                and len(target.elts) == len(node.value.elts)
            ):
                for part, value in zip(target.elts, [self.value(value) for value in node.value.elts], strict=True):
                    self._bind(part, value)
            else:
                self._bind(target, self.value(node.value))

    def _AnnAssign(self, node: ast.AnnAssign) -> None:
        value = self.value(node.value) if node.value is not None else UNKNOWN
        self._bind(node.target, joined(self._annotated(node.annotation), value))

    def _AugAssign(self, node: ast.AugAssign) -> None:
        self.value(node.value)
        if isinstance(node.target, ast.Attribute):
            self._bind(node.target, UNKNOWN)

    def _If(self, node: ast.If) -> bool:
        truth = _truth(self.value(node.test))
        if truth is not None:
            return self.block(node.body if truth else node.orelse)
        return all(self._branches([node.body, node.orelse]))

    def _branches(self, blocks: Sequence[Sequence[ast.stmt]]) -> list[bool]:
        """Follow each block from here; afterwards the environment is that of any of those that end."""
        start, ended = self.environment, []
        after: Environment = {}
        for statements in blocks:
            self.environment = dict(start)
            ended.append(self.block(statements))
            if not ended[-1]:
                after = {
                    name: joined(after.get(name, value), value) for name, value in {**after, **self.environment}.items()
                }
        self.environment = after or start
        return ended

    def _For(self, node: ast.For) -> None:
        self._bind_element(node.target, node.iter)
        self._branches([node.body])
        self.block(node.orelse)

    def _While(self, node: ast.While) -> None:
        self.value(node.test)
        self._branches([node.body])

    def _Try(self, node: ast.Try) -> bool:
        ended = self._branches([[*node.body, *node.orelse], *(handler.body for handler in node.handlers)])
        return self.block(node.finalbody) or all(ended)

    def _With(self, node: ast.With) -> bool:
        for item in node.items:
            value = self.value(item.context_expr)
            if item.optional_vars is not None:
                self._bind(item.optional_vars, value)
        return self.block(node.body)

    def _bind(self, target: ast.expr, value: Value) -> None:
        if isinstance(target, ast.Name):
            self.environment[target.id] = value
        elif isinstance(target, ast.Attribute):
            self._set(target, value)
        elif isinstance(target, ast.Subscript):
            self.value(target.slice)
            if isinstance(target.value, (ast.Name, ast.Attribute)) and list_of(value) != UNKNOWN:
                self._bind_container(target.value, list_of(value))
            else:
                self.value(target.value)
        elif isinstance(target, ast.Starred):
            self._bind(target.value, UNKNOWN)
        elif isinstance(target, (ast.Tuple, ast.List)):
            for part in target.elts:
                self._bind(part, value.element)

    def _bind_container(self, container: ast.Name | ast.Attribute, value: Value) -> None:
        """Something is put into a list or a dict of ours."""
        if isinstance(container, ast.Name):
            self.environment[container.id] = joined(self.environment.get(container.id, UNKNOWN), value)
            return
        owner = self.value(container.value)
        if owner.kind == "own":
            self.project.learn(self.project.attributes, (owner.name, container.attr), value)

    def _set(self, target: ast.Attribute, value: Value) -> None:
        owner = self.value(target.value)
        if owner.kind == "own":
            self.project.learn(self.project.attributes, (owner.name, target.attr), value)
            return
        self._attribute(target, owner, target.attr)
        for kind in owner.name.split("|") if owner.kind == "object" else []:
            entry = self.listing.attribute(kind, target.attr) if kind in self.listing.classes else None
            if isinstance(entry, list) or (entry is not None and "settable" not in entry):
                self._problem(target, f"{kind}.{target.attr} cannot be set")

    # --- expressions -------------------------------------------------------------------------------------------------

    def value(self, node: ast.expr) -> Value:
        """What an expression is; every name in it is looked up on the way."""
        handler = getattr(self, f"_{type(node).__name__}", None)
        if handler is not None:
            found: Value = handler(node)
            return found
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self.value(child)
        return UNKNOWN

    def _Constant(self, node: ast.Constant) -> Value:
        return Value("constant", constant=node.value)

    def _Tuple(self, node: ast.Tuple | ast.List) -> Value:
        values = [self.value(part) for part in node.elts]
        if values and all(value.kind == "constant" for value in values):
            return Value("constant", constant=tuple(value.constant for value in values))
        return _list_of_any(values)

    _List = _Tuple

    def _Dict(self, node: ast.Dict) -> Value:
        for key in node.keys:
            if key is not None:
                self.value(key)
        return _list_of_any([self.value(value) for value in node.values])

    def _Name(self, node: ast.Name) -> Value:
        if node.id in self.environment:
            return self.environment[node.id]
        return self._of_source(self.source, node.id)

    def _Attribute(self, node: ast.Attribute) -> Value:
        return self._attribute(node, self.value(node.value), node.attr)

    def _Subscript(self, node: ast.Subscript) -> Value:
        self.value(node.slice)
        value = self.value(node.value)
        return value if isinstance(node.slice, ast.Slice) else value.element

    def _UnaryOp(self, node: ast.UnaryOp) -> Value:
        truth = _truth(self.value(node.operand))
        return Value("constant", constant=not truth) if isinstance(node.op, ast.Not) and truth is not None else PLAIN

    def _BoolOp(self, node: ast.BoolOp) -> Value:
        decisive, unclear, value = isinstance(node.op, ast.Or), False, UNKNOWN
        for operand in node.values:
            value = self.value(operand)
            truth = _truth(value)
            if truth is decisive:
                return UNKNOWN if unclear and decisive else value
            unclear = unclear or truth is None
        return UNKNOWN if unclear else value

    def _IfExp(self, node: ast.IfExp) -> Value:
        truth = _truth(self.value(node.test))
        if truth is not None:
            return self.value(node.body if truth else node.orelse)
        return joined(self.value(node.body), self.value(node.orelse))

    def _Compare(self, node: ast.Compare) -> Value:
        left, rights = self.value(node.left), [self.value(right) for right in node.comparators]
        if len(rights) > 1:
            return PLAIN
        if isinstance(node.ops[0], (ast.Is, ast.IsNot)) and rights[0] == NONE:
            return _known_or_plain(_is_none(left), negated=isinstance(node.ops[0], ast.IsNot))
        compare = _COMPARISONS.get(type(node.ops[0]))
        if compare is None or left.kind != "constant" or rights[0].kind != "constant":
            return PLAIN
        return Value("constant", constant=compare(left.constant, rights[0].constant))

    def _NamedExpr(self, node: ast.NamedExpr) -> Value:
        value = self.value(node.value)
        self._bind(node.target, value)
        return value

    def _ListComp(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp) -> Value:
        return list_of(self._comprehension(node.generators, [node.elt])[0])

    _SetComp = _GeneratorExp = _ListComp

    def _DictComp(self, node: ast.DictComp) -> Value:
        return list_of(self._comprehension(node.generators, [node.key, node.value])[1])

    def _comprehension(self, generators: Sequence[ast.comprehension], elements: Sequence[ast.expr]) -> list[Value]:
        outside = dict(self.environment)
        for generator in generators:
            self._bind_element(generator.target, generator.iter)
            if any(_truth(self.value(condition)) is False for condition in generator.ifs):
                self.environment = outside
                return [UNKNOWN for _ in elements]
        values = [self.value(element) for element in elements]
        self.environment = outside
        return values

    def _Lambda(self, node: ast.Lambda) -> Value:
        inner = _Function(self.project, self.source, self.owner, dict(self.environment), self.function)
        for argument in node.args.args:
            inner.environment[argument.arg] = UNKNOWN
        inner.value(node.body)
        return UNKNOWN

    def _bind_element(self, target: ast.expr, iterable: ast.expr) -> None:
        """Bind the target of a loop; the values of a dict's items are its second part, what is counted or paired stands
        at its place.
        """
        call = iterable if isinstance(iterable, ast.Call) else None
        parts = target.elts if isinstance(target, ast.Tuple) else []
        if call is not None and isinstance(call.func, ast.Attribute) and call.func.attr == "items" and len(parts) == 2:
            self._bind(parts[0], UNKNOWN)
            self._bind(parts[1], self.value(call.func.value).element)
        elif (
            call is not None
            and isinstance(call.func, ast.Name)
            and call.func.id in ("zip", "enumerate")
            and len(parts) > 1
        ):
            counted = [PLAIN] if call.func.id == "enumerate" else []
            values = [*counted, *(self.value(argument).element for argument in call.args)]
            for part, value in zip(parts, values, strict=False):
                self._bind(part, value)
        else:
            self._bind(target, self.value(iterable).element)

    # --- names -------------------------------------------------------------------------------------------------------

    def _attribute(self, node: ast.AST, owner: Value, name: str) -> Value:
        """What an attribute is; a problem where this version does not have it."""
        if owner.kind == "module":
            return self._of_module(node, name)
        if owner.kind == "own module":
            return self._of_source(owner.name, name)
        if owner.kind == "own":
            return self._of_own(owner.name, name)
        if owner.kind == "class" and f"{owner.name}.{name}" in self.listing.enums:
            return Value("enum", f"{owner.name}.{name}")
        if owner.kind in ("class", "object"):
            return self._of_classes(
                node, [kind for kind in owner.name.split("|") if kind in self.listing.classes], name
            )
        if owner.kind == "enum":
            if not name.startswith("__"):
                self._look_up(node, f"{owner.name}.{name}", name in self.listing.enums[owner.name])
            return Value("object", owner.name)
        if owner.kind in ("unknown", "mixed") and name in self.project.telling_names:
            self._problem(node, f"it is unclear what has the attribute {name}")
        return UNKNOWN

    def _of_module(self, node: ast.AST, name: str) -> Value:
        kinds = (("class", self.listing.classes), ("enum", self.listing.enums), ("method", self.listing.functions))
        kind = next((kind for kind, names in kinds if name in names), None)
        if name == "__version__":
            return Value("constant", constant=self.listing.version)
        self._look_up(node, name, kind is not None)
        return Value(kind, name) if kind else UNKNOWN

    def _of_classes(self, node: ast.AST, owners: Sequence[str], name: str) -> Value:
        found = [self._of_class(node, owner, name) for owner in owners]
        if len(found) > 1 and all(value.kind == "method" for value in found):
            return Value("method", name, "|".join(owners))
        return functools.reduce(joined, found) if found else UNKNOWN

    def _of_class(self, node: ast.AST, owner: str, name: str) -> Value:
        entry = self.listing.attribute(owner, name)
        if not name.startswith("__") or name == "__init__":
            self._look_up(node, f"{owner}.{name}", entry is not None)
        if isinstance(entry, list):
            return Value("method", name, owner)
        return self.listing.result(entry.partition(" ")[0]) if entry else UNKNOWN

    def _of_source(self, module: str, name: str) -> Value:
        """What a module of ours calls so at its top level."""
        if (module, name) in self.project.functions:
            return Value("own function", name, module)
        return Value("own class", name) if name in self.project.classes else UNKNOWN

    def _of_own(self, owner: str, name: str) -> Value:
        for kind in self._with_bases(owner):
            if (kind, name) in self.project.functions:
                if _is_property(self.project.functions[kind, name]):
                    return self._returned(kind, name)
                return Value("own function", name, kind)
            if (kind, name) in self.project.attributes:
                return self.project.attributes[kind, name]
        return UNKNOWN

    def _with_bases(self, owner: str) -> list[str]:
        node = self.project.classes.get(owner)
        names = [base.id for base in node.bases if isinstance(base, ast.Name)] if node is not None else []
        return [owner, *(name for base in names for name in self._with_bases(base))]

    def _look_up(self, node: ast.AST, name: str, found: bool) -> None:
        if found:
            self.project.findings.used.add(name)
        else:
            self._problem(node, f"no {name}")

    def _problem(self, node: ast.AST, text: str) -> None:
        self.project.findings.problems.add(
            f"{self.source}:{getattr(node, 'lineno', 0)}: TensorRT {self.listing.version}: {text}"
        )

    # --- calls -------------------------------------------------------------------------------------------------------

    def _Call(self, node: ast.Call) -> Value:
        arguments = [self.value(argument) for argument in node.args]
        keywords = {keyword.arg: self.value(keyword.value) for keyword in node.keywords}
        if (
            isinstance(node.func, ast.Name)
            and node.func.id in ("hasattr", "getattr")
            and node.func.id not in self.environment
        ):
            return self._hasattr(arguments) if node.func.id == "hasattr" else self._getattr(node, arguments)
        if (
            isinstance(node.func, ast.Name)
            and node.func.id in ("list", "tuple", "sorted", "reversed", "iter", "next", "set")
            and arguments
        ):
            return arguments[0].element if node.func.id == "next" else arguments[0]
        if isinstance(node.func, ast.Attribute) and node.func.attr in (
            "values",
            "copy",
            "get",
            "pop",
            "setdefault",
            "append",
        ):
            container = self.value(node.func.value)
            if (
                node.func.attr == "append"
                and list_of(arguments[0]) != UNKNOWN
                and isinstance(node.func.value, (ast.Name, ast.Attribute))
            ):
                self._bind_container(node.func.value, list_of(arguments[0]))
            if container.kind == "list":
                return container if node.func.attr in ("values", "copy") else container.element
        if (
            isinstance(node.func, ast.Name)
            and node.func.id == "partial"
            and arguments
            and arguments[0].kind == "own function"
        ):
            self._pass_on(arguments[0].owner, arguments[0].name, node, arguments[1:], keywords)
            return UNKNOWN
        function = self.value(node.func)
        if (
            arguments
            and arguments[0].constant == "tensorrt"
            and isinstance(node.func, ast.Name)
            and node.func.id == _IMPORT_FUNCTION
        ):
            return MODULE
        if function.kind == "own function":
            return self._call_own(function.owner, function.name, node, arguments, keywords)
        if function.kind == "own class":
            self._call_own(function.name, "__init__", node, arguments, keywords)
            return Value("own", function.name)
        return self._call_theirs(node, function, arguments, keywords)

    def _hasattr(self, arguments: list[Value]) -> Value:
        owner, name = arguments
        if name.kind != "constant":
            return PLAIN
        if owner.kind == "module":
            return Value(
                "constant",
                constant=name.constant in {*self.listing.classes, *self.listing.enums, *self.listing.functions},
            )
        if owner.kind == "enum":
            return Value("constant", constant=name.constant in self.listing.enums[owner.name])
        kinds = (
            [kind for kind in owner.name.split("|") if kind in self.listing.classes]
            if owner.kind in ("class", "object")
            else []
        )
        has = {self.listing.attribute(kind, name.constant) is not None for kind in kinds}
        if len(has) == 1:
            return Value("constant", constant=has.pop())
        return PLAIN

    def _getattr(self, node: ast.Call, arguments: list[Value]) -> Value:
        owner, name, *default = arguments
        if name.kind != "constant":
            return Value("object", owner.name) if owner.kind == "enum" else UNKNOWN
        if default and _truth(self._hasattr([owner, name])) is False:
            return default[0]
        return self._attribute(node, owner, name.constant)

    def _call_own(
        self, owner: str, name: str, node: ast.Call, arguments: list[Value], keywords: dict[str | None, Value]
    ) -> Value:
        if name == _MAJOR_FUNCTION:
            return Value("constant", constant=self.listing.major)
        for kind in self._with_bases(owner):
            if (kind, name) in self.project.functions:
                self._pass_on(kind, name, node, arguments, keywords)
                return self._returned(kind, name)
        if name == "__init__" and owner in self.project.classes:
            fields = [
                part.target.id
                for part in self.project.classes[owner].body
                if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
            ]
            for field_name, value in [*zip(fields, arguments, strict=False), *keywords.items()]:
                self.project.learn(self.project.attributes, (owner, field_name), _passed(value))
        return UNKNOWN

    def _pass_on(
        self, owner: str, name: str, node: ast.Call, arguments: list[Value], keywords: dict[str | None, Value]
    ) -> None:
        definition = self.project.functions[owner, name].args
        names = [argument.arg for argument in [*definition.posonlyargs, *definition.args]]
        names = names[1:] if names[:1] in (["self"], ["cls"]) else names
        positional = [] if any(isinstance(argument, ast.Starred) for argument in node.args) else arguments
        for parameter, value in [*zip(names, positional, strict=False), *keywords.items()]:
            self.project.learn(self.project.parameters, (owner, name, parameter), _passed(value))

    def _returned(self, owner: str, name: str) -> Value:
        annotated = self._annotated(self.project.functions[owner, name].returns)
        return annotated if annotated != UNKNOWN else self.project.results.get((owner, name), UNKNOWN)

    def _call_theirs(
        self, node: ast.Call, function: Value, arguments: list[Value], keywords: dict[str | None, Value]
    ) -> Value:
        if function.kind == "class":
            self._check_call(
                node, f"{function.name}.__init__", self.listing.attribute(function.name, "__init__") or [], keywords
            )
            return Value("object", function.name)
        if function.kind != "method":
            return UNKNOWN
        # Of a class, not of an object, the method is called with the object: trt.ILogger.__init__(self).
        bound = not (isinstance(node.func, ast.Attribute) and self.value(node.func.value).kind == "class")
        results = set()
        for owner in function.owner.split("|"):
            ways = (
                self.listing.attribute(owner, function.name) if owner else self.listing.functions[function.name]
            ) or []
            if bound:
                self._check_call(node, f"{owner}.{function.name}".lstrip("."), ways, keywords)
            results |= {self.listing.result(way.partition("-> ")[2]) for way in ways}
        return functools.reduce(joined, results) if results else UNKNOWN

    def _check_call(
        self, node: ast.Call, label: str, ways: str | list[str], keywords: Mapping[str | None, Value]
    ) -> None:
        unpacked = None in keywords or any(isinstance(argument, ast.Starred) for argument in node.args)
        if ways and not unpacked and not any(_fits(_parameters(way), len(node.args), set(keywords)) for way in ways):
            self._problem(
                node,
                f"{label} takes ({') or ('.join(way.partition(' ->')[0] for way in ways)}), not {ast.unparse(node)}",
            )

    def _annotated(self, annotation: ast.expr | None) -> Value:
        """What an annotation says: a class of ours, one of TensorRT's as "trt.ICudaEngine", or a container of them."""
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            return self._annotated(ast.parse(annotation.value, mode="eval").body)
        if isinstance(annotation, ast.Name):
            return Value("own", annotation.id) if annotation.id in self.project.classes else UNKNOWN
        if (
            isinstance(annotation, ast.Attribute)
            and isinstance(annotation.value, ast.Name)
            and annotation.value.id == "trt"
        ):
            return self.listing.result(annotation.attr)
        if isinstance(annotation, ast.BinOp):
            return joined(self._annotated(annotation.left), self._annotated(annotation.right))
        if isinstance(annotation, ast.Subscript) and isinstance(annotation.value, ast.Name):
            parts = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
            inner = [self._annotated(part) for part in parts]
            if annotation.value.id in ("type", "Callable", "Literal"):
                return UNKNOWN
            return _list_of_any(inner)
        return UNKNOWN


def _is_property(node: ast.FunctionDef) -> bool:
    return any(
        isinstance(decorator, ast.Name) and decorator.id in ("property", "cached_property")
        for decorator in node.decorator_list
    )


def _list_of_any(values: Sequence[Value]) -> Value:
    """A container with a few values of one kind, and others."""
    return next((found for value in values if (found := list_of(value)) != UNKNOWN), UNKNOWN)


def _passed(value: Value) -> Value:
    """What a function knows of an argument: not its value, which is another one in another call."""
    return UNKNOWN if value.kind in ("constant", "plain") else value


def _truth(value: Value) -> bool | None:
    return bool(value.constant) if value.kind == "constant" else None


def _is_none(value: Value) -> bool | None:
    if value.kind == "constant":
        return value.constant is None
    return False if value.kind in ("module", "class", "enum") else None


def _known_or_plain(truth: bool | None, *, negated: bool) -> Value:
    return PLAIN if truth is None else Value("constant", constant=truth is not negated)


def _parameters(way: str) -> list[str]:
    return [name for name in way.partition("->")[0].replace(" ", "").split(",") if name]


def _fits(parameters: list[str], positional: int, keywords: set[str | None]) -> bool:
    names = [name.rstrip("=") for name in parameters]
    required = {name for name in parameters[positional:] if not name.endswith("=")}
    return positional <= len(names) and keywords <= set(names[positional:]) and required <= keywords
