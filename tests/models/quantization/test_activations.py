"""One pass over a model's activations tells all that any range and any scaling of channels needs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mae_deploy.errors import CheckFailed
from mae_deploy.images.read import Array
from mae_deploy.models.quantization.activations import ActivationStats, Observer, activation_scales, attention_scales
from mae_deploy.models.quantization.histogram import Method
from mae_deploy.models.quantization.rounding import FP8, eligible_linears
from mae_deploy.models.vit import Encoder
from tests.export.outlier_models import GATED, noisy_encoder
from tests.models.tiny_models import random_tensor, tiny_encoder, tiny_mae

NAMES = eligible_linears(tiny_encoder())


def observe(model: Encoder, *batches: Tensor) -> tuple[dict[str, ActivationStats], dict[str, Array], dict[str, Array]]:
    """Statistics, what attention gave, and the inputs of the Linears themselves, `(n, D)`."""
    observer = Observer(model, NAMES)
    seen: dict[str, list[Array]] = {name: [] for name in NAMES}

    def keep(name: str, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[name].append(inputs[0].flatten(0, -2).numpy())

    hooks = [model.get_submodule(name).register_forward_pre_hook(partial(keep, name)) for name in NAMES]
    with torch.no_grad(), observer.watching():
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    return (
        observer.stats(),
        observer.attention_absmax(),
        {name: np.concatenate(values) for name, values in seen.items()},
    )


BATCHES = random_tensor(3, 3, 6, 10), random_tensor(2, 3, 6, 10, seed=2) * 4


def test_the_statistics_are_those_of_all_batches_together() -> None:
    stats, _, inputs = observe(tiny_encoder(), *BATCHES)
    assert list(stats) == NAMES
    for name, values in inputs.items():
        entry = stats[name]
        np.testing.assert_array_equal(entry.absmax, np.abs(values).max(axis=0))
        np.testing.assert_allclose(
            entry.mean, values.mean(axis=0, dtype=np.float64), rtol=0, atol=1e-6
        )  # float32 squares and sums
        np.testing.assert_allclose(entry.mean_square, np.square(values, dtype=np.float64).mean(axis=0), rtol=1e-6)
        assert entry.outlier_ratio == pytest.approx(np.abs(values).max() / np.sqrt(np.square(values).mean()), rel=1e-5)
        assert entry.counts.shape == (1 if name.endswith("fc2") else 20, 256)
        assert entry.counts.sum() == values.size


@pytest.mark.parametrize("name", ["blocks.0.attn.qkv", "blocks.1.mlp.fc2"])
def test_the_histogram_is_that_of_the_values(name: str) -> None:
    """A bin is an eighth of an octave: shares are right to what falls into one."""
    stats, _, inputs = observe(tiny_encoder(), *BATCHES)
    found, magnitudes = stats[name].histogram(), np.sort(np.abs(inputs[name]).ravel())
    assert found.limit == magnitudes[-1]
    assert found.counts.sum() == pytest.approx(magnitudes.size)
    cumulative = np.concatenate([[0], np.cumsum(found.counts)])
    for edge in np.geomspace(0.01, 1, 23) * found.limit:
        got = np.interp(edge, np.linspace(0, found.limit, len(cumulative)), cumulative)
        least, most = (np.searchsorted(magnitudes, bound) for bound in (edge / 1.126, edge * 1.126))
        assert least - 1 <= got <= most + 1


def test_a_scaled_histogram_is_that_of_the_scaled_values() -> None:
    """Scaling channels by powers of two moves bins as they are, so the histogram is exactly what another pass would
    have given.
    """
    model, factors = tiny_encoder(), 2.0 ** np.arange(-10, 10)
    before, _, _ = observe(model, *BATCHES)
    with torch.no_grad():
        for part in ("weight", "bias"):
            model.get_parameter(f"blocks.0.norm1.{part}").div_(torch.from_numpy(factors).float())
    after, _, _ = observe(model, *BATCHES)
    scaled, again = before["blocks.0.attn.qkv"].divided_by(factors), after["blocks.0.attn.qkv"]
    np.testing.assert_allclose(scaled.absmax, again.absmax, rtol=1e-6)
    np.testing.assert_allclose(scaled.mean, again.mean, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(scaled.mean_square, again.mean_square, rtol=1e-6)
    np.testing.assert_allclose(scaled.histogram().counts, again.histogram().counts, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("magnitude", [0.0, 1e-30, 2.0**-21, 1e-3, 1500.0, 65504.0, 1e9])
def test_any_magnitude_is_counted(magnitude: float) -> None:
    """Beyond the bins at either end only the shape of the histogram is coarse; the range is exact."""
    model = tiny_encoder()
    with torch.no_grad():
        model.get_parameter("blocks.0.norm1.weight").zero_()
        model.get_parameter("blocks.0.norm1.bias").fill_(magnitude)
    stats, _, _ = observe(model, BATCHES[0])
    found = stats["blocks.0.attn.qkv"].histogram()
    assert found.limit == np.float32(magnitude)
    assert found.counts.sum() == pytest.approx(3 * 16 * 20 if magnitude else 0)
    scale = activation_scales({"x": stats["blocks.0.attn.qkv"]}, "minmax")["x"]
    assert scale == (pytest.approx(magnitude / 127) if magnitude else 1)


def test_scales_are_a_127th_of_the_range() -> None:
    stats, _, _ = observe(tiny_encoder(), *BATCHES)
    methods: tuple[Method, ...] = ("minmax", "percentile", "mse", "entropy")
    scales = {method: activation_scales(stats, method, 99) for method in methods}
    for name in NAMES:
        assert scales["minmax"][name] == pytest.approx(stats[name].absmax.max() / 127)
        for method in methods[1:]:
            assert 0 < scales[method][name] <= scales["minmax"][name]


def test_scales_of_fp8_are_a_448th_of_the_largest_magnitude() -> None:
    """Whatever the method: its steps are finer where the numbers are smaller."""
    stats, _, _ = observe(tiny_encoder(), *BATCHES)
    methods: tuple[Method, ...] = ("mse", "percentile")
    for scales in (activation_scales(stats, method, 90, FP8) for method in methods):
        assert scales == {
            name: float(np.float16(np.float32(stats[name].absmax.max()) / np.float32(448))) for name in NAMES
        }


def test_attention_has_a_scale_for_each_of_q_k_and_v() -> None:
    model = tiny_encoder()
    qkv: list[Array] = []
    hook = model.get_submodule("blocks.1.attn.qkv").register_forward_hook(
        lambda _module, _inputs, output: qkv.append(output.numpy())
    )
    _, absmax, _ = observe(model, BATCHES[0])
    hook.remove()
    assert list(absmax) == ["blocks.0.attn", "blocks.1.attn"]
    divisor = np.linspace(0.5, 2, 20)
    found = attention_scales(model, absmax, {"blocks.1.attn.proj": divisor})["blocks.1.attn"]
    q, k, v = qkv[0].reshape(-1, 3, 20).transpose(1, 0, 2)
    assert found == pytest.approx(
        [np.abs(part).max() / 127 for part in (q / 2, k, v / divisor)], rel=1e-6
    )  # heads of 4: q is divided by 2


@torch.no_grad()
@pytest.mark.parametrize("qk_norm", [False, True])
def test_scales_of_queries_and_keys_are_of_what_is_multiplied(qk_norm: bool) -> None:
    """Behind their norms exactly; turned by rotary positions, at most as much larger as the longest pair."""
    model = noisy_encoder(config=replace(GATED, qk_norm=qk_norm))
    observer, images = Observer(model, NAMES), random_tensor(4, 3, 12, 20)
    with observer.watching():
        model(images)
    found = attention_scales(model, observer.attention_absmax(), {})
    tokens, turns = model.embed(images), model.turns()
    assert turns is not None
    for index, block in enumerate(model.blocks):
        q, k, v = block(tokens, inner="only_qkv", turn=turns[index]).unbind(1)
        least = [float(part.abs().max()) / 127 for part in (q / 4, k, v)]  # heads of 16
        assert found[f"blocks.{index}.attn"][2] == pytest.approx(least[2], rel=1e-6)
        for scale, needed in zip(found[f"blocks.{index}.attn"][:2], least[:2], strict=True):
            assert needed * (1 - 1e-6) < scale < needed * 2**0.5
        tokens = block(tokens, turn=turns[index])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_activations_that_are_not_finite_are_named(value: float) -> None:
    model = tiny_encoder()
    with torch.no_grad():
        model.get_parameter("blocks.1.norm2.bias")[7] = value
    with pytest.raises(CheckFailed, match=r"the input of blocks\.1\.mlp\.fc1 has NaN or infinite values"):
        observe(model, BATCHES[0])


def test_nothing_is_watched_afterwards() -> None:
    model = tiny_mae()
    observer = Observer(model, NAMES)
    with observer.watching():
        pass
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
