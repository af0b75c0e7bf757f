"""Every hostile file meets what reads such files: it is refused with an error of ours, or does no harm.

`python -m tests.hostile.run` gives all of them to all commands.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mae_deploy.checkpoint import find_checkpoint, open_checkpoint
from mae_deploy.config import from_dict
from mae_deploy.data.config import Columns
from mae_deploy.data.sources.open import unlabelled_images
from mae_deploy.errors import MaeDeployError
from mae_deploy.images.find import find_images
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.images.read import UnreadableImage, read_image
from mae_deploy.pretrain.config import PretrainConfig
from mae_deploy.recipe import read_recipe, settings_of_run
from mae_deploy.runtime import Bundle
from mae_deploy.training.state.progress import damage
from mae_deploy.training.state.run_folder import read_metrics
from mae_deploy.weights.load import LoadedWeights, load_model, model_of
from mae_deploy.weights.read.convert import ImportOptions, import_weights
from tests.hostile.bundles import BUNDLES
from tests.hostile.data import DATA
from tests.hostile.folders import FOLDERS, changed, setting
from tests.hostile.pictures import BROKEN, HARMLESS, PICTURES
from tests.hostile.rare_pictures import RARE_PICTURES
from tests.hostile.rare_weights import RARE_WEIGHTS
from tests.hostile.run import CORPORA, FIXTURES
from tests.hostile.texts import RECIPES
from tests.hostile.weights import WEIGHTS_FILES

SLOW = (
    *("bomb", "4 TB", "1 TB", "just below the limit", "64 MB", "12,000 x 12,000", "10,000 pages", "200,000 nodes"),
    "config.yaml of nested",
)
"""Files that take a second to write or to refuse: for `python -m tests.hostile.run`."""

HARMLESS_WEIGHTS = ("metadata num_classes -1", "metadata class_names [1]")
"""Of a classifier, and it is none."""


def quick(files: Any) -> list[str]:
    return [name for name in files if not any(word in name for word in SLOW)]


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def check_error(*errors: Exception) -> None:
    """A few lines that a person can read."""
    assert len(errors) <= 21
    assert all(len(str(error)) < 1000 for error in errors)


def write(kind: str, name: str, folder: Path) -> Path:
    return Path(CORPORA[kind].files[name](folder))


@pytest.mark.parametrize("name", quick(WEIGHTS_FILES))
def test_weights(name: str, tmp_path: Path) -> None:
    given = write("checkpoint", name, tmp_path)
    refused: object = None
    try:
        model, loaded = load_model(given)
        spec = from_dict(Preprocess, loaded.metadata.preprocess)
        refused = spec.image_size != model.config.image_size
    except MaeDeployError as error:
        refused = error
    assert not (tmp_path / "CANARY").exists()
    assert refused or name in HARMLESS_WEIGHTS, "it was read"


@pytest.mark.parametrize("name", [name for name in RARE_WEIGHTS if "10^5" not in name])
def test_rare_weights(name: str, tmp_path: Path) -> None:
    given = write("checkpoint", name, tmp_path)
    try:
        if given.is_file():  # what the tensors do not tell
            imported = import_weights(given, ImportOptions(image_size=(25, 10), num_heads=3))
            model_of(LoadedWeights(imported.metadata, imported.tensors, {}))
        else:
            load_model(given)
    except MaeDeployError:
        assert name.startswith(BROKEN), "it is whole"
    else:
        assert not name.startswith(BROKEN), "it was read"


@pytest.mark.parametrize("name", quick(BUNDLES))
def test_bundles(name: str, tmp_path: Path) -> None:
    given = write("bundle", name, tmp_path)
    try:
        bundle = Bundle.load(given)
        bundle.graph()
        bundle.golden()
        bundle.check_files()
    except MaeDeployError:
        return
    for file in bundle.manifest["files"]:
        assert (given / file).resolve().is_relative_to(given.resolve())


@pytest.mark.parametrize("name", quick({**PICTURES, **RARE_PICTURES}))
def test_images(name: str, tmp_path: Path) -> None:
    given = write("image", name, tmp_path)
    try:
        image = read_image(given)
    except UnreadableImage as error:
        check_error(error)
        assert not name.startswith(HARMLESS)
        return
    assert not name.startswith(BROKEN), "it was read"
    assert isinstance(image, Image.Image)
    assert image.width * image.height <= 1 << 20
    assert image.mode == "RGB"


@pytest.mark.parametrize("name", quick(DATA))
def test_data(name: str, tmp_path: Path) -> None:
    given = DATA[name](tmp_path)
    try:
        if str(given).startswith("@"):
            find_images(given)
            return
        source = unlabelled_images(given, Columns())
    except MaeDeployError as error:
        check_error(error)
        return
    for index in range(len(source)):
        try:
            content = source.raw(index)
        except (UnreadableImage, MaeDeployError):
            continue
        if not content.startswith(b"\x89PNG"):  # a row may name any file, of which nothing but an image is made
            with pytest.raises(UnreadableImage):
                read_image(given, content=content)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name: str, tmp_path: Path) -> None:
    given = write("recipe", name, tmp_path)
    try:
        from_dict(PretrainConfig, {"data": "images", "out": "run", **read_recipe(given)})
    except MaeDeployError as error:
        check_error(*error.errors)
    assert not (tmp_path / "CANARY").exists()


@pytest.mark.parametrize("name", quick(CORPORA["run"].files))
def test_runs(name: str, tmp_path: Path) -> None:
    given = write("run", name, tmp_path)
    for read in (
        lambda: settings_of_run({"data": str(given), "resume": True}),
        lambda: read_metrics(given),
        lambda: open_checkpoint(given),
        lambda: damage(find_checkpoint(given) or given),
    ):
        try:
            read()
        except MaeDeployError as error:
            check_error(error)
    assert not (tmp_path / "CANARY").exists()
    assert not (Path.cwd() / "CANARY").exists()


@pytest.mark.parametrize("name", [name for name in FOLDERS if name.startswith(HARMLESS)])
def test_whole_folders(name: str, tmp_path: Path) -> None:
    load_model(FOLDERS[name](tmp_path))


@pytest.mark.parametrize("name", quick([name for name in FOLDERS if not name.startswith(HARMLESS)])[::10])
def test_folders(name: str, tmp_path: Path) -> None:
    """A tenth of them: there are hundreds, and timm builds a network for each of its own."""
    with suppress(MaeDeployError):
        load_model(FOLDERS[name](tmp_path))


@pytest.mark.parametrize(
    ("family", "part", "place", "value", "message"),
    [
        ("hf", 0, "layer_norm_eps", None, "layer_norm_eps None, which is no positive number"),
        ("hf", 0, "num_hidden_layers", 12, "another model: num_hidden_layers 12, and the weights have 2"),
        ("hf", 0, "hidden_size", 768, "another model: hidden_size 768"),
        ("hf", 0, "patch_size", 16, "another model: patch_size"),
        ("hf", 0, "qkv_bias", "no", "qkv_bias 'no', which is no true or false"),
        ("hf", 0, "model_type", "siglip", "no vision_config"),
        ("hf", 1, "rescale_factor", 0, "rescale_factor 0, which is no positive number"),
        ("hf", 1, "image_std", ["a"] * 3, "for a mean or a deviation"),
        ("hf", 1, "size.height", "x", "is not a height and width"),
        ("timm", 0, "model_args.depth", 10**9, "depth 1000000000, which its weights have not"),
        ("timm", 0, "pretrained_cfg.std", -1, "std -1, which is no numbers"),
        ("timm", 0, "pretrained_cfg.crop_pct", "x", "crop_pct 'x'"),
        ("timm", 0, "pretrained_cfg.license", [], "license"),
    ],
)
def test_settings_of_folders_are_believed_only_where_they_can_be(
    family: str, part: int, place: str, value: object, message: str, tmp_path: Path
) -> None:
    with pytest.raises(MaeDeployError, match=message):
        load_model(changed(family, setting(part, place, value))(tmp_path))


def test_the_fixtures_are_whole(tmp_path: Path) -> None:
    """What every hostile file is made of is accepted: else it would be refused for that."""
    load_model(Path(shutil.copytree(FIXTURES / "checkpoints/mae", tmp_path / "checkpoint")))
    bundle = Bundle.load(shutil.copytree(FIXTURES / "bundles/visible", tmp_path / "bundle"))
    bundle.check_files()
    assert bundle.graph().is_file()
    assert bundle.golden()
