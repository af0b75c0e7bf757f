"""The model on its device: names stay clean, compiled or not."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mae_deploy.models.config import DecoderConfig, EncoderConfig
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.masking import random_masking
from mae_deploy.training.config import LoopConfig
from mae_deploy.training.loop import make_accelerator
from mae_deploy.training.state.sharding import Network
from tests.training.linear_runs import train
from tests.training.tiny_runs import optim


def compile_eagerly(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let what is compiled be captured and run as it is, and return it as it comes."""
    compiled: list[Any] = []
    original = partial(torch.compile, backend="eager")

    def compile_one(call: Any) -> Any:
        compiled.append(call.__self__)
        return original(call)

    monkeypatch.setattr(torch, "compile", compile_one)
    return compiled


def test_blocks_are_compiled_one_by_one_and_share_what_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three blocks of the encoder and two of the decoder, of other widths, are two kinds."""
    compiled = compile_eagerly(monkeypatch)
    torch._dynamo.reset()
    counted: list[int] = []
    backend = torch._dynamo.lookup_backend("eager")

    def count(graph: Any, inputs: Any) -> Any:
        counted.append(1)
        return backend(graph, inputs)

    monkeypatch.setattr("torch._dynamo.backends.registry._COMPILER_FNS", {"eager": count})
    torch.manual_seed(0)
    encoder = EncoderConfig(name="mini", image_size=(10, 15), patch_size=5, embed_dim=12, depth=3, num_heads=2)
    model = MaskedAutoencoder(encoder, DecoderConfig(decoder_embed_dim=8, decoder_depth=2, decoder_num_heads=2))
    plain = copy.deepcopy(model)
    names = list(model.state_dict())
    network = Network(model, make_accelerator("cpu", "fp32", tmp_path), sharded=False, compiled=True)
    assert len(compiled) == 5
    assert list(network.trained.state_dict()) == names
    images, mask = torch.randn(2, 3, 10, 15), random_masking(torch.rand(2, 6), 0.5)
    losses = [network_or_plain(images, mask).loss for network_or_plain in (network.trained, plain)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    for name, parameter in model.named_parameters():
        other = plain.get_parameter(name)
        assert (parameter.grad is None) == (other.grad is None)
        if parameter.grad is not None and other.grad is not None:
            assert torch.equal(parameter.grad, other.grad), name
    assert len(counted) == 2, "not once for each block"
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(copied(images, mask).loss, losses[1]), "a copy computes with its own weights"


def test_a_compiled_run_has_the_same_losses_and_names(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph is captured but run as it is: the compiler itself takes half a minute. Stopped compiled, resumed
    not.
    """
    compiled = compile_eagerly(monkeypatch)
    plain = train(images, tmp_path / "plain", optim(epochs=3))
    done = train(images, tmp_path / "run", optim(epochs=3), LoopConfig(compile=True))
    assert len(compiled) == 1
    assert done.losses == plain.losses
    assert set(done.tensors()) == {"weight", "bias"}
    assert torch.equal(done.tensors()["weight"], plain.tensors()["weight"])
    train(images, tmp_path / "run", optim(epochs=3), resume=True)
