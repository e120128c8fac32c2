"""How the processes of a run train one model together: whole copies whose gradients are averaged (DDP), or
shards of one (FSDP2). PyTorch's own engine does it; one process does neither."""

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
    """What the losses call in the module's place, so that all processes train the same weights.

    With one process it is the module itself, with ddp a wrapper around it. With fsdp it is a copy cut into
    shards, and the module gives its trained weights away: `lend_weights` lends it some for an evaluation.
    Frozen weights are never cut. Optimizers are made from what this returns.

    Args:
        module: on its device, with the weights that training starts from.
        loop: says which way.
        small: keep it whole under fsdp too: for networks beside the model, which are not worth the traffic.
        some_unused: a step may leave some of its weights without gradient.

    Raises:
        ValueError: the processes cannot share the global batch equally.
        RuntimeError: they do not start from the same weights.
    """
    device_batches(loop)  # before a run folder is made
    if processes.world_size() == 1:
        return module
    prints = processes.gather(fingerprint(module.state_dict()))
    if len(set(prints)) > 1:
        raise RuntimeError(
            f"the processes must start from the same weights of {type(module).__name__}, got the "
            f"fingerprints {', '.join(sorted(set(prints)))}; install the same packages on all machines"
        )
    if loop.parallel == "fsdp" and not small:
        return _into_shards(module)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # 2.9 knows no other
        return DistributedDataParallel(
            module,
            broadcast_buffers=False,  # ours are constants
            gradient_as_bucket_view=True,
            find_unused_parameters=some_unused,
        )


def unwrap(player: nn.Module) -> nn.Module:
    """The module behind a DDP wrapper, or the player itself: to call without counting towards its update."""
    return player.module if isinstance(player, DistributedDataParallel) else player


def is_sharded(player: nn.Module) -> bool:
    """Whether its weights are cut into shards."""
    return isinstance(player, FSDPModule)


@contextmanager
def sync_gradients(players: Iterable[nn.Module], enabled: bool) -> Iterator[None]:
    """Inside, backward passes average gradients over the processes if `enabled`, else they only add them up.

    All device batches of a step but the last are not due: one reduction a step is enough.
    """
    with ExitStack() as stack:
        for player in players:
            if isinstance(player, FSDPModule):
                player.set_requires_gradient_sync(enabled)
            elif isinstance(player, DistributedDataParallel) and not enabled:
                stack.enter_context(player.no_sync())
        yield


def gather_full(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, sharded ones put together. Every process has to ask, and gets them all."""
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in values.items()
    }


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """This process's shard of a whole tensor, where `like` is sharded; no process sends anything."""
    if not isinstance(like, DTensor) or isinstance(value, DTensor):
        return value
    on_device = value.to(like.device)
    return distribute_tensor(on_device, like.device_mesh, like.placements, src_data_rank=None)


@contextmanager
def lend_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Lend weights to a module that gave its own away in `distribute`."""
    module.load_state_dict(weights, assign=True)
    try:
        yield
    finally:
        _give_away(module)


def _into_shards(module: nn.Module) -> nn.Module:
    frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
    device = next(module.parameters()).device
    shards = copy.deepcopy(module, {id(parameter): parameter for parameter in frozen})
    # Weights are gathered in float32 and autocast rounds them product by product, as it does for one process:
    # gathered in bfloat16 they would be half the traffic, but norms would lose their float32 weights.
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    mesh = init_device_mesh(device.type, (processes.world_size(),))
    # Warns of views among the outputs, which must not be changed in place; nothing here does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for part in [*_repeated_layers(shards), shards]:
        fully_shard(part, mesh=mesh, mp_policy=policy, ignored_params=set(frozen))
    _give_away(module)
    return shards


def _repeated_layers(module: nn.Module) -> list[nn.Module]:
    """The elements of its module lists that are trained, innermost first: what is gathered at one time."""
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    layers = [layer for part in lists for layer in part]
    return [layer for layer in reversed(layers) if any(p.requires_grad for p in layer.parameters())]


def _give_away(module: nn.Module) -> None:
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if parameter.requires_grad:
                setattr(part, name, nn.Parameter(parameter.detach().to("meta")))
