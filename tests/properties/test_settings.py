"""Settings come back as they were through plain values, YAML, and the command line."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mae_deploy.cli import main
from mae_deploy.config import field_types, from_dict, is_required, merge, optional_of, to_dict, to_yaml
from mae_deploy.data.config import CropConfig
from mae_deploy.errors import ConfigError
from mae_deploy.pretrain.config import FinetuneConfig, PretrainConfig
from mae_deploy.recipe import parse_assignment
from mae_deploy.runtime.tolerance import Tolerance
from mae_deploy.training.config import LoopConfig, OptimConfig
from tests.shipped_settings import commands, sections_of

SECTIONS = sorted({section for command in commands() for section in sections_of(command)}, key=lambda cls: cls.__name__)

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=9)


def values_of(kind: Any, bounds: dict[str, float]) -> st.SearchStrategy[Any]:
    """Values of an annotation, most of them within its bounds."""
    kind, optional = optional_of(kind)
    least = bounds.get("at_least", bounds.get("above", -9))
    most = bounds.get("at_most", bounds.get("below", max(least, 0) + 99))
    found: st.SearchStrategy[Any]
    if get_origin(kind) is Literal:
        found = st.sampled_from(get_args(kind))
    elif get_origin(kind) is tuple:
        kinds = get_args(kind)
        found = (
            st.lists(values_of(kinds[0], bounds), max_size=3)
            if kinds[-1] is Ellipsis
            else st.tuples(*(values_of(one, bounds) for one in kinds))
        ).map(tuple)
    elif kind is bool:
        found = st.booleans()
    elif kind is int:
        found = st.integers(int(least), int(most))
    elif kind is float:
        found = st.floats(least, most, allow_nan=False)
    elif kind is Path:
        found = st.sampled_from([Path("a"), Path("b/c d"), Path("grid.png")])
    elif kind is str:
        found = TEXT | st.just("hf://org/name")
    else:
        found = st.nothing()
    return found | st.none() if optional else found


def configs(cls: type) -> st.SearchStrategy[Any]:
    """Settings of a class with some of its fields set, where they go together."""
    kinds = field_types(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    drawn = {name: values_of(kinds[name], fields[name].metadata.get("bounds", {})) for name in kinds}
    plain = {name: strategy for name, strategy in drawn.items() if not strategy.is_empty}
    required = {name: plain.pop(name) for name in list(plain) if is_required(fields[name])}

    def built(values: dict[str, Any]) -> Any:
        """With those values that go with the ones before them; None where the first do not."""
        given_ = {name: values.pop(name) for name in required}
        found: Any = None
        for more in ({}, *({name: value} for name, value in values.items())):
            with contextlib.suppress(ConfigError):
                found = from_dict(cls, {**given_, **more})
                given_ |= more
        return found

    return st.fixed_dictionaries(required, optional=plain).map(built)


@pytest.mark.parametrize("cls", SECTIONS, ids=lambda cls: cls.__name__)
def test_plain_values_and_yaml_give_the_same_settings(cls: type) -> None:
    @settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
    @given(config=configs(cls))
    def check(config: Any) -> None:
        assume(config is not None)
        plain = to_dict(config)
        assert from_dict(cls, plain) == config
        assert from_dict(cls, yaml.safe_load(to_yaml(config))) == config
        assert to_dict(from_dict(cls, plain)) == plain

    check()


OPTIONS: dict[str, tuple[type, str]] = {
    "--epochs": (OptimConfig, "epochs"),
    "--lr": (OptimConfig, "lr"),
    "--warmup-epochs": (OptimConfig, "warmup_epochs"),
    "--weight-decay": (OptimConfig, "weight_decay"),
    "--min-scale": (CropConfig, "min_scale"),
    "--hflip": (CropConfig, "hflip"),
    "--precision": (LoopConfig, "precision"),
    "--keep-checkpoints": (LoopConfig, "keep_checkpoints"),
    "--mask-ratio": (PretrainConfig, "mask_ratio"),
}


@given(data=st.data())
def test_an_option_is_what_a_recipe_says(
    data: st.DataObject, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same values as flags, as `--set` and in a recipe are the same settings."""
    sections = {OptimConfig: "optim", CropConfig: "augment", LoopConfig: "loop", PretrainConfig: None}
    chosen = data.draw(st.lists(st.sampled_from(sorted(OPTIONS)), min_size=1, max_size=4, unique=True))
    flags: list[str] = []
    assignments: list[str] = []
    recipe: dict[str, Any] = {}
    for option in chosen:
        cls, name = OPTIONS[option]
        (field,) = (field for field in dataclasses.fields(cls) if field.name == name)
        value = data.draw(values_of(field_types(cls)[name], field.metadata.get("bounds", {})))
        assume(value is not None)
        section = sections[cls]
        flags.append(f"{option}={value}")
        assignments += ["--set", f"{f'{section}.' if section else ''}{name}={value}"]
        recipe = merge(recipe, {section: {name: value}} if section else {name: value})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    found = []
    for words in (flags, assignments, ["--recipe", str(tmp_path / "recipe.yaml")]):
        code = main(["pretrain", "images", "--out", "run", *words, "--dump-config", "-"])
        said = capsys.readouterr()
        found.append((code, said.out, said.err.count("error:")))
    assert found[0][0] in (0, 2)
    assert found[0] == found[1] == found[2]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("cls", [PretrainConfig, FinetuneConfig, Tolerance], ids=lambda cls: cls.__name__)
def test_anything_is_settings_or_an_error_of_ours(cls: type) -> None:
    names = st.sampled_from(sorted(field_types(cls))) | st.text(max_size=9)

    @given(values=st.dictionaries(names, JSON, max_size=4))
    def check(values: dict[str, Any]) -> None:
        with contextlib.suppress(ConfigError):
            from_dict(cls, values)

    check()


@given(text=st.text(max_size=30))
def test_an_assignment_is_a_setting_or_an_error_of_ours(text: str) -> None:
    for words in (text, f"a={text}", f"a.b={text}"):
        with contextlib.suppress(ConfigError):
            assert isinstance(parse_assignment(words), dict)
