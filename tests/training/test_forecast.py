"""What a run will take is what it then takes: counts exactly, and nothing is left of the steps that were measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from mae_deploy.cli import main
from mae_deploy.config import to_dict
from mae_deploy.distill.config import DistillConfig
from mae_deploy.models.mask_config import keep_count
from mae_deploy.pretrain.run import run_pretrain
from mae_deploy.runtime.flops import autoencoder_flops
from mae_deploy.training.config import LoopConfig
from tests.data.image_folders import write_classes
from tests.training.tiny_runs import DECODER, ENCODER, STUDENT, command_of, finetuning, optim, pretraining


def plan_of(capsys: pytest.CaptureFixture[str], config: Any, *more: str) -> dict[str, Any]:
    """What `--plan` prints as JSON."""
    capsys.readouterr()
    assert main(command_of(config, "--plan", "--json", *more)) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def tensor_bytes(folder: Path) -> int:
    """Of all tensors below a folder."""
    total = 0
    for file in folder.rglob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            tensors = [opened.get_tensor(name) for name in opened.keys()]  # noqa: SIM118  (it is no dictionary)
            total += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return total


@pytest.mark.parametrize("ema", [None, 0.9])
def test_the_run_is_as_it_was_planned(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], ema: float | None
) -> None:
    config = pretraining(images, tmp_path / "run", optim=optim(epochs=3, accum_iter=2, batch_size=2, ema=ema))
    found = plan_of(capsys, config)
    assert not (tmp_path / "run").exists()
    summary = run_pretrain(config)
    assert (found["images"], found["images_per_step"], found["steps"]) == (11, 4, summary["steps"]) == (11, 4, 6)
    assert found["checkpoint_bytes"] == tensor_bytes(tmp_path / "run" / "checkpoints" / "step-6")
    assert found["seconds"] == pytest.approx(6 * found["step_seconds"])
    assert found["validations"] == 0
    # For each product of the forward pass, two in the backward pass, but pixels have no gradient; the prediction is of
    # the CLS token's row, too, which is then left out.
    model: Any = to_dict(ENCODER)
    N, K = ENCODER.num_patches, keep_count(ENCODER.num_patches, 1 - config.mask_ratio, least=0)
    forward, embedding, of_cls = autoencoder_flops(model, to_dict(DECODER), K, N), 2 * K * 75 * 12, 2 * 8 * 75
    assert found["step_operations"] == 4 * (3 * (forward + of_cls) - embedding)


def test_validations_are_counted_and_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classes = write_classes(tmp_path / "classes")
    run_pretrain(pretraining(classes / "train", tmp_path / "mae"))
    loop = LoopConfig(eval_every=2)
    config = finetuning(classes, tmp_path / "run", tmp_path / "mae", optim=optim(epochs=5, batch_size=1), loop=loop)
    found = plan_of(capsys, config)
    assert (found["validations"], found["validation_images"]) == (3, 6)  # after epochs 2, 4 and the last
    assert found["seconds"] == pytest.approx(found["steps"] * found["step_seconds"] + 3 * found["validation_seconds"])
    distilling = DistillConfig(
        data=classes / "train",
        teacher=tmp_path / "mae",
        out=tmp_path / "student",
        **STUDENT,
        decoder=DECODER,
        optim=optim(),
        images=config.images,
        device="cpu",
    )
    assert plan_of(capsys, distilling)["stage"] == "distil features"
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "student").exists()


def test_the_rest_of_a_run(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = pretraining(images, tmp_path / "run")
    run_pretrain(config)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    found = plan_of(capsys, config, "--resume")
    assert (found["steps"], found["steps_done"], found["seconds"]) == (4, 4, 0)
    assert main(command_of(config, "--plan", "--resume")) == 0
    assert "no step is left" in capsys.readouterr().out
    assert main(command_of(config, "--plan")) == 2
    assert "already exists" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_people_read_where_a_number_is_from(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(command_of(pretraining(images, tmp_path / "run"), "--plan")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    sources = {line.split("  ")[0]: line.split()[-1] for line in lines if line[:1].islower()}
    assert {name: sources[name] for name in ("images", "epochs", "a step", "memory", "disk", "time")} == {
        "images": "counted",
        "epochs": "settings",
        "a step": "measured",
        "memory": "measured",
        "disk": "estimated",
        "time": "estimated",
    }
    assert sum(" B " in line or "B free" in line for line in lines) >= 1


def test_a_probe_without_steps_has_no_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(write_classes(tmp_path / "classes"))
    assert main(["linprobe", data, "--init", data, "--out", str(tmp_path / "run"), "--solver", "ridge", "--plan"]) == 2
    assert "--solver ridge takes none" in capsys.readouterr().err
