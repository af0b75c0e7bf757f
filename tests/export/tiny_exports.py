"""Checkpoints to export, graphs run by ONNX Runtime as they lie on the disk, and what PyTorch itself says that they
must give.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from mae_deploy.checkpoint import save_checkpoint
from mae_deploy.config import from_dict
from mae_deploy.export.graph.builder import GraphBuilder
from mae_deploy.export.graph.encoder import build_graph
from mae_deploy.export.graph.spec import GraphSpec, TokenMode
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.images.read import Array
from mae_deploy.models.config import EncoderConfig
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.pyramid import SimpleFeaturePyramid
from mae_deploy.models.vit import Classifier, Encoder
from tests.models.tiny_models import CLASSES, metadata_of

CLASS_NAMES = tuple(f"class-{letter}" for letter in "abcdefghijk"[:CLASSES])


def write_checkpoint(folder: Path, model: Encoder, **metadata: Any) -> Path:
    """A checkpoint folder of this model."""
    save_checkpoint(folder, model.state_dict(), metadata_of(model, **metadata))
    return folder


def read_graph(path: Path) -> onnx.ModelProto:
    """The graph without its external data."""
    return onnx.load(path, load_external_data=False)


def open_session(path: Path) -> Any:
    """ONNX Runtime as it comes, on one thread; not through the project's own engine. Its products of 8-bit integers are
    exact on every CPU.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_session(session: Any, **inputs: Array) -> dict[str, Array]:
    """All outputs by name."""
    names = [entry.name for entry in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


class SavedGraph:
    """A builder's graph on the disk and in a session."""

    def __init__(self, graph: GraphBuilder, folder: Path) -> None:
        self.path = folder / "graph.onnx"
        self.files = graph.save(self.path)
        self.model = read_graph(self.path)
        self.session = open_session(self.path)

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        return run_session(self.session, **inputs)

    @property
    def weights(self) -> dict[str, onnx.TensorProto]:
        """The stored constants by name."""
        return {tensor.name: tensor for tensor in self.model.graph.initializer}


def graph_of(
    model: Encoder,
    folder: Path,
    mode: TokenMode = "visible",
    *,
    pyramid: SimpleFeaturePyramid | None = None,
    **spec: Any,
) -> SavedGraph:
    """The graph of a model, written into a folder."""
    if pyramid is not None:
        spec["pyramid"] = {name: tensor.numpy() for name, tensor in pyramid.state_dict().items()}
    return SavedGraph(build_graph(metadata_of(model), model.state_dict(), GraphSpec(token_mode=mode, **spec)), folder)


# --- inputs ----------------------------------------------------------------------------------------------------------


def random_pixels(config: EncoderConfig, batch: int, seed: int = 1) -> Array:
    """uint8 `(B, H, W, C)`."""
    return np.random.default_rng(seed).integers(
        0, 256, size=(batch, *config.image_size, config.in_chans), dtype=np.uint8
    )


def normalised(model: Encoder, pixels: Array) -> Array:
    """As a host does it: float32 `(B, C, H, W)`."""
    return from_dict(Preprocess, metadata_of(model).preprocess).normalise(pixels)


def permutations(num_patches: int, batch: int, keep: int, seed: int = 2) -> Array:
    """`ids_keep`, int64 `(B, K)`."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(num_patches)[:keep] for _ in range(batch)])


def padded(num_patches: int, lengths: list[int], keep: int, garbage: int = 0) -> dict[str, Array]:
    """`ids_keep (B, K)` with so many real ids in each row, and `num_keep (B,)`.

    Args:
        garbage: what stands in the padding. 0: any int64; 1: a real id once more; 2: int64's ends, -1 and N in turn;
            from 3 on, others of the same.
    """
    rng = np.random.default_rng(garbage)
    ids = rng.integers(np.iinfo(np.int64).min, np.iinfo(np.int64).max, size=(len(lengths), keep))
    for row, real, length in zip(ids, permutations(num_patches, len(lengths), max(lengths)), lengths, strict=True):
        row[:length] = real[:length]
        if garbage % 3 == 1:
            row[length:] = real[0]
        elif garbage % 3 == 2:
            row[length:] = np.resize([np.iinfo(np.int64).max, np.iinfo(np.int64).min, -1, num_patches], keep - length)
    return {"ids_keep": ids, "num_keep": np.array(lengths, np.int64)}


# --- what PyTorch says -----------------------------------------------------------------------------------------------


@torch.no_grad()
def pytorch_outputs(
    model: Encoder,
    images: Array,
    tokens: Mapping[str, Array] | None = None,
    *,
    pyramid: SimpleFeaturePyramid | None = None,
) -> dict[str, Array]:
    """All that a model can give under the graph's names, and `pixels` of an autoencoder; where lengths differ, image by
    image and padded with zeros.

    Args:
        tokens: `ids_keep` and, of a ragged batch, `num_keep`; None for all patches.
    """
    if tokens and "num_keep" in tokens:
        padded_ids, lengths = tokens["ids_keep"], tokens["num_keep"].tolist()
        alone = [
            pytorch_outputs(model, images[[i]], {"ids_keep": padded_ids[[i], :length]}, pyramid=pyramid)
            for i, length in enumerate(lengths)
        ]
        return {
            name: np.concatenate([_filled_up(name, one[name], padded_ids.shape[1]) for one in alone])
            for name in alone[0]
            if name != "pixels"
        }
    ids = torch.from_numpy(tokens["ids_keep"]) if tokens else None
    blocks = [model.embed(torch.from_numpy(images), ids)]
    for block in model.blocks:
        blocks.append(block(blocks[-1]))
    inner = {f"block_{index}": tokens[:, 1:] for index, tokens in enumerate(blocks[1:])}
    if pyramid is not None:
        inner |= pyramid(_feature_map(model, blocks[-1], ids))
    last = model.norm(blocks[-1])
    pooled = last[:, 1:].mean(dim=1)
    found = {
        "cls": last[:, 0],
        "tokens": last[:, 1:],
        "pooled": pooled,
        "feature_map": _feature_map(model, last, ids),
        **inner,
    }
    if isinstance(model, Classifier):
        found["logits"] = model(torch.from_numpy(images), ids)
        found["probs"] = found["logits"].softmax(dim=1)
        if model.pool == "avg":
            found = {"logits": found["logits"], "probs": found["probs"], "pooled": model.fc_norm(pooled), **inner}
    if isinstance(model, MaskedAutoencoder) and ids is not None:
        found["pixels"] = model.forward_decoder(last, _ids_restore(ids, model.config.num_patches))
    return {name: tensor.numpy() for name, tensor in found.items()}


def _filled_up(name: str, array: Array, keep: int) -> Array:
    if name != "tokens" and not name.startswith("block_"):
        return array
    rows = np.zeros((1, keep, array.shape[2]), array.dtype)
    rows[:, : array.shape[1]] = array
    return rows


def _feature_map(model: Encoder, tokens: Tensor, ids: Tensor | None) -> Tensor:
    rows, columns = model.config.grid_size
    grid = torch.zeros(len(tokens), rows, columns, tokens.shape[2])
    for image, own in enumerate(tokens[:, 1:]):
        for place, token in enumerate(own):
            patch = place if ids is None else int(ids[image, place])
            grid[image, patch // columns, patch % columns] = token
    return grid.permute(0, 3, 1, 2).contiguous()


def _ids_restore(ids: Tensor, num_patches: int) -> Tensor:
    """Where each patch stands in a shuffle that begins with the kept ones."""
    orders = [[*row, *(patch for patch in range(num_patches) if patch not in row)] for row in ids.tolist()]
    return torch.tensor([[order.index(patch) for patch in range(num_patches)] for order in orders])


def input_scales(model: Encoder, images: Array, tokens: Mapping[str, Array] | None = None) -> dict[str, float]:
    """For every Linear of every block, of a decoder too, absmax / 127 of its input: what min-max calibration on these
    images finds.
    """
    found: dict[str, float] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, given: found.update({name: float(given[0].abs().max()) / 127})

    linears = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and "blocks." in name
    }
    hooks = [module.register_forward_pre_hook(keep(name)) for name, module in linears.items()]
    pytorch_outputs(model, images, tokens)
    for hook in hooks:
        hook.remove()
    return found


# --- comparing -------------------------------------------------------------------------------------------------------


def sqnr(found: Array, expected: Array) -> float:
    """Signal-to-noise ratio in dB."""
    signal, noise = np.square(expected, dtype=np.float64).sum(), np.square(found.astype(np.float64) - expected).sum()
    return float(10 * np.log10(signal / max(noise, 1e-300)))


def assert_close(found: Mapping[str, Array], expected: Mapping[str, Array], limit: float = 1e-5) -> None:
    """Within 1e-5 of the largest number, the project's limit for FP32: the same sums in another order, through up to
    three blocks.
    """
    assert set(found) == set(expected)
    for name, reference in expected.items():
        assert found[name].shape == reference.shape, name
        assert found[name].dtype == np.float32
        assert np.abs(found[name] - reference).max() <= limit * np.abs(reference).max(), name
