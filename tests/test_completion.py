"""What a shell is told when a user presses the tab key, as bash asks it: in a process of its own, without PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mae_deploy import completion
from mae_deploy.completion import COMPLETIONS
from mae_deploy.config import from_dict
from mae_deploy.models.config import EncoderConfig
from mae_deploy.recipe import RECIPES
from mae_deploy.runtime.manifest import PLANNED
from mae_deploy.runtime.registry import ALIASES, ENGINES
from tests.packaging.test_imports import HEAVY

PROGRAM = """
import sys
from mae_deploy.cli import main
try:
    main()
finally:
    print(*sorted(set(sys.modules) & set(sys.argv[1].split(","))), file=sys.stderr)
"""


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs, one with a checkpoint, a bundle, a recipe, and folders of nothing that completes."""
    for name in (
        "runs/mae/config.yaml",
        "runs/mae/checkpoints/best/metadata.json",
        "runs/tiny/config.yaml",
        "bundles/edge/manifest.json",
        "images/cat/1.png",
        ".hidden/config.yaml",
        "mine.yaml",
        "more/other.yml",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def completed(line: str) -> list[str]:
    """What bash gets for a line, of which the last word is not finished."""
    asked = {"_MAE_DEPLOY_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    command = [sys.executable, "-c", PROGRAM, ",".join(HEAVY)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **asked})
    assert (done.returncode, done.stderr.strip()) == (0, ""), "it failed, or loaded a training framework"
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("mae-deploy p", ["pretrain", "predict", "push"]),
        ("mae-deploy data ", ["stats", "pack"]),
        ("mae-deploy pretrain photos --mask-r", ["--mask-ratio"]),
        ("mae-deploy pretrain photos --clip", ["--clip-grad"]),
        ("mae-deploy verify --see", []),
        ("mae-deploy pretrain --model vit_micro", ["vit_micro_patch4"]),
        ("mae-deploy distill --student vit_tiny_patch1", ["vit_tiny_patch16"]),
        ("mae-deploy export --precision f", ["fp32", "fp16", "fp8"]),
        ("mae-deploy predict --engine open", ["openvino"]),
        ("mae-deploy finetune --recipe finetune-vit-l", ["finetune-vit-large"]),
        ("mae-deploy finetune --init ", ["runs/mae", "runs/tiny", "runs/mae/checkpoints/best"]),
        ("mae-deploy verify b", ["bundles/edge"]),
        ("mae-deploy info bundles/", ["bundles/edge"]),
    ],
)
def test_a_shell_is_told(line: str, expected: list[str]) -> None:
    assert completed(line) == expected


def test_models_are_those_that_build() -> None:
    names = list(COMPLETIONS["MODEL"]("vit_"))
    assert len(names) > 5
    for name in names:
        patch = from_dict(EncoderConfig, {"name": name}).patch if "patch16" in name else None
        assert patch in (16, None)
    assert list(COMPLETIONS["MODEL"]("resnet")) == []


def test_engines_have_all_their_names() -> None:
    names = list(COMPLETIONS["ENGINE"](""))
    assert set(names) == {"auto", *PLANNED, *ENGINES, *ALIASES}
    assert len(set(names)) == len(names)


def test_recipes_are_names_and_files() -> None:
    names = set(COMPLETIONS["RECIPE"](""))
    assert names == {*(path.stem for path in RECIPES.glob("*.yaml")), "mine.yaml"}
    assert list(COMPLETIONS["RECIPE"]("more/")) == ["more/other.yml"]


def test_folders_are_those_that_hold_what_is_looked_for(work: Path) -> None:
    runs, bundles, both = (list(COMPLETIONS[name]("")) for name in ("CKPT", "BUNDLE", "CKPT|BUNDLE"))
    assert runs == ["runs/mae", "runs/tiny", "runs/mae/checkpoints/best"]
    assert bundles == ["bundles/edge"]
    assert set(both) == {*runs, *bundles}
    assert list(COMPLETIONS["CKPT"]("runs/mae/")) == ["runs/mae/checkpoints/best"]
    assert list(COMPLETIONS["CKPT"](f"{work}/runs/t")) == [f"{work}/runs/tiny"]
    assert list(COMPLETIONS["CKPT"]("no-such-folder/")) == []


def test_a_search_ends_in_a_large_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completion, "_MOST", 3)
    assert list(COMPLETIONS["CKPT"]("")) == []
