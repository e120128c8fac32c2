"""Data parallelism with PyTorch's DDP (full copies) or FSDP2 (shards). A single process uses neither."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from openpae.engine.optim import device_batches
from openpae.engine.settings import LoopConfig
from openpae.runtime import processes
from openpae.storage.files import fingerprint


def distribute(
    module: nn.Module, loop: LoopConfig, *, small: bool = False, some_unused: bool = False
) -> nn.Module:
    """Prepare a module for training on all ranks. Call and optimize the returned module.

    One process: returns the module. ddp: returns a wrapper. fsdp: returns a sharded copy; the module loses
    its trained weights (see `lend_weights`). Frozen weights are never sharded.

    Args:
        module: on its device, with its initial weights.
        loop: `parallel` and the batch sizes.
        small: use ddp under fsdp too, for networks whose sharding costs more than it saves.
        some_unused: a step may leave some weights without gradient.

    Raises:
        ValueError: the global batch cannot be split equally over ranks.
        RuntimeError: the ranks start from different weights.
    """
    device_batches(loop)  # before a run folder is made
    if processes.world_size() == 1:
        return module
    fingerprints = sorted(set(processes.gather(fingerprint(module.state_dict()))))
    if len(fingerprints) > 1:
        raise RuntimeError(
            f"the processes must start from the same weights of {type(module).__name__}, got the "
            f"fingerprints {', '.join(fingerprints)}; install the same packages on all machines"
        )
    if loop.parallel == "fsdp" and not small:
        return _shard(module)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="`broadcast_buffers` is deprecated"
        )  # torch 2.9 has no other
        return DistributedDataParallel(
            module,
            broadcast_buffers=False,  # all buffers are constants
            gradient_as_bucket_view=True,
            find_unused_parameters=some_unused,
        )


def unwrap(player: nn.Module) -> nn.Module:
    """The module inside a DDP wrapper, or the player itself."""
    return player.module if isinstance(player, DistributedDataParallel) else player


def is_sharded(player: nn.Module) -> bool:
    """Whether the weights are sharded."""
    return isinstance(player, FSDPModule)


@contextmanager
def sync_gradients(players: Iterable[nn.Module], enabled: bool) -> Iterator[None]:
    """Inside, backward passes average gradients over ranks if `enabled`, else they accumulate them locally.

    Only the last device batch of a step needs it.
    """
    with ExitStack() as stack:
        for player in players:
            if isinstance(player, FSDPModule):
                player.set_requires_gradient_sync(enabled)
            elif isinstance(player, DistributedDataParallel) and not enabled:
                stack.enter_context(player.no_sync())
        yield


def gather_full(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, sharded ones gathered. All ranks must call it; each gets the full tensors."""
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in values.items()
    }


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """This rank's shard of a full tensor if `like` is sharded, else the tensor; without communication."""
    if not isinstance(like, DTensor) or isinstance(value, DTensor):
        return value
    on_device = value.to(like.device)
    return distribute_tensor(on_device, like.device_mesh, like.placements, src_data_rank=None)


@contextmanager
def lend_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, a module that lost its weights in `distribute` holds these weights."""
    module.load_state_dict(weights, assign=True)
    try:
        yield
    finally:
        _drop_weights(module)


def _shard(module: nn.Module) -> nn.Module:
    frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
    device = next(module.parameters()).device
    shards = copy.deepcopy(module, {id(parameter): parameter for parameter in frozen})
    # Gather weights in float32; autocast rounds them in each product, as for one process. Gathering them in
    # bfloat16 would halve the traffic, but norms would lose their float32 weights.
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    mesh = init_device_mesh(device.type, (processes.world_size(),))
    # The warning is about in-place changes of outputs; no module makes any.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for part in [*_repeated_layers(shards), shards]:
        fully_shard(part, mesh=mesh, mp_policy=policy, ignored_params=set(frozen))
    _drop_weights(module)
    return shards


def _repeated_layers(module: nn.Module) -> list[nn.Module]:
    """The trained elements of all module lists, innermost first: the units of sharding."""
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    layers = [layer for part in lists for layer in part]
    return [layer for layer in reversed(layers) if any(p.requires_grad for p in layer.parameters())]


def _drop_weights(module: nn.Module) -> None:
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if parameter.requires_grad:
                setattr(part, name, nn.Parameter(parameter.detach().to("meta")))
