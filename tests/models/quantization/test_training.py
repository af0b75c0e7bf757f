"""A model that is rounded in training computes what its exported graph computes, learns as if it were not, and stays
what it is.
"""

from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from mae_deploy.export.graph.encoder import build_graph
from mae_deploy.export.graph.spec import GraphSpec
from mae_deploy.models.config import EncoderConfig
from mae_deploy.models.quantization.activations import Observer
from mae_deploy.models.quantization.outliers import tail_penalty
from mae_deploy.models.quantization.policy import Policy
from mae_deploy.models.quantization.rounding import (
    dynamic_round_trip,
    eligible_linears,
    linear_of,
    static_round_trip,
    weight_round_trip,
)
from mae_deploy.models.quantization.smoothing import smooth, smoothed_stats
from mae_deploy.models.quantization.training import QuantizedLinear, Quantizer, quantize_in_training
from mae_deploy.models.vit import Encoder
from tests.export.outlier_models import CONFIG, GATED, decibels, noisy_encoder, plant_outliers
from tests.export.tiny_exports import SavedGraph
from tests.models.tiny_models import metadata_of, random_tensor, tiny_encoder, tiny_mae

Kind = Literal["dynamic", "static"]

KINDS: tuple[Kind, ...] = ("dynamic", "static")
IMAGES = random_tensor(16, 3, 12, 20)


def rounded(model: Encoder, kind: Kind, *, smooth_alpha: float | None = 0.5, images: Tensor = IMAGES) -> Quantizer:
    """After one step, from which static ranges were taken."""
    quantizer = quantize_in_training(model, kind, Policy(static=kind == "static", smooth_alpha=smooth_alpha))
    with torch.no_grad(), quantizer.step(0, 0.0):
        model(images)
    return quantizer


@torch.no_grad()
def exported(model: Encoder, kind: Kind, folder: Path) -> Tensor:
    """Tokens of the graph that an export writes, calibrated on the same images, run by ONNX Runtime itself."""
    names, observer = eligible_linears(model), Observer(model, eligible_linears(model))
    with observer.watching():
        model(IMAGES)
    stats = observer.stats() if kind == "static" else None
    policy = Policy(static=kind == "static")
    divisors = policy.divisors(model.state_dict(), names, stats)
    scales = policy.scales(names, smoothed_stats(stats, divisors) if stats else {})
    spec = GraphSpec(token_mode="full", precision="int8", quantized=scales, outputs=("tokens",))
    graph = SavedGraph(build_graph(metadata_of(model), smooth(model.state_dict(), divisors), spec), folder)
    return torch.from_numpy(graph(images=IMAGES.numpy())["tokens"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("planted", "config"), [(False, CONFIG), (True, CONFIG), (True, GATED)])
def test_it_computes_what_the_exported_graph_computes(
    kind: Kind, planted: bool, config: EncoderConfig, tmp_path: Path
) -> None:
    model = noisy_encoder(config=config)
    if planted:
        model.load_state_dict(plant_outliers(model.state_dict()))
    graph = exported(model, kind, tmp_path)
    with torch.no_grad():
        plain = model(IMAGES)[:, config.num_prefix :]
        rounded(model, kind)
        found = model(IMAGES)[:, config.num_prefix :]
    # Where a number lies between two integers, the last bit of a float32 sum decides: an image with such a number is
    # off by a part of the noise, all others only by the order of summation, 1e-6 of numbers up to 4.
    errors = (found - graph).abs().amax(dim=(1, 2))
    assert (errors < 1e-5).sum() >= 12
    assert decibels(graph, found) > decibels(plain, graph) + 15


def inputs_of(model: Encoder, images: Tensor) -> dict[str, Tensor]:
    """What each Linear of the blocks is given in full precision."""
    found: dict[str, Tensor] = {}

    def keep(name: str, _module: nn.Module, given: tuple[Tensor, ...]) -> None:
        found[name] = given[0].detach()

    hooks = [linear_of(model, name).register_forward_pre_hook(partial(keep, name)) for name in eligible_linears(model)]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return found


def scales_of(quantizer: Quantizer) -> dict[str, float]:
    return {name: float(place.scale) for name, place in quantizer._places.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["blocks.0.attn.qkv", "blocks.1.mlp.fc2"])
def test_gradients_are_those_of_the_rounded_product(kind: Kind, name: str) -> None:
    """As if the rounded input and weight had come from nowhere, and none for what the range of a static input clips."""
    model = noisy_encoder()
    quantizer = rounded(model, kind, smooth_alpha=None)
    linear = linear_of(model, name)
    values = random_tensor(3, 5, linear.in_features, seed=4)
    values[1, 2, 3], values[2, 0, 7] = 9.0, -9.0
    values.requires_grad_(True)
    grad = random_tensor(3, 5, linear.out_features, seed=5)
    with quantizer.step(1, 0.0):
        linear(values).backward(grad)
    given, clipped = values.detach(), torch.zeros_like(values, dtype=torch.bool)
    round_trip = dynamic_round_trip(given)
    if kind == "static":
        scale = scales_of(quantizer)[name]
        round_trip, integers = static_round_trip(given, scale), (given / scale).round()
        clipped = (integers < -128) | (integers > 127)
        assert clipped[1, 2, 3]
        assert clipped[2, 0, 7]
    assert values.grad is not None
    assert linear.weight.grad is not None
    torch.testing.assert_close(values.grad, (grad @ weight_round_trip(linear.weight.detach())).masked_fill(clipped, 0))
    torch.testing.assert_close(linear.weight.grad, grad.flatten(0, 1).T @ round_trip.flatten(0, 1))
    torch.testing.assert_close(linear.bias.grad, grad.sum(dim=(0, 1)))


def test_with_smoothing_the_gradient_is_close_to_the_plain_one() -> None:
    """Dividing and multiplying by the same numbers must leave no trace in the gradients; rounding does, 36 dB of the
    values.
    """
    gradients = []
    for quantized in (False, True):
        model = noisy_encoder()
        model.load_state_dict(plant_outliers(model.state_dict()))
        if quantized:
            rounded(model, "dynamic")
        model(IMAGES)[:, 1:].square().mean().backward()
        gradients.append(
            {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        )
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        assert decibels(expected, gradients[1][name]) > 15, name


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_keeps_its_weights_and_their_names(kind: Kind) -> None:
    model, plain = tiny_mae(), tiny_mae()
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    quantizer = quantize_in_training(model, kind, Policy(static=kind == "static"))
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    assert not list(quantizer.parameters())
    assert {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)} == {
        name for name in eligible_linears(plain) if not name.startswith("decoder_")
    }
    images = random_tensor(3, 3, 6, 10)
    with torch.no_grad():
        with quantizer.step(0, 0.0):
            Encoder.forward(model, images)
        state = model.state_dict()
        assert list(state) == list(plain.state_dict())
        assert all(torch.equal(tensor, state[name]) for name, tensor in plain.state_dict().items())


def test_rounding_starts_when_it_is_its_turn_and_can_be_left_out() -> None:
    model, plain = tiny_encoder(), tiny_encoder()
    images = random_tensor(3, 3, 6, 10)
    quantizer = quantize_in_training(model, "dynamic", Policy(static=False), start=0.25)
    with torch.no_grad():
        expected = plain(images)
        for done, rounds in ((0.0, False), (0.24, False), (0.25, True), (0.9, True)):
            with quantizer.step(0, done):
                found = model(images)
            assert (quantizer.rounds, torch.equal(found, expected)) == (rounds, not rounds)
        assert not torch.equal(model(images), expected)  # an evaluation after the step
        with quantizer.plain():
            assert torch.equal(model(images), expected)
        assert quantizer.rounds


def test_static_ranges_are_observed_now_and_then_and_stay_at_the_end() -> None:
    model = noisy_encoder()
    quantizer = quantize_in_training(
        model, "static", Policy(static=True, smooth_alpha=None, method="minmax"), start=0.22, until=0.8, observed=10
    )
    seen = []
    with torch.no_grad():
        for step in range(20):
            with quantizer.step(step, step / 20):
                model(IMAGES * (1 + step))
            seen.append(scales_of(quantizer)["blocks.0.attn.proj"])
    changes = [step for step in range(1, 20) if seen[step] != seen[step - 1]]
    assert changes == [
        5,
        6,
        8,
        10,
        12,
        14,
    ]  # as soon as it rounds, then once in each tenth of the run, none from the ninth on
    assert seen[0] == 1


def test_static_ranges_are_a_mean_that_forgets() -> None:
    """Geometric; the first five observations weigh the same, from then on the newest has a fifth."""
    model = noisy_encoder()
    quantizer = quantize_in_training(
        model, "static", Policy(static=True, smooth_alpha=None, method="minmax"), observed=9
    )
    name, expected = "blocks.0.mlp.fc1", 0.0
    with torch.no_grad():
        for step in range(8):
            images = IMAGES[step : step + 2]
            largest = float(
                inputs_of(copy.deepcopy(model), images)[name].abs().max()
            )  # rounded as the step before left it
            with quantizer.step(step, step / 9):
                largest = float(inputs_of(copy.deepcopy(model), images)[name].abs().max()) if step == 0 else largest
                model(images)
            share = max(1 / (step + 1), 0.2)
            expected = (1 - share) * expected + share * math.log(largest / 127)
            assert math.log(scales_of(quantizer)[name]) == pytest.approx(expected, abs=1e-5)


def test_ranges_may_move_between_forward_and_backward_pass() -> None:
    """They do in every step from which they are observed; the penalty's gradient is that of the ranges that it was
    taken with.
    """
    gradients = []
    for observed in (1, 2):
        model = noisy_encoder()
        quantizer = quantize_in_training(model, "static", Policy(static=True), observed=observed, penalises=True)
        with torch.no_grad(), quantizer.step(0, 0.0):
            model(IMAGES)
        before = scales_of(quantizer)
        with quantizer.step(2, 0.5):
            loss = model(2 * IMAGES).square().mean()
        (loss + quantizer.penalty()).backward()
        assert (scales_of(quantizer) == before) == (observed == 1)
        gradients.append(model.get_parameter("blocks.0.norm1.weight").grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_activations_that_are_no_numbers_change_no_range() -> None:
    model = noisy_encoder()
    quantizer = rounded(model, "static")
    before = scales_of(quantizer)
    with torch.no_grad(), quantizer.step(50, 0.5):
        model(IMAGES * torch.nan)
    assert scales_of(quantizer) == before


def test_a_run_goes_on_with_the_ranges_that_it_had() -> None:
    model = noisy_encoder()
    state = rounded(model, "static").state_dict()
    assert list(state) == ["_extra_state"]
    again = noisy_encoder()
    quantizer = quantize_in_training(again, "static", Policy(static=True))
    quantizer.load_state_dict(state)
    with torch.no_grad():
        with quantizer.step(51, 0.5):  # no turn to observe, so without ranges it would not round
            found = again(IMAGES[:3])
        assert torch.equal(found, model(IMAGES[:3]))
        assert not torch.equal(found, noisy_encoder()(IMAGES[:3]))


def test_ranges_that_are_given_back_count_as_unknown() -> None:
    """The training loop puts buffers back where a step is not taken: here the one that the first ranges were taken
    from.
    """
    model = noisy_encoder()
    quantizer = quantize_in_training(model, "static", Policy(static=True))
    kept = [buffer.clone() for buffer in quantizer.buffers()]
    with torch.no_grad():
        with quantizer.step(1, 0.0):
            model(IMAGES)
        for buffer, before in zip(quantizer.buffers(), kept, strict=True):
            buffer.copy_(before)
        with quantizer.step(2, 0.0):
            model(IMAGES)
    assert min(scales_of(quantizer).values()) < 1
    assert float(next(iter(quantizer._places.values())).observations) == 1


def test_a_copy_is_a_whole_of_its_own() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student = noisy_encoder()
            self.quantizer = quantize_in_training(self.student, "static", Policy(static=True))

    both = Both()
    other = copy.deepcopy(both)
    with torch.no_grad(), other.quantizer.step(0, 0.0):
        other.student(IMAGES)
    assert min(scales_of(other.quantizer).values()) < 1
    assert set(scales_of(both.quantizer).values()) == {1.0}


def test_in_bf16_it_is_rounded_too() -> None:
    model, plain = noisy_encoder(), noisy_encoder()
    rounded(model, "dynamic")
    with torch.no_grad():
        expected = model(IMAGES)
        with torch.autocast("cpu", torch.bfloat16):
            found, low = model(IMAGES).float(), plain(IMAGES).float()
    # BF16 alone is at 40 dB of FP32; of the rounded model no further away than both noises together.
    assert decibels(expected, found) > 30
    assert decibels(low, found) < 36


# --- outliers --------------------------------------------------------------------------------------------------------


def test_light_tails_cost_nothing() -> None:
    uniform = torch.linspace(-3, 5, 1001)
    assert float(tail_penalty(uniform)) == 0
    assert float(tail_penalty(torch.zeros(7))) == 0
    assert float(tail_penalty(random_tensor(100_000))) < 0.02  # a sample of a normal distribution


def test_the_tail_penalty_is_the_logarithm_of_the_kurtosis() -> None:
    """One of 100 numbers is 1, the rest 0: mean 0.01, fourth central moment 0.01 * 0.99 * (0.99^3 + 0.01^3), variance
    0.01 * 0.99.
    """
    values = torch.zeros(4, 25)
    values[2, 3] = 1
    kurtosis = (0.99**3 + 0.01**3) / (0.01 * 0.99)
    for scale in (1e-3, 1.0, 1e3):
        assert float(tail_penalty(scale * values)) == pytest.approx(math.log(kurtosis / 3), rel=1e-4)
    assert float(tail_penalty(values.bfloat16())) == pytest.approx(math.log(kurtosis / 3), rel=1e-4)


def test_going_down_the_penalty_draws_outliers_in() -> None:
    values = random_tensor(1000)
    values[[3, 500]] = 20.0
    values.requires_grad_(True)
    tail_penalty(values).backward()
    assert values.grad is not None
    assert values.grad[[3, 500]].min() > 10 * values.grad.abs().median()


@pytest.mark.parametrize("kind", ["none", "static"])
def test_the_penalty_of_a_model_is_the_mean_of_its_linears(kind: Literal["none", "static"]) -> None:
    model, plain = noisy_encoder(), noisy_encoder()
    quantizer = quantize_in_training(
        model, kind, Policy(static=kind == "static", smooth_alpha=None), start=0.5, penalises=True
    )
    with quantizer.step(0, 0.0):
        model(IMAGES)
    found = quantizer.penalty()
    assert found.item() == pytest.approx(
        torch.stack([tail_penalty(values) for values in inputs_of(plain, IMAGES).values()]).mean().item(), rel=1e-5
    )
    found.backward()
    assert model.get_parameter("blocks.1.mlp.fc1.weight").grad is not None
    with torch.no_grad():
        model(IMAGES)  # an evaluation leaves nothing behind
    assert all(place.penalty is None for place in quantizer._places.values())


def test_what_is_weighed_is_what_is_rounded() -> None:
    """Channels that SmoothQuant divides cost nothing."""
    penalties = []
    for alpha in (None, 0.5):
        model = noisy_encoder()
        model.load_state_dict(plant_outliers(model.state_dict()))
        quantizer = quantize_in_training(model, "none", Policy(static=False, smooth_alpha=alpha), penalises=True)
        with quantizer.step(0, 0.0):
            model(IMAGES)
        penalties.append(quantizer.penalty().item())
    assert penalties[1] < 0.5 * penalties[0]
