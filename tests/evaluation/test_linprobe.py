"""The linear probe trains a head and nothing else, and what it writes is a classifier with the same logits."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mae_deploy.checkpoint import open_checkpoint, save_checkpoint
from mae_deploy.cli import main
from mae_deploy.data.config import DataConfig
from mae_deploy.errors import ConfigError
from mae_deploy.evaluation import linprobe
from mae_deploy.evaluation.config import LinprobeConfig
from mae_deploy.evaluation.linprobe import LinearProbe, SharedBatchNorm, run_linprobe
from mae_deploy.models.vit import Classifier
from mae_deploy.training.config import LoopConfig
from mae_deploy.training.state.run_folder import read_metrics
from mae_deploy.training.validation import Evaluator
from mae_deploy.weights.load import load_model
from tests.export.tiny_exports import write_checkpoint
from tests.models.tiny_models import random_images, random_tensor, tiny_classifier, tiny_encoder
from tests.training.tiny_runs import losses_of, optim, progress_of


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder of random numbers, 20 wide: enough to tell dark from light."""
    return write_checkpoint(tmp_path_factory.mktemp("pretrained") / "checkpoint", tiny_encoder(), licence="own")


def probing(data: Path, init: Path, out: Path, **more: Any) -> LinprobeConfig:
    common: dict[str, Any] = {
        "optim": optim(epochs=40, lr=10.0, batch_size=12, weight_decay=0.0),
        "images": DataConfig(num_workers=0),
        "device": "cpu",
    }
    return LinprobeConfig(data=data, init=init, out=out, **{**common, **more})


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return open_checkpoint(path).tensors()


# --- the module ------------------------------------------------------------------------------------------------------


def trained_probe(pool: Any) -> LinearProbe:
    """A probe whose BatchNorm has seen batches and whose weights are no small numbers."""
    probe = LinearProbe(tiny_classifier(pool))
    with torch.no_grad():
        probe.linear.weight.copy_(random_tensor(*probe.linear.weight.shape, seed=5))
        probe.linear.bias.copy_(random_tensor(*probe.linear.bias.shape, seed=6))
    probe.train()
    for _ in range(3):
        probe(random_images(batch=5) * 2 + 1)
    return probe.eval()


@pytest.mark.parametrize("pool", ["cls", "avg"])
def test_the_folded_head_gives_the_same_logits(pool: Any) -> None:
    probe, images = trained_probe(pool), random_images(batch=7)
    state = probe.classifier.state_dict()
    classifier = tiny_classifier(pool, seed=1)
    classifier.load_state_dict(state)
    with torch.no_grad():
        expected, found = probe(images), classifier(images)
        pooled = classifier.forward_pooled(images).double()
        norm = probe.norm
        assert norm.running_mean is not None
        assert norm.running_var is not None
        by_hand = (pooled - norm.running_mean) / (
            norm.running_var.double() + 1e-6
        ).sqrt() @ probe.linear.weight.T.double() + probe.linear.bias
    assert found.numpy() == pytest.approx(expected.numpy(), rel=1e-4, abs=1e-5)  # float32 in another order
    assert found.numpy() == pytest.approx(by_hand.numpy(), rel=1e-4, abs=1e-5)
    # The statistics are in it: without them it would be another head.
    assert not torch.allclose(state["head.weight"], probe.linear.weight, rtol=1e-2)


def test_the_fold_follows_the_head() -> None:
    probe = trained_probe("cls")
    before = probe.classifier.state_dict()["head.bias"].clone()
    with torch.no_grad():
        probe.linear.bias.add_(1)
    assert torch.allclose(probe.classifier.state_dict()["head.bias"], before + 1, atol=1e-5)


def test_the_batch_norm_is_that_of_all_processes_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes of four and three images, one after the other, beside torch's BatchNorm of all seven."""
    whole, parts = (
        torch.nn.BatchNorm1d(5, affine=False, eps=1e-6),
        [SharedBatchNorm(5, affine=False, eps=1e-6) for _ in range(2)],
    )
    images = random_tensor(7, 5) * 3 + 40
    expected = whole(images)
    shares = images.split((4, 3))
    sums = torch.stack(
        [
            torch.cat([share.double().sum(0), share.double().square().sum(0), torch.tensor([float(len(share))])])
            for share in shares
        ]
    )
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    given: list[torch.Tensor] = []

    def all_reduce(totals: torch.Tensor) -> None:
        given.append(totals.clone())
        totals.copy_(sums.sum(0))

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    found = torch.cat([norm(share) for norm, share in zip(parts, shares, strict=True)])
    assert torch.equal(torch.stack(given), sums)
    assert found.numpy() == pytest.approx(expected.numpy(), abs=1e-5)  # float32
    assert whole.running_mean is not None
    assert whole.running_var is not None
    for norm in parts:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.running_mean.numpy() == pytest.approx(whole.running_mean.numpy(), rel=1e-6)
        assert norm.running_var.numpy() == pytest.approx(whole.running_var.numpy(), rel=1e-5)
    assert torch.equal(parts[0].eval()(images), SharedBatchNorm.forward(parts[1].eval(), images))


def test_only_the_head_is_trained_and_the_encoder_stays_in_evaluation() -> None:
    probe = LinearProbe(tiny_classifier("cls")).train()
    assert {name for name, parameter in probe.named_parameters() if parameter.requires_grad} == {
        "linear.weight",
        "linear.bias",
    }
    assert probe.norm.training
    assert not any(module.training for module in probe.classifier.modules())
    assert (probe.norm.affine, probe.norm.eps) == (False, 1e-6)
    assert probe.linear.weight.std().item() == pytest.approx(0.01, rel=0.2)
    assert not probe.linear.bias.any()


# --- the paper's recipe ----------------------------------------------------------------------------------------------


def test_the_defaults_are_the_papers() -> None:
    config = LinprobeConfig(data=Path("d"), init=Path("i"), out=Path("o"))
    assert (config.optim.epochs, config.optim.blr, config.optim.weight_decay, config.pool, config.solver) == (
        90,
        0.1,
        0.0,
        "cls",
        "lars",
    )
    assert (config.augment.min_scale, config.augment.hflip, linprobe.LINPROBE_WARMUP) == (0.08, 0.5, 10)


@pytest.mark.parametrize("pool", ["cls", "avg"])
def test_lars_tells_dark_from_light_and_leaves_the_encoder(
    classes: Path, pretrained: Path, tmp_path: Path, pool: str
) -> None:
    seldom = LoopConfig(eval_every=100, checkpoint_every=100)
    summary = run_linprobe(probing(classes, pretrained, tmp_path / "run", pool=pool, loop=seldom))
    assert summary["top1"] == 100.0
    assert summary["last_loss"] < 0.9 * summary["first_loss"]
    found, start = tensors_of(tmp_path / "run"), tensors_of(pretrained)
    assert [name for name, tensor in found.items() if name in start and not torch.equal(tensor, start[name])] == []
    metadata = open_checkpoint(tmp_path / "run").metadata
    assert (metadata.kind, metadata.pool, metadata.class_names) == ("classifier", pool, ("dark", "light"))
    assert metadata.provenance["stage"] == "linprobe"
    if pool == "avg":  # a norm without weights, as the original's
        assert torch.equal(found["fc_norm.weight"], torch.ones(20))


def test_what_is_written_is_evaluated_as_it_was_while_training(
    classes: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_linprobe(probing(classes, pretrained, tmp_path / "run", optim=optim(epochs=1, lr=0.1, batch_size=6)))
    model, loaded = load_model(tmp_path / "run")
    assert isinstance(model, Classifier)
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run"), str(classes), "--num-workers", "0"]) == 0
    assert f"{loaded.metadata.metrics['top1']:.2f} %" in capsys.readouterr().out


def test_a_resumed_run_has_the_losses_of_an_unbroken_one(
    classes: Path, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = probing(classes, pretrained, tmp_path / "whole", optim=optim(epochs=4, lr=5.0, batch_size=6))
    run_linprobe(whole)
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "__call__", Interrupted(Evaluator.__call__))
        with pytest.raises(KeyboardInterrupt):
            run_linprobe(replace(whole, out=tmp_path / "broken"))
    assert progress_of(tmp_path / "broken") == 4  # of eight steps
    run_linprobe(replace(whole, out=tmp_path / "broken", resume=True))
    assert losses_of(tmp_path / "broken") == losses_of(tmp_path / "whole")
    found, expected = tensors_of(tmp_path / "broken"), tensors_of(tmp_path / "whole")
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


class Interrupted:
    """An evaluation during the third of which somebody presses Ctrl-C."""

    def __init__(self, evaluate: Any) -> None:
        self.evaluate = evaluate
        self.calls = 0

    def __get__(self, instance: Any, owner: Any) -> Any:
        return partial(self, instance)

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        if self.calls == 3:
            raise KeyboardInterrupt
        return self.evaluate(*arguments)


# --- features that are computed once ---------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["logistic", "ridge"])
@pytest.mark.parametrize("pool", ["cls", "avg"])
def test_a_solver_writes_a_classifier_too(
    classes: Path, pretrained: Path, tmp_path: Path, solver: str, pool: str
) -> None:
    config = probing(classes, pretrained, tmp_path / "run", solver=solver, pool=pool)
    summary = run_linprobe(config)
    assert (summary["top1"], summary["train_images"], summary["val_images"]) == (100.0, 12, 6)
    assert ("C" in summary) == (solver == "logistic")
    metadata = open_checkpoint(tmp_path / "run").metadata
    assert (metadata.kind, metadata.pool, metadata.metrics) == ("classifier", pool, {"top1": 100.0})
    assert read_metrics(tmp_path / "run", "eval.jsonl")[0]["top1"] == 100.0
    model, _ = load_model(tmp_path / "run")
    assert isinstance(model, Classifier)
    assert model.head.weight.abs().max() > 1e-3  # not the head that it was built with


def test_features_are_computed_once(
    classes: Path, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = probing(classes, pretrained, tmp_path / "run", solver="ridge")
    first = run_linprobe(config)
    monkeypatch.setattr(linprobe, "extract", lambda *_, **__: pytest.fail("computed again"))
    again = run_linprobe(replace(config, resume=True))
    assert again == first
    assert len(read_metrics(tmp_path / "run", "eval.jsonl")) == 1
    with pytest.raises(ConfigError, match="other settings"):
        run_linprobe(replace(config, resume=True, pool="avg"))


def test_the_norm_of_a_mean_pooled_classifier_is_kept(classes: Path, pretrained: Path, tmp_path: Path) -> None:
    run_linprobe(probing(classes, pretrained, tmp_path / "first", solver="ridge", pool="avg"))
    tensors = {**tensors_of(tmp_path / "first"), "fc_norm.weight": random_tensor(20)}
    save_checkpoint(tmp_path / "tuned", tensors, open_checkpoint(tmp_path / "first").metadata)
    run_linprobe(probing(classes, tmp_path / "tuned", tmp_path / "second", solver="ridge", pool="avg"))
    assert torch.equal(tensors_of(tmp_path / "second")["fc_norm.weight"], tensors["fc_norm.weight"])


def test_sharding_one_head_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="only a linear head"):
        probing(tmp_path, tmp_path, tmp_path / "run", loop=LoopConfig(sharding="fsdp2"))


def test_a_step_of_one_image_is_refused_before_there_is_a_run(classes: Path, pretrained: Path, tmp_path: Path) -> None:
    config = probing(classes, pretrained, tmp_path / "run", optim=optim(batch_size=1))
    with pytest.raises(ConfigError, match=r"--batch-size 1 of .* images: BatchNorm needs two images a step") as caught:
        run_linprobe(config)
    assert "--solver ridge" in str(caught.value.hint)
    assert not (tmp_path / "run").exists()
