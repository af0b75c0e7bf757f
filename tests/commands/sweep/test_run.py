"""A sweep trains every value, judges it, draws the curve, and after a kill does only what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mae_deploy.cli import main
from mae_deploy.commands.sweep import run as sweep
from mae_deploy.commands.sweep.config import SweepConfig
from mae_deploy.commands.sweep.run import run_sweep
from mae_deploy.config import to_yaml
from mae_deploy.errors import ConfigError
from mae_deploy.evaluation.config import FeaturesConfig
from mae_deploy.pretrain import finetune
from mae_deploy.pretrain import run as pretrain
from mae_deploy.recipe import read_recipe
from mae_deploy.training.runner import TrainingRunner
from tests.training.tiny_runs import finetuning, optim, pretraining


@pytest.fixture
def recipes(tmp_path: Path, classes: Path) -> dict[str, str]:
    """Recipes of one epoch each."""
    for name, config in (
        ("pretrain", pretraining(classes, tmp_path, optim=optim(epochs=1, batch_size=6))),
        ("finetune", finetuning(classes, tmp_path, tmp_path, optim=optim(epochs=1, batch_size=6))),
    ):
        (tmp_path / f"{name}.yaml").write_text(to_yaml(config), encoding="utf-8")
    return {"recipe": str(tmp_path / "pretrain.yaml"), "finetune_recipe": str(tmp_path / "finetune.yaml")}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was trained: the last parts of the run folders, in turn."""
    folders: list[str] = []

    def watch(module: Any, name: str) -> None:
        real = getattr(module, name)

        def watched(config: Any) -> Any:
            folders.append("/".join(config.out.parts[-3:]))
            return real(config)

        monkeypatch.setattr(module, name, watched)

    watch(pretrain, "run_pretrain")
    watch(finetune, "run_finetune")
    return folders


def sweeping(data: Path, out: Path, **more: Any) -> SweepConfig:
    if "over" not in more:
        more = {"mask_ratio": (0.5, 0.75), **more}
    return SweepConfig(
        data=str(data),
        out=out,
        **{"linear": "ridge", "features": FeaturesConfig(num_workers=0), "k": 3, "device": "cpu", **more},
    )


def test_mask_ratios(classes: Path, recipes: dict[str, str], tmp_path: Path, trained: list[str]) -> None:
    out = tmp_path / "sweep"
    found = run_sweep(sweeping(classes, out, seeds=(0, 3), scratch=True, **recipes)).data
    parts = ("pretrain", "finetune")
    assert trained == [
        *(f"mask_ratio-0.5/seed-0/{part}" for part in parts),
        "scratch/seed-0/finetune",
        *(f"mask_ratio-0.5/seed-3/{part}" for part in parts),
        "scratch/seed-3/finetune",  # once for each seed: the encoder is the same
        *(f"mask_ratio-0.75/seed-{seed}/{part}" for seed in (0, 3) for part in parts),
    ]
    assert (found["setting"], found["seeds"], [row["value"] for row in found["rows"]]) == (
        "mask_ratio",
        [0, 3],
        [0.5, 0.75],
    )
    for row in found["rows"]:
        assert row["knn_top1"] == row["linear_top1"] == 100.0  # dark and light
        assert len(row["finetune_top1_by_seed"]) == 2
        assert row["loss_range"][0] < row["loss"] < row["loss_range"][1]
    first, second = found["rows"]
    assert first["scratch_top1_by_seed"] == second["scratch_top1_by_seed"]
    assert first["loss"] != second["loss"]
    stored = read_recipe(out / "mask_ratio-0.75" / "seed-3" / "pretrain" / "config.yaml")
    assert (stored["mask_ratio"], stored["seed"], stored["data"]) == (0.75, 3, str(classes / "train"))
    assert json.loads((out / "sweep.json").read_text())["rows"] == found["rows"]
    assert (out / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    page = (out / "sweep.md").read_text()
    assert "| mask_ratio | loss | fine-tuning, % | linear, % | k-NN, % | from scratch, % |" in page
    assert "--mask-ratio 0.5,0.75" in page


def test_the_plan_is_said_before_and_is_no_matter_of_days(
    classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without recipes 50 epochs and 20, not the paper's 800 and 100; --model, --epochs and --batch-size are options."""
    seen: list[Any] = []

    def stop(config: Any, setting: str, cell: Any) -> Any:
        seen.append(cell.pretrain)
        raise ConfigError("far enough")

    monkeypatch.setattr(sweep, "_probe", stop)
    call = ["sweep", str(classes), "--mask-ratio", "0.5,0.75", "--device", "cpu", "--out"]
    assert main([*call, str(tmp_path / "a")]) == 2
    said = capsys.readouterr().err
    assert "plan: vit_base_patch16 at 224x224 pretrained 2 times for 50 epochs, fine-tuned 2 times for 20: 140" in said
    more = ["--model=vit_nano_patch4", "--epochs=3", "--batch-size=7", "--no-finetune"]
    assert main([*call, str(tmp_path / "b"), *more]) == 2
    assert "plan: vit_nano_patch4 at 224x224 pretrained 2 times for 3 epochs: 6 epochs" in capsys.readouterr().err
    assert [(run.model.name, run.optim.epochs, run.optim.batch_size) for run in seen] == [
        ("vit_base_patch16", 50, 64),
        ("vit_nano_patch4", 3, 7),
    ]


def test_after_a_kill_only_what_is_missing_is_done(
    classes: Path, recipes: dict[str, str], tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = sweeping(classes, tmp_path / "sweep", **recipes)
    real = sweep._linear
    with monkeypatch.context() as patch:

        def killed(config: Any, cell: Any, *rest: Any) -> Any:
            if cell.value == 0.75:
                raise KeyboardInterrupt
            return real(config, cell, *rest)

        patch.setattr(sweep, "_linear", killed)
        with pytest.raises(KeyboardInterrupt):
            run_sweep(config)
    assert [row["value"] for row in json.loads((tmp_path / "sweep" / "sweep.json").read_text())["rows"]] == [0.5]
    assert trained == [
        "mask_ratio-0.5/seed-0/pretrain",
        "mask_ratio-0.5/seed-0/finetune",
        "mask_ratio-0.75/seed-0/pretrain",
    ]
    trained.clear()
    found = run_sweep(config).data
    assert trained == ["mask_ratio-0.75/seed-0/finetune"]
    assert [row["value"] for row in found["rows"]] == [0.5, 0.75]
    trained.clear()
    assert run_sweep(config).data == found
    assert trained == []


def test_a_baseline_that_was_interrupted_goes_on_under_another_value(
    classes: Path, recipes: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common: dict[str, Any] = {"scratch": True, "linear": "none", "finetune": False, **recipes}
    real = TrainingRunner.run

    def killed(runner: TrainingRunner, num_workers: int) -> None:
        if runner.job.title == "from scratch":
            raise KeyboardInterrupt
        real(runner, num_workers)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRunner, "run", killed)
        with pytest.raises(KeyboardInterrupt):
            run_sweep(sweeping(classes, tmp_path / "sweep", **common))
    found = run_sweep(sweeping(classes, tmp_path / "sweep", mask_ratio=(0.34, 0.5), **common)).data
    assert [row["scratch_top1"] for row in found["rows"]] == [found["rows"][0]["scratch_top1"]] * 2


def test_values_and_seeds_may_be_added_but_no_setting_changed(
    classes: Path, recipes: dict[str, str], tmp_path: Path, trained: list[str]
) -> None:
    common = {"finetune": False, "linear": "none", "recipe": recipes["recipe"]}
    run_sweep(sweeping(classes, tmp_path / "sweep", **{**common, "mask_ratio": (0.5,)}))
    run_sweep(sweeping(classes, tmp_path / "sweep", **{**common, "mask_ratio": (0.5, 0.34)}))
    assert trained == ["mask_ratio-0.5/seed-0/pretrain", "mask_ratio-0.34/seed-0/pretrain"]
    with pytest.raises(ConfigError, match="k: 3 -> 5"):
        run_sweep(sweeping(classes, tmp_path / "sweep", **{**common, "k": 5}))
    recipe = Path(recipes["recipe"])
    recipe.write_text(recipe.read_text().replace("lr: 0.001", "lr: 0.002"))
    with pytest.raises(ConfigError, match=r"optim.lr: 0.001 -> 0.002"):
        run_sweep(sweeping(classes, tmp_path / "sweep", **common))
    with pytest.raises(ConfigError, match="holds something else"):
        run_sweep(sweeping(classes, classes, **common))


def test_any_setting_may_be_varied(classes: Path, recipes: dict[str, str], tmp_path: Path, trained: list[str]) -> None:
    common: dict[str, Any] = {
        "finetune": False,
        "linear": "none",
        "recipe": recipes["recipe"],
        "settings": ("optim.lr=0.002",),
    }
    found = run_sweep(sweeping(classes, tmp_path / "depth", over="decoder.decoder_depth=1,2", **common)).data
    assert [row["value"] for row in found["rows"]] == [1, 2]
    assert trained == ["decoder_depth-1/seed-0/pretrain", "decoder_depth-2/seed-0/pretrain"]
    stored = read_recipe(tmp_path / "depth" / "decoder_depth-2" / "seed-0" / "pretrain" / "config.yaml")
    assert (stored["decoder"]["decoder_depth"], stored["optim"]["lr"]) == (2, 0.002)


def test_values_are_yaml(classes: Path, tmp_path: Path) -> None:
    for over, values, folder in (
        ("norm_pix_loss=true,false", [True, False], "norm_pix_loss-False"),
        ("model.image_size=[32, 32],[48, 64]", [[32, 32], [48, 64]], "image_size-48-64"),
        ("augment.min_scale=0.2,1", [0.2, 1], "min_scale-1"),
        ("augment.crop=none,random", ["none", "random"], "crop-random"),
    ):
        config = sweeping(classes, tmp_path, over=over)
        setting, found = sweep._varied(config)
        assert (setting, found) == (over.partition("=")[0], values)
        assert sweep._cell(config, setting, found[-1], 0).folder == tmp_path / folder / "seed-0"


def test_what_cannot_work_is_refused_before_anything_is_trained(
    classes: Path, images: Path, recipes: dict[str, str], tmp_path: Path, trained: list[str]
) -> None:
    out = tmp_path / "sweep"
    for more, message in (
        ({"mask_ratio": (0.5, 1.5)}, "each of --mask-ratio must be above 0 and below 1, got 0.5,1.5"),
        ({"over": "decoder.depth=1,2", "mask_ratio": None}, "unknown setting 'decoder.depth'"),
        ({"over": "seed=1,2", "mask_ratio": None}, "seed cannot be varied"),
        ({"over": "decoder.decoder_depth=1,1", "mask_ratio": None}, "each once"),
        ({"over": "decoder.decoder_depth=", "mask_ratio": None}, "values"),
        ({"finetune_settings": ("optim.epoch=3",)}, "unknown setting 'optim.epoch'"),
        ({"recipe": "nothing"}, "no recipe 'nothing'"),
    ):
        with pytest.raises(ConfigError, match=message):
            run_sweep(sweeping(classes, out, **{**recipes, **more}))
    with pytest.raises(ConfigError, match="no train in"):
        run_sweep(sweeping(images, out, **recipes))
    assert trained == []
    assert not out.exists()


def test_labelled_images_of_another_folder(
    classes: Path, images: Path, recipes: dict[str, str], tmp_path: Path, trained: list[str]
) -> None:
    more: dict[str, Any] = {"labelled": classes, "mask_ratio": (0.5,), "finetune": False, "recipe": recipes["recipe"]}
    run_sweep(sweeping(images, tmp_path / "sweep", **more))
    stored = read_recipe(tmp_path / "sweep" / "mask_ratio-0.5" / "seed-0" / "pretrain" / "config.yaml")
    assert stored["data"] == str(images)


def test_on_the_command_line(
    classes: Path, recipes: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--set` may be given several times, and its values may hold commas."""
    arguments = [
        "sweep",
        str(classes),
        "--out",
        str(tmp_path / "sweep"),
        "--mask-ratio",
        "0.5",
        "--recipe",
        recipes["recipe"],
        "--no-finetune",
    ]
    settings = [
        "--set",
        "model.image_size=[10, 10]",
        "--set",
        "optim.lr=0.002",
        "--linear",
        "none",
        "--k",
        "3",
        "--num-workers",
        "0",
        "--json",
    ]
    assert main([*arguments, *settings]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"][0]["knn_top1"] == 100.0
    assert "--set 'model.image_size=[10, 10]' --set optim.lr=0.002" in found["command"]
    stored = read_recipe(tmp_path / "sweep" / "mask_ratio-0.5" / "seed-0" / "pretrain" / "config.yaml")
    assert (stored["model"]["image_size"], stored["optim"]["lr"]) == ([10, 10], 0.002)


@pytest.mark.parametrize(
    "more",
    [
        {"mask_ratio": None},
        {"over": "a=1", "mask_ratio": (0.5,)},
        {"seeds": ()},
        {"seeds": (1, 1)},
        {"knn": False, "linear": "none", "finetune": False},
        {"k": 0},
    ],
)
def test_settings_that_mean_nothing(tmp_path: Path, more: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        sweeping(tmp_path, tmp_path, **more)
