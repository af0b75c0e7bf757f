"""Smoothing changes nothing but what can be rounded; corrected biases make up for what rounding does on average."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mae_deploy.errors import CheckFailed
from mae_deploy.export.quantization.fake_quant import fake_quantized
from mae_deploy.images.read import Array
from mae_deploy.models.quantization.activations import ActivationStats, Observer, activation_scales
from mae_deploy.models.quantization.histogram import Method
from mae_deploy.models.quantization.rounding import eligible_linears
from mae_deploy.models.quantization.smoothing import (
    assumed_absmax,
    bias_corrections,
    correct_biases,
    smooth,
    smoothed_stats,
    smoothing_divisors,
)
from mae_deploy.models.vit import Encoder
from tests.export.outlier_models import CONFIG, GATED, NORMED, decibels, noisy_encoder, plant_outliers
from tests.models.tiny_models import random_tensor, tiny_mae

NAMES = eligible_linears(noisy_encoder())
IMAGES = random_tensor(16, 3, 12, 20)
HELD_OUT = random_tensor(8, 3, 12, 20, seed=2)

Tensors = dict[str, Tensor]


CONFIGS = {"plain": CONFIG, "gated": GATED, "normed": NORMED}


def model_of(tensors: Tensors) -> Encoder:
    kind = "plain" if "reg_token" not in tensors else "normed" if "blocks.0.mlp.norm.weight" in tensors else "gated"
    model = Encoder(CONFIGS[kind]).eval()
    model.load_state_dict(tensors)
    return model


def run(tensors: Tensors, images: Tensor, scales: dict[str, float | None] | None = None) -> Tensor:
    model = model_of(tensors)
    with torch.no_grad(), fake_quantized(model, scales or {}):
        return model(images)  # type: ignore[no-any-return]


def observe(tensors: Tensors) -> dict[str, ActivationStats]:
    model = model_of(tensors)
    observer = Observer(model, NAMES)
    with torch.no_grad(), observer.watching():
        model(IMAGES)
    return observer.stats()


def absmax_of(stats: dict[str, ActivationStats]) -> dict[str, Array]:
    return {name: entry.absmax for name, entry in stats.items()}


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("factor", [1.0, 50.0])
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_function_stays_what_it_is(kind: str, alpha: float, factor: float) -> None:
    tensors = plant_outliers(noisy_encoder(config=CONFIGS[kind]).state_dict(), factor)
    divisors = smoothing_divisors(tensors, absmax_of(observe(tensors)), alpha)
    smoothed = smooth(tensors, divisors)
    assert decibels(run(tensors, HELD_OUT), run(smoothed, HELD_OUT)) > 110  # float32's rounding is at 140
    changed = {name for name in tensors if smoothed[name] is not tensors[name]}
    assert changed == {
        f"blocks.{index}.{name}"
        for index in range(2)
        for name in (
            "norm1.weight",
            "norm1.bias",
            "norm2.weight",
            "norm2.bias",
            "attn.qkv.weight",
            "attn.proj.weight",
            "mlp.fc1.weight",
            *(("attn.norm.weight", "attn.norm.bias") if kind == "normed" else ("attn.qkv.bias",)),
            *{"plain": (), "gated": ("mlp.fc1.bias",), "normed": ("mlp.norm.weight", "mlp.norm.bias")}[kind],
            *(() if kind == "plain" else ("mlp.fc2.weight",)),
        )
    }


def test_a_decoder_is_smoothed_too() -> None:
    model, images = tiny_mae(), random_tensor(2, 3, 6, 10)
    names = eligible_linears(model)
    divisors = {
        name: np.exp(random_tensor(model.get_parameter(f"{name}.weight").shape[1]).double().numpy())
        for name in names
        if not name.endswith("fc2")
    }
    latent, restore = (
        random_tensor(2, 6, 20),
        torch.stack([torch.randperm(15, generator=torch.Generator().manual_seed(row)) for row in range(2)]),
    )
    with torch.no_grad():
        expected = model.forward_encoder(images), model.forward_decoder(latent, restore)
        model.load_state_dict(smooth(model.state_dict(), divisors))
        assert decibels(expected[0], model.forward_encoder(images)) > 110
        assert decibels(expected[1], model.forward_decoder(latent, restore)) > 110


def test_divisors_are_the_papers() -> None:
    """Equation 4, brought to geometric mean 1."""
    weight = torch.tensor([[1.0, -4.0, 0.25], [0.5, 2.0, -1.0]])
    absmax = {"blocks.0.mlp.fc1": np.array([16.0, 1.0, 4.0]), "blocks.0.mlp.fc2": np.array([1.0])}
    found = smoothing_divisors({"blocks.0.mlp.fc1.weight": weight}, absmax, 0.5)
    expected = np.sqrt([16 / 1, 1 / 4, 4 / 1])
    assert list(found) == ["blocks.0.mlp.fc1"]
    np.testing.assert_allclose(found["blocks.0.mlp.fc1"], expected / expected.prod() ** (1 / 3))


def test_channels_that_nothing_comes_through_are_left_alone() -> None:
    weight = torch.tensor([[1.0, 2.0, 0.0, 3.0]])
    found = smoothing_divisors(
        {"blocks.0.attn.qkv.weight": weight}, {"blocks.0.attn.qkv": np.array([2.0, 0.0, 5.0, 9.0])}, 0.5
    )["blocks.0.attn.qkv"]
    assert found[1] == found[2] == 1
    assert found[0] * found[3] == pytest.approx(1)
    nothing = smoothing_divisors({"blocks.0.attn.qkv.weight": weight}, {"blocks.0.attn.qkv": np.zeros(4)}, 0.5)[
        "blocks.0.attn.qkv"
    ]
    np.testing.assert_array_equal(nothing, np.ones(4))


def test_no_channel_is_blown_up_without_end() -> None:
    """A channel that calibration saw next to nothing of may be larger in the field."""
    weight = torch.ones(1, 3)
    found = smoothing_divisors(
        {"blocks.0.attn.qkv.weight": weight}, {"blocks.0.attn.qkv": np.array([1.0, 1e-30, 1.0])}, 1.0
    )["blocks.0.attn.qkv"]
    assert found[0] / found[1] == pytest.approx(1e5)


def test_the_statistics_follow_the_weights() -> None:
    tensors = noisy_encoder().state_dict()
    before = observe(tensors)
    divisors = smoothing_divisors(tensors, absmax_of(before), 0.6)
    expected, found = observe(smooth(tensors, divisors)), smoothed_stats(before, divisors)
    for name in NAMES:
        np.testing.assert_allclose(found[name].absmax, expected[name].absmax, rtol=1e-4)
        np.testing.assert_allclose(found[name].mean, expected[name].mean, rtol=1e-4, atol=1e-5)
    methods: tuple[Method, ...] = ("minmax", "mse")
    for method in methods:
        again, derived = activation_scales(expected, method), activation_scales(found, method)
        assert derived == pytest.approx(
            again, rel=1e-4 if method == "minmax" else 0.06
        )  # two candidates of the search lie 2.6 % apart


def sqnr(tensors: Tensors, stats: dict[str, ActivationStats] | None) -> float:
    """With ranges from these statistics, or dynamic ones."""
    scales: dict[str, float | None] = {**activation_scales(stats)} if stats is not None else dict.fromkeys(NAMES)
    return decibels(run(tensors, HELD_OUT), run(tensors, HELD_OUT, scales))


@pytest.mark.parametrize("kind", CONFIGS)
def test_smoothing_repairs_outlier_channels(kind: str) -> None:
    tensors = noisy_encoder(config=CONFIGS[kind]).state_dict()
    planted = plant_outliers(tensors)
    assert decibels(run(tensors, HELD_OUT), run(planted, HELD_OUT)) > 110
    clean, spoilt = sqnr(tensors, observe(tensors)), sqnr(planted, observe(planted))
    assert clean > 29
    assert spoilt < clean - 10
    stats = observe(planted)
    divisors = smoothing_divisors(planted, absmax_of(stats), 0.6)
    assert sqnr(smooth(planted, divisors), smoothed_stats(stats, divisors)) > clean - 1


@pytest.mark.parametrize("kind", CONFIGS)
def test_without_images_the_weights_say_where_the_outliers_are(kind: str) -> None:
    tensors = noisy_encoder(config=CONFIGS[kind]).state_dict()
    planted = plant_outliers(tensors)
    clean, spoilt = sqnr(tensors, None), sqnr(planted, None)
    assert spoilt < clean - 10
    absmax = assumed_absmax(planted, NAMES)
    assert sqnr(smooth(planted, smoothing_divisors(planted, absmax, 0.6)), None) > clean - 1
    measured = observe(planted)
    assert list(absmax) == [name for name in NAMES if kind != "plain" or not name.endswith("fc2")]
    for name, values in absmax.items():
        # attention averages v, and a gate shuts, by how much the weights do not say
        if not name.endswith(("proj", "fc2")):
            assert np.abs(np.log2(values / measured[name].absmax)).max() < 1.5


def test_corrected_biases_remove_the_mean_error() -> None:
    """Of each Linear's output, over the images that were calibrated with."""
    tensors = noisy_encoder().state_dict()
    tensors = {
        name: tensor + 1 if name.endswith(("norm1.bias", "norm2.bias")) else tensor for name, tensor in tensors.items()
    }  # means to be lost
    corrections = bias_corrections(tensors, observe(tensors))
    assert list(corrections) == NAMES
    name = "blocks.0.attn.qkv"
    corrected = correct_biases(tensors, corrections, [name])
    assert [key for key in tensors if corrected[key] is not tensors[key]] == [f"{name}.bias"]
    outputs = {}
    for label, state in (("plain", tensors), ("rounded", tensors), ("corrected", corrected)):
        model, seen = Encoder(CONFIG).eval(), list[Tensor]()
        model.load_state_dict(state)
        model.get_submodule(name).register_forward_hook(lambda _module, _inputs, output, seen=seen: seen.append(output))
        with fake_quantized(model, {} if label == "plain" else {name: 0.05}):
            model(IMAGES)
        outputs[label] = seen[0].flatten(0, 1).double()
    bias = {
        label: (outputs[label] - outputs["plain"]).mean(dim=0).abs().max().item() for label in ("rounded", "corrected")
    }
    assert bias["corrected"] < 0.25 * bias["rounded"]
    assert sqnr_of(tensors, corrected, name) > sqnr_of(tensors, tensors, name) + 0.5


def sqnr_of(expected: Tensors, tensors: Tensors, name: str) -> float:
    return decibels(run(expected, HELD_OUT), run(tensors, HELD_OUT, {name: 0.05}))


def test_a_weight_that_is_not_finite_is_named() -> None:
    tensors = noisy_encoder().state_dict()
    stats = observe(tensors)
    broken = {**tensors, "blocks.1.mlp.fc2.weight": tensors["blocks.1.mlp.fc2.weight"] * torch.inf}
    with pytest.raises(CheckFailed, match=r"blocks\.1\.mlp\.fc2\.weight has NaN or infinite values"):
        bias_corrections(broken, stats)
