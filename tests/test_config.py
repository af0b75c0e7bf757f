"""Settings are read strictly, written plainly, and every one that ships explains itself."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from mae_deploy import recipe as recipe_module
from mae_deploy.checkpoint import Metadata
from mae_deploy.commands.config import DoctorConfig, InfoConfig, PredictConfig, VerifyConfig
from mae_deploy.commands.quickstart.config import QuickstartConfig
from mae_deploy.commands.weights.config import ImportConfig
from mae_deploy.config import (
    Settings,
    differences,
    field_docs,
    field_types,
    fixed_settings,
    from_dict,
    is_required,
    merge,
    optional_of,
    section,
    setting,
    to_dict,
    to_yaml,
)
from mae_deploy.distill.config import DistillConfig
from mae_deploy.errors import ConfigError
from mae_deploy.evaluation.config import LinprobeConfig
from mae_deploy.export.config import ExportConfig
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.pretrain.config import FinetuneConfig, PretrainConfig, ReconstructConfig
from mae_deploy.recipe import RECIPES, parse_assignment, read_recipe
from mae_deploy.weights.read.convert import ImportOptions
from tests.shipped_settings import commands, sections_of

# Each command's config with what it requires.
COMMANDS: list[tuple[type, dict[str, Any]]] = [
    (PretrainConfig, {"data": "images", "out": "run"}),
    (FinetuneConfig, {"data": "images", "out": "run", "init": "pretrained"}),
    (DistillConfig, {"data": "images", "out": "run", "teacher": "pretrained", "student": "vit_tiny_patch16"}),
    (LinprobeConfig, {"data": "images", "out": "run", "init": "pretrained"}),
    (ReconstructConfig, {"images": "images", "checkpoint": "run", "out": "grid.png"}),
    (ExportConfig, {"checkpoint": "run", "out": "bundle"}),
    (ImportConfig, {"source": "weights.pth", "out": "checkpoint"}),
    (VerifyConfig, {"bundle": "bundle"}),
    (PredictConfig, {"bundle": "bundle", "images": "images"}),
    (InfoConfig, {"path": "run"}),
    (DoctorConfig, {}),
    (QuickstartConfig, {}),
]

SHIPPED = list(
    dict.fromkeys(
        [*(cls for command in commands() for cls in sections_of(command)), Metadata, ImportOptions, Preprocess]
    )
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Oven:
    """Oven."""

    degrees: float = 180.0
    """Temperature in °C."""
    fan: bool = False
    """Whether the air moves."""
    trays: int = 1
    """How many trays
    stand above each other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cake:
    """Cake."""

    name: str
    """What it is called."""
    shape: Literal["round", "square"] = "round"
    """Form of the tin."""
    size: tuple[int, int] = (26, 26)
    """Length and width in cm."""
    layers: tuple[float, ...] | None = None
    """Heights in cm."""
    recipe: Path | None = None
    """Where it is written down."""
    eggs: int | None = setting(None, hidden=True)
    """Number of eggs."""
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Anything."""
    oven: Oven = section(Oven, degrees=160.0, trays=2)


def cake(**values: Any) -> Cake:
    return from_dict(Cake, {"name": "plum", **values})


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("name", "3", "3"),
        ("size", "24", (24, 24)),
        ("size", 24, (24, 24)),
        ("size", "24,36", (24, 36)),
        ("size", " 24, 36 ", (24, 36)),
        ("size", [24, 36], (24, 36)),
        ("size", ("24", 36.0), (24, 36)),
        ("layers", "1.5,2,1e-1", (1.5, 2.0, 0.1)),
        ("layers", 3, (3.0,)),
        ("layers", [], ()),
        ("layers", None, None),
        ("recipe", "book/7.txt", Path("book/7.txt")),
        ("recipe", Path("book"), Path("book")),
        ("recipe", None, None),
        ("shape", "square", "square"),
        ("eggs", "5", 5),
        ("eggs", 5.0, 5),
        ("eggs", "5.0", 5),
        # Too large for a float to hold every digit.
        ("eggs", 2**60 + 1, 2**60 + 1),
        ("notes", {"a": [1]}, {"a": [1]}),
    ],
)
def test_values_are_read_into_their_types(field: str, value: Any, expected: Any) -> None:
    found = getattr(cake(**{field: value}), field)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("name", 3, "name 3 is not text"),
        ("name", None, "name None is not text"),
        ("shape", "rond", "shape 'rond' is not one of round, square"),
        ("shape", ["round"], r"shape \['round'\] is not one of"),
        ("size", "24,36,48", "size '24,36,48' is not one value or 2 separated by commas"),
        ("size", "", "size '' is not one value or 2 separated by commas"),
        ("size", "24,x", "size 'x' is not a whole number"),
        ("size", None, "size None is not a whole number"),
        ("layers", "1,two", "layers 'two' is not a number"),
        ("layers", [True], "layers True is not a number"),
        ("layers", "nan", "layers 'nan' is not a number"),
        ("recipe", 7, "recipe 7 is not a path"),
        ("eggs", 3.5, "eggs 3.5 is not a whole number"),
        ("eggs", "3.5", "eggs '3.5' is not a whole number"),
        ("eggs", "inf", "eggs 'inf' is not a whole number"),
        ("eggs", True, "eggs True is not a whole number"),
        ("notes", "text", "notes 'text' is not a dict"),
        ("oven", 3, "oven 3 is not a section of settings"),
        ("oven", {"fan": 1}, r"oven\.fan 1 is not true or false"),
        ("oven", {"fan": "yes"}, r"oven\.fan 'yes' is not true or false"),
        ("oven", {"degrees": {}}, r"oven\.degrees \{\} is not a number"),
    ],
)
def test_wrong_types_are_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cake(**{field: value})


@pytest.mark.parametrize(
    ("values", "message", "hint"),
    [
        ({"shap": "round"}, "unknown setting 'shap'", "did you mean 'shape'?"),
        ({"oven": {"degree": 3}}, "unknown setting 'oven.degree'", "did you mean 'degrees'?"),
        ({"oven": {"xyz": 3}}, "unknown setting 'oven.xyz'", "known: degrees, fan, trays"),
        ({"shape": "squar"}, "shape 'squar' is not one of round, square", "did you mean 'square'?"),
    ],
)
def test_misspelt_names_get_a_suggestion(values: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cake(**values)
    assert str(caught.value) == message
    assert caught.value.hint == hint
    assert caught.value.exit_code == 2


def test_a_required_setting_is_missing() -> None:
    with pytest.raises(ConfigError, match="missing setting 'name'"):
        from_dict(Cake, {})
    with pytest.raises(ConfigError, match=r"missing setting 'menu\.name'"):
        from_dict(Cake, {}, where="menu.")


def test_yaml_numbers_that_are_strings() -> None:
    values = yaml.safe_load("oven: {degrees: 1e-3, trays: 3}")
    assert values["oven"]["degrees"] == "1e-3", "YAML 1.1 reads it as text, which is why it is read again"
    assert cake(**values).oven == Oven(degrees=0.001, trays=3)


def test_a_partial_section_keeps_the_defaults_of_its_place() -> None:
    assert Oven().degrees == 180
    assert cake().oven == Oven(degrees=160, trays=2)
    assert cake(oven={"fan": True}).oven == Oven(degrees=160, trays=2, fan=True)
    assert cake(oven={"trays": 3}).oven == Oven(degrees=160, trays=3)
    assert cake(oven={}).oven == Oven(degrees=160, trays=2)
    # A section that is built already is taken as it is.
    assert cake(oven=Oven()).oven == Oven()


def test_shipped_sections_keep_the_defaults_of_their_place() -> None:
    finetune = from_dict(
        FinetuneConfig, {"data": "d", "out": "o", "init": "i", "optim": {"batch_size": 7}, "augment": {"hflip": 0}}
    )
    assert (
        finetune.optim.batch_size,
        finetune.optim.epochs,
        finetune.optim.blr,
        finetune.optim.min_lr,
        finetune.optim.betas,
    ) == (
        7,
        100,
        5e-4,
        1e-6,
        (0.9, 0.999),
    )
    assert finetune.augment.min_scale == 0.08
    pretrain = from_dict(PretrainConfig, {"data": "d", "out": "o", "optim": {"batch_size": 7}})
    assert (pretrain.optim.epochs, pretrain.optim.blr, pretrain.optim.betas) == (800, 1.5e-4, (0.9, 0.95))
    assert (pretrain.mask_ratio, pretrain.norm_pix_loss, pretrain.augment.min_scale, pretrain.optim.weight_decay) == (
        0.75,
        True,
        0.2,
        0.05,
    )


def test_merge_goes_section_by_section() -> None:
    base = {"a": 1, "b": {"c": 2, "d": {"e": 3}}}
    assert merge(base, {"b": {"d": {"f": 4}}, "g": 5}) == {"a": 1, "b": {"c": 2, "d": {"e": 3, "f": 4}}, "g": 5}
    assert merge(base, {"a": {"b": 1}, "b": 2}) == {"a": {"b": 1}, "b": 2}
    assert base == {"a": 1, "b": {"c": 2, "d": {"e": 3}}}, "the base was changed"


# --- recipes and assignments -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=3", {"a": 3}),
        ("a.b.c=text", {"a": {"b": {"c": "text"}}}),
        ("a=b=c", {"a": "b=c"}),
        ("a=", {"a": None}),
        ("a=[1, 2]", {"a": [1, 2]}),
        ("a={b: yes}", {"a": {"b": True}}),
    ],
)
def test_assignments(text: str, expected: dict[str, Any]) -> None:
    assert parse_assignment(text) == expected


@pytest.mark.parametrize("text", ["a", "=3", "", "a=[", "a='", "a={b: ]"])
def test_assignments_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--set") as caught:
        parse_assignment(text)
    assert caught.value.hint is not None
    assert "\n" not in str(caught.value)


def test_a_recipe_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "plum.yaml"
    file.write_text("oven: {fan: true}\n", encoding="utf-8")
    assert read_recipe(file) == read_recipe(str(file)) == {"oven": {"fan": True}}
    file.write_text("# nothing yet\n", encoding="utf-8")
    assert read_recipe(file) == {}


def test_a_recipe_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plum.yaml").write_text("name: plum\n", encoding="utf-8")
    (tmp_path / "apple.yaml").write_text("name: apple\n", encoding="utf-8")
    monkeypatch.setattr(recipe_module, "RECIPES", tmp_path)
    assert read_recipe("plum") == {"name": "plum"}
    with pytest.raises(ConfigError, match="no recipe 'pear'") as caught:
        read_recipe("pear")
    assert caught.value.hint == "give a YAML file or one of: apple, plum"


@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe\x00", b"- 1\n- 2\n", b"text", b"a: b: c"])
def test_recipes_that_cannot_be_read(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "broken.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"recipe .*broken\.yaml (is not YAML|must be a mapping)") as caught:
        read_recipe(file)
    assert "\n" not in str(caught.value)


def test_recipes_never_build_objects(tmp_path: Path) -> None:
    file, marker = tmp_path / "evil.yaml", tmp_path / "marker"
    file.write_text(f"a: !!python/object/apply:os.system [\"echo run > '{marker}'\"]\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="is not YAML"):
        read_recipe(file)
    assert not marker.exists()


def test_a_recipe_that_extends_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Section by section; a file beside it comes before a recipe of the package."""
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    monkeypatch.setattr(recipe_module, "RECIPES", shipped)
    (shipped / "plain.yaml").write_text("shape: round\noven: {degrees: 180, trays: 3}\n", encoding="utf-8")
    (shipped / "hot.yaml").write_text("extends: plain\noven: {degrees: 220}\n", encoding="utf-8")
    (tmp_path / "mine.yaml").write_text("extends: hot\nname: mine\noven: {fan: true}\n", encoding="utf-8")
    (tmp_path / "yours.yaml").write_text("extends: mine.yaml\nname: yours\n", encoding="utf-8")
    assert read_recipe(tmp_path / "yours.yaml") == {
        "name": "yours",
        "shape": "round",
        "oven": {"degrees": 220, "trays": 3, "fan": True},
    }


def test_recipes_that_extend_nothing_or_each_other(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("extends: gone\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="no recipe 'gone'"):
        read_recipe(first)
    first.write_text("extends: second.yaml\n", encoding="utf-8")
    second.write_text("extends: first.yaml\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"first\.yaml extends itself, by way of second"):
        read_recipe(first)


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: str(file.stem))
def test_shipped_recipes_fit_a_command(file: Path) -> None:
    values = read_recipe(file.stem)
    fitting = []
    for config, required in COMMANDS[:4]:
        try:
            from_dict(config, merge(values, required))
            fitting.append(config.__name__)
        except ConfigError:
            continue
    assert fitting, f"no command takes {file.name}"


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "required"), COMMANDS, ids=lambda value: value.__name__ if isinstance(value, type) else ""
)
def test_every_command_config_survives_yaml_and_json(config: type, required: dict[str, Any]) -> None:
    first: Any = from_dict(config, required)
    assert from_dict(config, yaml.safe_load(to_yaml(first))) == first
    assert from_dict(config, json.loads(json.dumps(to_dict(first)))) == first


def test_values_away_from_the_defaults_survive() -> None:
    changed = cake(
        shape="square",
        size="24,36",
        layers=[1.5, 2],
        recipe="a/b",
        eggs=3,
        notes={"x": [1, None]},
        oven={"degrees": 1e-7, "fan": True},
    )
    assert to_dict(changed) == {
        "name": "plum",
        "shape": "square",
        "size": [24, 36],
        "layers": [1.5, 2.0],
        "recipe": "a/b",
        "eggs": 3,
        "notes": {"x": [1, None]},
        "oven": {"degrees": 1e-7, "fan": True, "trays": 2},
    }
    assert from_dict(Cake, yaml.safe_load(to_yaml(changed))) == changed


def test_differences() -> None:
    old = cake()
    assert differences(old, old) == []
    new = cake(size=24, oven={"degrees": 200, "fan": True})
    assert differences(old, new) == [
        "size: 26,26 -> 24,24",
        "oven.degrees: 160 -> 200",
        "oven.fan: no -> yes",
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Heat(Settings, resume="fixed"):
    """Heat."""

    degrees: float = 180.0
    """Temperature in °C."""
    minutes: int = setting(40, resume="free")
    """How long."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pie(Settings):
    """Pie."""

    name: str = setting(resume="free")
    """What it is called."""
    slices: int = setting(8, resume="fixed")
    """How many."""
    heat: Heat = section(Heat)


def test_what_may_change_where_a_command_goes_on() -> None:
    old = Pie(name="plum")
    new = Pie(name="pear", slices=6, heat=Heat(degrees=200.0, minutes=30))
    assert differences(old, new) == ["slices: 8 -> 6", "heat.degrees: 180 -> 200"]
    assert differences(old, Pie(name="pear", heat=Heat(minutes=30))) == []
    assert fixed_settings(new) == {"slices": 6, "heat": {"degrees": 200.0}}


# --- types and help --------------------------------------------------------------------------------------------------


def test_docs_are_the_strings_below_the_fields() -> None:
    assert field_docs(Oven) == {
        "degrees": "Temperature in °C.",
        "fan": "Whether the air moves.",
        "trays": "How many trays stand above each other.",
    }
    assert field_types(Oven) == {"degrees": float, "fan": bool, "trays": int}


def test_required_and_optional() -> None:
    assert [field.name for field in dataclasses.fields(Cake) if is_required(field)] == ["name"]
    assert optional_of(int | None) == (int, True)
    assert optional_of(int) == (int, False)
    assert optional_of(int | str | None) == (int | str | None, False)


def test_configs_that_ship_are_found() -> None:
    names = {config.__name__ for config in SHIPPED}
    assert {config.__name__ for config, _ in COMMANDS} <= names
    assert {
        "EncoderConfig",
        "DecoderConfig",
        "OptimConfig",
        "LoopConfig",
        "DataConfig",
        "CropConfig",
        "MixConfig",
        "Metadata",
        "ImportOptions",
    } <= names


@pytest.mark.parametrize("config", SHIPPED, ids=lambda config: config.__name__)
def test_every_shipped_setting_is_explained(config: type) -> None:
    docs, kinds = field_docs(config), field_types(config)
    plain = [name for name, kind in kinds.items() if not dataclasses.is_dataclass(optional_of(kind)[0])]
    assert [name for name in plain if not docs.get(name, "").endswith(".")] == []
    assert (config.__doc__ or "").endswith("."), "the help panel's title"
    assert getattr(config, "__dataclass_params__").frozen  # noqa: B009  (mypy does not know the name)
    assert "__slots__" in vars(config)
    assert all(field.kw_only for field in dataclasses.fields(config))


# --- checks across settings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (PretrainConfig, {"mask_ratio": 1.0}, "mask_ratio must be above 0 and below 1, got 1.0"),
        (PretrainConfig, {"mask_ratio": 0.0}, "mask_ratio must be above 0 and below 1, got 0.0"),
        (PretrainConfig, {"mask_ratio": 0.999}, "--mask-ratio 0.999 of 196 patches leaves nothing to see"),
        (
            PretrainConfig,
            {"mask_ratio": 0.75, "model": {"image_size": 16}},
            "--mask-ratio 0.75 of 1 patches leaves nothing",
        ),
        (PretrainConfig, {"pictures_every": 0}, "pictures_every must be at least 1, got 0"),
        (PretrainConfig, {"optim": {"epochs": 0}}, "optim.epochs must be at least 1 and at most 100000, got 0"),
        (PretrainConfig, {"optim": {"lr": -1}}, "optim.lr must be at least 0, got -1.0"),
        (PretrainConfig, {"optim": {"clip_grad": 0}}, "optim.clip_grad must be above 0, got 0.0"),
        (PretrainConfig, {"loop": {"keep_checkpoints": 0}}, "loop.keep_checkpoints must be at least 1, got 0"),
        (PretrainConfig, {"images": {"crop_pct": 1.5}}, "images.crop_pct must be above 0 and at most 1, got 1.5"),
        (PretrainConfig, {"augment": {"min_scale": 2}}, "--min-scale 2 must be at most max_scale, 1"),
        (FinetuneConfig, {"init": None}, "--init is missing"),
        (FinetuneConfig, {"init": None, "from_scratch": True}, "--init is missing"),
        (FinetuneConfig, {"layer_decay": 0}, "layer_decay must be above 0 and at most 1, got 0.0"),
        (
            FinetuneConfig,
            {"mix": {"label_smoothing": 1}},
            "mix.label_smoothing must be at least 0 and below 1, got 1.0",
        ),
        (
            DistillConfig,
            {"features": {"feature_weight": -1}},
            "features.feature_weight must be at least 0, got -1.0",
        ),
        (DistillConfig, {"logits": {"temperature": 0}}, "logits.temperature must be above 0, got 0.0"),
        (ReconstructConfig, {"out": "grid.jpg"}, "--out grid.jpg must end in .png"),
        (ExportConfig, {"tokens": "visible:0"}, "--tokens 'visible:0' is not"),
        (ExportConfig, {"tokens": "some"}, "--tokens 'some' is not"),
        (ExportConfig, {"batch": "0"}, "--batch '0' is not"),
        (PredictConfig, {"top_k": 0}, "top_k must be at least 1, got 0"),
        (QuickstartConfig, {"seeds": []}, "--seeds '' must be at least one seed"),
    ],
)
def test_combinations_that_cannot_be_used(config: type, values: dict[str, Any], message: str) -> None:
    required = dict(next(required for known, required in COMMANDS if known is config))
    with pytest.raises(ConfigError) as caught:
        from_dict(config, merge(required, values))
    assert message in str(caught.value)


def test_no_default_is_infinite_or_nan() -> None:
    def numbers(value: Any) -> list[float]:
        if isinstance(value, dict):
            value = list(value.values())
        return (
            [number for item in value for number in numbers(item)]
            if isinstance(value, list)
            else [value]
            if isinstance(value, float)
            else []
        )

    for config, required in COMMANDS:
        assert all(math.isfinite(number) for number in numbers(to_dict(from_dict(config, required)))), config


def test_ranges_of_whole_numbers() -> None:
    for value in ("0-3,7", ["0-3", 7], "0-3, 7"):
        assert from_dict(PredictConfig, {"bundle": "b", "images": ["i"], "keep": value}).keep == (0, 1, 2, 3, 7)
    assert from_dict(PredictConfig, {"bundle": "b", "images": ["i"], "affinity": "2-3"}).affinity == (2, 3)
    for value in ("3-0", "0-9999999", "0-", "1-2-3"):
        with pytest.raises(ConfigError, match=rf"^keep '{value}' is not "):
            from_dict(PredictConfig, {"bundle": "b", "images": ["i"], "keep": value})


@pytest.mark.parametrize("path", ["a\0b", "\ud800"])
def test_paths_that_no_file_can_have(path: str) -> None:
    with pytest.raises(ConfigError, match="is not a path"):
        from_dict(Cake, {"recipe": path})
