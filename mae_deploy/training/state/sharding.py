"""The model as several processes hold it: copied to each (DDP), or in shares (FSDP2, torch's `fully_shard`).

Checkpoints hold whole tensors under the bare model's names either way, so a run may go on with the other one.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mae_deploy.errors import CheckFailed, reason
from mae_deploy.training.optim.groups import ParamGroup


class Network:
    """A model on its device, ready to be trained by all processes together."""

    def __init__(self, model: nn.Module, accelerator: Accelerator, *, sharded: bool, compiled: bool) -> None:
        self.model = model
        """The bare model; its parameters are those that are trained."""
        self.accelerator = accelerator
        self.sharded = sharded
        self._whole = copy.deepcopy(model) if sharded else model
        self.trained: nn.Module = (
            _shard(model, accelerator, compiled) if sharded else _replicate(model, accelerator, compiled)
        )
        """What the loss calls."""

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a micro-batch: processes exchange gradients after the last one of a step."""
        if self.sharded:
            self.trained.set_requires_gradient_sync(last)  # type: ignore[operator]
            return nullcontext()
        return nullcontext() if last else self.accelerator.no_sync(self.trained)

    def groups(self, groups: list[ParamGroup]) -> list[ParamGroup]:
        """The optimiser's groups with the parameters of now: sharding replaces them."""
        return [group | {"params": [self.model.get_parameter(name) for name in group["names"]]} for group in groups]

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """The bare model with whole tensors on the device; every process must come here."""
        if self.sharded:
            load_whole(self._whole, whole_tensors(self.model.state_dict(), keep=True))
            self._whole.to(self.accelerator.device)
        try:
            yield self._whole
        finally:
            if self.sharded:
                self._whole.to("cpu")


def whole_tensors(tensors: dict[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Copies of whole tensors on the CPU; where they are sharded, every process must come here, those that do not keep
    them too.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        gathered = whole(tensor.detach())  # one at a time: together they would need the memory that sharding saves
        if keep:
            found[name] = gathered.to("cpu", copy=True)
    return found


def whole(tensor: Any) -> Tensor:
    """The tensor that the processes hold together."""
    gathered: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered


def local(tensor: Any) -> Tensor:
    """This process's share of a tensor, in the same memory."""
    share: Tensor = tensor.detach().to_local() if hasattr(tensor, "to_local") else tensor.detach()
    return share


def like(reference: Any, tensor: Tensor) -> Tensor:
    """A whole tensor on the device of another and sharded as that is."""
    if hasattr(reference, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor.to(reference.device), reference.device_mesh, reference.placements)
    return tensor.to(reference.device)


def load_whole(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put whole tensors into a model, sharded or not.

    Raises:
        CheckFailed: names or shapes are not the model's.
    """
    own = model.state_dict()
    try:
        model.load_state_dict(
            {name: like(own[name], tensor) if name in own else tensor for name, tensor in tensors.items()}
        )
    except RuntimeError as error:
        raise CheckFailed(f"the checkpoint's weights do not fit the run's model: {reason(error)}") from error


def _replicate(model: nn.Module, accelerator: Accelerator, compiled: bool) -> nn.Module:
    # Inside of DDP, so that its buckets of gradients are still sent while the backward pass runs; the model keeps its
    # names.
    if compiled:
        _compile_blocks(model)
    prepared: nn.Module = accelerator.prepare(model)
    return prepared


def _compile_blocks(model: nn.Module) -> None:
    """Each transformer block by itself, the whole of a model that has none: blocks that are alike share their kernels,
    so that a network of any depth is compiled in the time of its kinds of blocks, and next to nothing is fused across
    them.
    """
    # The compiler itself looks for the gradient of what a block is given.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    blocks: list[nn.Module] = [module for module in model.modules() if isinstance(module, Block)]
    for module in blocks or [model]:
        module.compile()
    # Rates of drop path differ from block to block, and training and evaluation are compiled apart.
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 4 * len(blocks))


def _shard(model: nn.Module, accelerator: Accelerator, compiled: bool) -> nn.Module:
    """Each transformer block is gathered when it is needed; what is outside of blocks, with the whole."""
    # Imported here: it takes a second, which every start on one device would pay for.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # Losses read what the model returns and change none of it in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    model.to(accelerator.device)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for module in list(model.modules()):
        if isinstance(module, Block):
            if compiled:
                # Not the call: the hooks that gather and free its weights stay outside.
                module.forward = torch.compile(module.forward)  # type: ignore[method-assign]
            fully_shard(module, mesh=mesh)
    # Not resharded after the forward pass: that would gather the embeddings and the head twice.
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    return model
