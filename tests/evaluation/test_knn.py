"""k-NN against a reference that holds every cosine at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mae_deploy.cli import main
from mae_deploy.evaluation.features import FeatureSet
from mae_deploy.evaluation.knn import knn, nearest, votes
from tests.data.image_folders import spoil
from tests.export.tiny_exports import write_checkpoint
from tests.models.tiny_models import random_tensor, tiny_encoder

CLASSES, TEMPERATURE = 7, 0.5


def feature_set(count: int, seed: int) -> FeatureSet:
    """Noisy copies of a vector for each class, the noise as long as the vector."""
    labels = torch.randint(0, CLASSES, (count,), generator=torch.Generator().manual_seed(seed))
    return FeatureSet(random_tensor(CLASSES, 5, seed=7)[labels] + random_tensor(count, 5, seed=seed), labels, (), 1.0)


TRAIN, VAL = feature_set(53, 1), feature_set(29, 2)


def brute_force(k: int) -> dict[str, float]:
    """The definition, image by image, in float64."""
    train = TRAIN.features.double().numpy()
    top1 = top5 = 0
    for query, label in zip(VAL.features.double().numpy(), VAL.labels.tolist(), strict=True):
        cosines = train @ query / np.linalg.norm(train, axis=1) / np.linalg.norm(query)
        score: dict[int, float] = {}
        for index in sorted(range(len(train)), key=lambda index: -cosines[index])[:k]:
            neighbour = int(TRAIN.labels[index])
            score[neighbour] = score.get(neighbour, 0.0) + float(np.exp(cosines[index] / TEMPERATURE))
        ranked = sorted(score, key=lambda name: -score[name])
        top1 += ranked[0] == label
        top5 += label in ranked[:5]
    return {"top1": 100 * top1 / len(VAL.labels), "top5": 100 * top5 / len(VAL.labels)}


@pytest.mark.parametrize("block_size", [4, 11, 1000])
def test_it_is_the_definition_whatever_the_blocks(block_size: int) -> None:
    ks = (1, 3, 20, 53)
    found = knn(TRAIN, VAL, CLASSES, ks, temperature=TEMPERATURE, block_size=block_size)
    expected = {k: brute_force(k) for k in ks}
    assert found == {k: pytest.approx(expected[k]) for k in ks}
    # The test tells one k from another.
    assert len({(shares["top1"], shares["top5"]) for shares in expected.values()}) == len(ks)


def test_no_more_than_a_block_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []
    topk = Tensor.topk

    def watched(self: Tensor, k: int, **options: Any) -> Any:
        widths.append(self.shape[1])
        return topk(self, k, **options)

    monkeypatch.setattr(Tensor, "topk", watched)
    nearest(TRAIN.features, VAL.features, 3, block_size=10)
    assert max(widths) == 13


def test_nearest_are_the_best_first() -> None:
    cosines, indices = nearest(TRAIN.features, TRAIN.features[:4], 5, block_size=8)
    assert indices[:, 0].tolist() == [0, 1, 2, 3]
    assert cosines[:, 0].tolist() == pytest.approx([1.0] * 4, abs=1e-6)  # float32
    assert (cosines.diff(dim=1) <= 0).all()


def test_votes_by_hand_and_at_any_temperature() -> None:
    found = votes(torch.tensor([[0.9, 0.8, 0.8]]), torch.tensor([[1, 0, 0]]), 3, 0.1)
    assert found.tolist() == [[pytest.approx(2 * np.exp(-1.0), rel=1e-5), 1.0, 0.0]]
    cold = votes(torch.tensor([[0.9, -0.9]]), torch.tensor([[1, 0]]), 3, 1e-6)
    assert cold[0, 1] == 1.0
    assert 0 < cold[0, 0] < 1e-100  # still a vote: it has a neighbour


def test_k_beyond_the_training_images_means_all(capsys: pytest.CaptureFixture[str]) -> None:
    found = knn(TRAIN, VAL, CLASSES, (3, 53, 200), temperature=TEMPERATURE)
    assert list(found) == [3, 53]
    assert "only 53 training images" in capsys.readouterr().err


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder of random numbers, 20 wide: enough to tell dark from light."""
    return write_checkpoint(tmp_path_factory.mktemp("pretrained") / "checkpoint", tiny_encoder(), licence="own")


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    assert main(["knn", *map(str, arguments), "--num-workers", "0", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("pool", ["cls", "avg"])
def test_dark_and_light_are_neighbours(
    classes: Path, pretrained: Path, capsys: pytest.CaptureFixture[str], pool: str
) -> None:
    spoil(classes / "train" / "dark" / "00.png")
    found = run(capsys, classes, "--init", pretrained, "--k", "1,5", "--pool", pool)
    assert found["knn"] == {"1": {"top1": 100.0, "top5": 100.0}, "5": {"top1": 100.0, "top5": 100.0}}
    assert (found["train_images"], found["val_images"]) == (11, 6)
    assert [Path(line.partition(": ")[0]).name for line in found["unreadable"]] == ["00.png"]
    assert found["features"].endswith(pool)


def test_too_many_unreadable_images_stop_it(
    classes: Path, pretrained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(classes / "train" / "dark" / "00.png")
    assert main(["knn", str(classes), "--init", str(pretrained), "--num-workers", "0", "--max-corrupt", "0"]) == 1
    assert "1 unreadable images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"), [("--k", "0"), ("--k", "3,3"), ("--temperature", "0"), ("--block-size", "0")]
)
def test_settings_that_mean_nothing(classes: Path, capsys: pytest.CaptureFixture[str], option: str, value: str) -> None:
    assert main(["knn", str(classes), "--init", "x", option, value]) == 2
    assert option in capsys.readouterr().err
