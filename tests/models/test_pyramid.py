"""The pyramid computes what ViTDet describes under Detectron2's names, and reads Detectron2's weights or refuses them
with a reason.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from mae_deploy.checkpoint import OWN_LICENCE, UNKNOWN_LICENCE
from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.models.pyramid import LEVELS, SimpleFeaturePyramid, pyramid_sizes
from mae_deploy.weights.pyramid import load_pyramid, random_pyramid
from tests.models.tiny_models import fill, random_tensor

# Half of 13 is 6, a quarter 3: no two of these sizes are equal.
WIDTH, CHANNELS = 13, 7

NAMES = [
    "simfp_2.0.weight",
    "simfp_2.0.bias",
    "simfp_2.1.weight",
    "simfp_2.1.bias",
    "simfp_2.3.weight",
    "simfp_2.3.bias",
    "simfp_2.4.weight",
    "simfp_2.4.norm.weight",
    "simfp_2.4.norm.bias",
    "simfp_2.5.weight",
    "simfp_2.5.norm.weight",
    "simfp_2.5.norm.bias",
    "simfp_3.0.weight",
    "simfp_3.0.bias",
    "simfp_3.1.weight",
    "simfp_3.1.norm.weight",
    "simfp_3.1.norm.bias",
    "simfp_3.2.weight",
    "simfp_3.2.norm.weight",
    "simfp_3.2.norm.bias",
    "simfp_4.0.weight",
    "simfp_4.0.norm.weight",
    "simfp_4.0.norm.bias",
    "simfp_4.1.weight",
    "simfp_4.1.norm.weight",
    "simfp_4.1.norm.bias",
    "simfp_5.1.weight",
    "simfp_5.1.norm.weight",
    "simfp_5.1.norm.bias",
    "simfp_5.2.weight",
    "simfp_5.2.norm.weight",
    "simfp_5.2.norm.bias",
]
"""As they stand in a checkpoint of Detectron2's ViTDet, behind `backbone.`."""


def tiny_pyramid() -> SimpleFeaturePyramid:
    return fill(SimpleFeaturePyramid(WIDTH, CHANNELS))


# --- the module ------------------------------------------------------------------------------------------------------


def test_names_are_detectrons() -> None:
    assert list(SimpleFeaturePyramid(WIDTH).state_dict()) == NAMES


@pytest.mark.parametrize("grid_size", [(4, 6), (3, 5), (2, 11)], ids=["even", "odd", "even by odd"])
def test_sizes(grid_size: tuple[int, int]) -> None:
    H, W = grid_size
    sizes = {"p2": (4 * H, 4 * W), "p3": (2 * H, 2 * W), "p4": (H, W), "p5": (H // 2, W // 2)}
    assert pyramid_sizes(grid_size) == sizes
    maps = tiny_pyramid()(random_tensor(2, WIDTH, *grid_size))
    assert tuple(maps) == LEVELS
    assert {name: tuple(map.shape) for name, map in maps.items()} == {
        name: (2, CHANNELS, *size) for name, size in sizes.items()
    }


@pytest.mark.parametrize("grid_size", [(1, 7), (7, 1)])
def test_a_grid_without_a_half_is_refused(grid_size: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=f"at least 2x2 patches, the image has {grid_size[0]}x{grid_size[1]}"):
        pyramid_sizes(grid_size)


def test_the_default_is_256_channels() -> None:
    maps = SimpleFeaturePyramid(WIDTH)(random_tensor(1, WIDTH, 3, 5))
    assert {map.shape[1] for map in maps.values()} == {256}


@torch.no_grad()
def test_the_arithmetic_is_the_papers() -> None:
    pyramid = tiny_pyramid()
    features = random_tensor(2, WIDTH, 3, 5)
    weights: dict[str, Tensor] = pyramid.state_dict()

    def double(value: Tensor, name: str) -> Tensor:  # each pixel becomes 2x2 of its own
        B, _, H, W = value.shape
        pixels: Tensor = torch.einsum("bchw,coij->bohiwj", value, weights[f"{name}.weight"])
        return pixels.reshape(B, -1, 2 * H, 2 * W) + weights[f"{name}.bias"][:, None, None]

    def norm(value: Tensor, name: str) -> Tensor:
        variance, mean = torch.var_mean(value, dim=1, correction=0, keepdim=True)
        normed: Tensor = (value - mean) / (variance + 1e-6).sqrt()
        return normed * weights[f"{name}.weight"][:, None, None] + weights[f"{name}.bias"][:, None, None]

    def project(value: Tensor, first: str, second: str) -> Tensor:
        value = norm(torch.einsum("bchw,oc->bohw", value, weights[f"{first}.weight"][:, :, 0, 0]), f"{first}.norm")
        return norm(F.conv2d(value, weights[f"{second}.weight"], padding=1), f"{second}.norm")

    halves = features[:, :, :2, :4].reshape(2, WIDTH, 1, 2, 2, 2).amax(dim=(3, 5))
    expected = {
        "p2": project(
            double(F.gelu(norm(double(features, "simfp_2.0"), "simfp_2.1")), "simfp_2.3"), "simfp_2.4", "simfp_2.5"
        ),
        "p3": project(double(features, "simfp_3.0"), "simfp_3.1", "simfp_3.2"),
        "p4": project(features, "simfp_4.0", "simfp_4.1"),
        "p5": project(halves, "simfp_5.1", "simfp_5.2"),
    }
    for name, found in pyramid(features).items():
        # The sums are float32 in another order; the outputs are normalised, so of order 1.
        torch.testing.assert_close(found, expected[name], rtol=0, atol=1e-5)


def test_initialised_as_pytorchs_layers_are() -> None:
    def project(channels: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, CHANNELS, 1, bias=False), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)]

    torch.manual_seed(3)
    layers = [
        nn.ConvTranspose2d(13, 6, 2, 2),
        nn.ConvTranspose2d(6, 3, 2, 2),
        *project(3),
        nn.ConvTranspose2d(13, 6, 2, 2),
        *project(6),
        *project(13),
        *project(13),
    ]
    expected = [tensor for layer in layers for tensor in layer.state_dict().values()]
    torch.manual_seed(3)
    tensors = SimpleFeaturePyramid(WIDTH, CHANNELS).state_dict()
    norms = {name for name in tensors if ".norm." in name or name.startswith("simfp_2.1.")}
    assert all(
        torch.equal(found, wanted)
        for found, wanted in zip((tensors[name] for name in tensors if name not in norms), expected, strict=True)
    )
    assert all(
        torch.equal(tensors[name], torch.full_like(tensors[name], float(name.endswith("weight")))) for name in norms
    )


def test_random_weights_depend_on_the_seed_only() -> None:
    state = torch.get_rng_state()
    first, again, other = (random_pyramid(WIDTH, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert (first.record, first.licence) == ({"source": "random", "seed": 0}, OWN_LICENCE)
    assert not first.module.training
    weights = [pyramid.module.state_dict()["simfp_4.0.weight"] for pyramid in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


# --- weights of others -----------------------------------------------------------------------------------------------


def write_detector(file: Path, tensors: dict[str, Tensor], prefix: str = "backbone.") -> Path:
    """A detector with this pyramid, as Detectron2's checkpointer writes it, or as safetensors."""
    everything = {f"{prefix}net.blocks.0.norm1.weight": torch.ones(5), "roi_heads.box_head.fc1.bias": torch.ones(3)}
    everything |= {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    if file.suffix == ".safetensors":
        save_file(everything, file)
    else:
        torch.save({"model": everything, "optimizer": {"state": {}, "param_groups": []}, "iteration": 7}, file)
    return file


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.model.backbone."])
@pytest.mark.parametrize("file", ["model_final.pth", "pyramid.safetensors"])
def test_reads_a_detector(tmp_path: Path, file: str, prefix: str) -> None:
    tensors = tiny_pyramid().state_dict()
    path = write_detector(tmp_path / file, tensors, prefix)
    pyramid = load_pyramid(path, WIDTH)
    found = pyramid.module.state_dict()
    assert list(found) == NAMES
    assert [name for name in NAMES if not torch.equal(found[name], tensors[name])] == []
    assert pyramid.record == {"source": file, "source_sha256": sha256(path.read_bytes()).hexdigest()}
    assert pyramid.licence == UNKNOWN_LICENCE
    assert (pyramid.module.training, pyramid.module.out_channels) == (False, CHANNELS)


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    half = {name: tensor.half() for name, tensor in tiny_pyramid().state_dict().items()}
    found = load_pyramid(write_detector(tmp_path / "model.safetensors", half), WIDTH).module.state_dict()
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert all(torch.equal(found[name], half[name].float()) for name in NAMES)


Change = Callable[[dict[str, Tensor]], Any]

REFUSED: dict[str, tuple[Change, str]] = {
    "width": (
        lambda tensors: tensors.update({"simfp_4.0.weight": torch.ones(CHANNELS, 17, 1, 1)}),
        r"1 misshapen: simfp_4.0.weight \(7, 17, 1, 1\) instead of \(7, 13",
    ),
    "dimensions": (
        lambda tensors: tensors.update({"simfp_3.0.bias": torch.tensor(1.0)}),
        r"simfp_3.0.bias \(\) instead of \(6,\)",
    ),
    "no width": (lambda tensors: tensors.update({"simfp_4.0.weight": torch.tensor(1.0)}), "misshapen"),
    "missing": (lambda tensors: tensors.pop("simfp_2.3.bias"), "does not fit: 1 missing: simfp_2.3.bias"),
    "no p4": (lambda tensors: tensors.pop("simfp_4.0.weight"), "1 missing: simfp_4.0.weight"),
    "batch norm": (
        lambda tensors: tensors.update({"simfp_5.1.norm.running_mean": torch.ones(CHANNELS)}),
        "1 unexpected: simfp_5.1.norm.running_mean",
    ),
    "other scale": (
        lambda tensors: tensors.update({"simfp_6.1.weight": torch.ones(1)}),
        "1 unexpected: simfp_6.1.weight",
    ),
    "two": (
        lambda tensors: tensors.update({"ema.simfp_2.0.bias": torch.ones(6)}),
        "holds 2 feature pyramids: backbone.simfp_…, backbone.ema.simfp_…",
    ),
    "none": (lambda tensors: tensors.clear(), "holds no feature pyramid: none of its 2 tensors is named simfp_"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses_what_does_not_fit(tmp_path: Path, change: Change, message: str) -> None:
    tensors = tiny_pyramid().state_dict()
    change(tensors)
    with pytest.raises(CheckFailed, match=message) as caught:
        load_pyramid(write_detector(tmp_path / "model.pth", tensors), WIDTH)
    assert "\n" not in str(caught.value)


def test_refuses_the_pyramid_of_another_width(tmp_path: Path) -> None:
    file = write_detector(tmp_path / "model.pth", tiny_pyramid().state_dict())
    with pytest.raises(
        CheckFailed, match=r"misshapen: simfp_2.0.weight \(13, 6, 2, 2\) instead of \(17, 8, 2, 2\)"
    ) as caught:
        load_pyramid(file, 17)
    assert "an encoder 17 wide" in str(caught.value.hint)


def test_refuses_code(tmp_path: Path) -> None:
    torch.save({"model": {"simfp_2.0.weight": Path}}, tmp_path / "model.pth")
    with pytest.raises(CheckFailed, match="refused to unpickle"):
        load_pyramid(tmp_path / "model.pth", WIDTH)


def test_refuses_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no pyramid weights at"):
        load_pyramid(tmp_path / "model.pth", WIDTH)


def test_a_pickle_of_the_model_zoo_is_refused(tmp_path: Path) -> None:
    arrays = {f"backbone.{name}": tensor.numpy() for name, tensor in tiny_pyramid().state_dict().items()}
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2"}))
    with pytest.raises(CheckFailed, match=r"refused to unpickle .*: a \.pkl can run code") as caught:
        load_pyramid(tmp_path / "model.pkl", WIDTH)
    assert "DetectionCheckpointer" in (caught.value.hint or "")
