"""Count memory and operations under fake tensors: bytes by kind, their peak, and the module at the peak."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

Kind = Literal["weights", "gradients", "optimizer", "average", "activations", "temporary"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Memory at the moment of the highest total."""

    bytes: Mapping[Kind, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    """Bytes by kind."""
    at: str = ""
    """The running module, and the pass."""

    @property
    def total(self) -> int:
        """Bytes of all kinds."""
        return sum(self.bytes.values())


@dataclass
class _Block:
    """The memory behind one or more tensors."""

    storage: weakref.ref[Any]
    size: int
    kind: Kind


class Tracker(TorchDispatchMode):
    """Count the memory of each living tensor of a fake mode, and operations.

    Tensors made while gradients are recorded are activations, also in recomputed blocks. Others are
    temporary. `mark` and `making` set the other kinds.

    Args:
        mode: the fake mode; tensors of other modes do not count.
        round_to: bytes of the allocator's smallest block; 512 on a GPU.
    """

    def __init__(self, mode: FakeTensorMode, round_to: int = 512) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.mode, self.round_to = mode, round_to
        self.in_use: dict[Kind, int] = dict.fromkeys(KINDS, 0)
        self.total = 0
        self._blocks: dict[int, _Block] = {}
        self._kind: Kind | None = None
        self._names: dict[int, str] = {}
        self._running: list[str] = []
        self._backward = ""
        self._hooks = ExitStack()
        self.reset()

    def reset(self) -> None:
        """Reset the peak and the operations. Memory in use stays counted."""
        self.peak = Peak(bytes=dict(self.in_use), at="between steps")
        self._highest = self.total
        self.operations: dict[torch.dtype, int] = {}
        """Operations of matrix products and convolutions, by dtype."""

    def mark(self, kind: Kind, tensors: Iterable[Tensor]) -> None:
        """Set the kind of tensors."""
        for tensor in tensors:
            part = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
            self._follow(part)
            if (block := self._blocks.get(part.untyped_storage()._cdata)) is not None:
                self.in_use[block.kind] -= block.size
                self.in_use[kind] += block.size
                block.kind = kind

    def name(self, prefix: str, module: nn.Module) -> None:
        """Name a module and its submodules for `Peak.at`."""
        for name, part in module.named_modules():
            self._names.setdefault(id(part), f"{prefix}.{name}" if name else prefix)

    @contextmanager
    def making(self, kind: Kind) -> Iterator[None]:
        """Enter a context where new tensors have this kind."""
        before, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._kind = before

    def __enter__(self) -> Self:
        for handle in (
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),
            register_optimizer_step_pre_hook(self._enter_optimizer),
            register_optimizer_step_post_hook(self._leave_optimizer),
        ):
            self._hooks.callback(handle.remove)
        # FSDP empties and fills storages past the dispatcher.
        plain = torch.UntypedStorage.resize_
        torch.UntypedStorage.resize_ = partial_method(self._resized, plain)  # type: ignore[method-assign]
        self._hooks.callback(setattr, torch.UntypedStorage, "resize_", plain)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)  # type: ignore[no-untyped-call]
        self._hooks.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # its parts come here one by one
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        for part in out if isinstance(out, tuple | list) else (out,):
            if isinstance(part, Tensor):
                self._follow(part)
        if (count := _OPERATIONS.get(func.overloadpacket)) is not None:
            dtype = args[0].dtype
            done = count(*args, **kwargs, out_val=out)
            self.operations[dtype] = self.operations.get(dtype, 0) + done
        return out

    def _follow(self, tensor: Tensor) -> None:
        if not isinstance(tensor, FakeTensor) or tensor.fake_mode is not self.mode or tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._blocks:
            kind = self._kind or ("activations" if torch.is_grad_enabled() else "temporary")
            self._blocks[key] = _Block(weakref.ref(storage, lambda _: self._forget(key)), 0, kind)
            self._resize(key, storage.nbytes())

    def _resize(self, key: int, size: int) -> None:
        block = self._blocks[key]
        size = math.ceil(size / self.round_to) * self.round_to
        self.in_use[block.kind] += size - block.size
        self.total += size - block.size
        block.size = size
        if self.total > self._highest:
            self._highest = self.total
            self.peak = Peak(bytes=dict(self.in_use), at=self._at())

    def _forget(self, key: int) -> None:
        self._resize(key, 0)
        del self._blocks[key]

    def _resized(self, plain: Callable[..., Any], storage: torch.UntypedStorage, size: int) -> Any:
        out = plain(storage, size)
        if storage._cdata in self._blocks:
            self._resize(storage._cdata, storage.nbytes())
        return out

    def _at(self) -> str:
        if self._kind is not None:
            return self._kind
        in_backward = torch._C._current_graph_task_id() >= 0
        if self._running:
            return f"{self._running[-1]}, {'recomputed' if in_backward else 'forward'}"
        return f"{self._backward}, backward" if in_backward else "between modules"

    def _enter_module(self, module: nn.Module, _: Any) -> None:
        if (name := self._names.get(id(module))) is not None:
            self._running.append(name)

    def _leave_module(self, module: nn.Module, _: Any, out: Any) -> None:
        if id(module) in self._names:
            name = self._running.pop()
            for part in out if isinstance(out, tuple | list) else (out,):
                if isinstance(part, Tensor) and part.requires_grad:
                    hook = partial(self._enter_backward, name)
                    part.register_hook(hook)  # type: ignore[no-untyped-call]

    def _enter_backward(self, name: str, _: Tensor) -> None:
        self._backward = name

    def _enter_optimizer(self, optimizer: Any, *_: Any) -> None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        self.mark("gradients", [weight.grad for weight in weights if weight.grad is not None])
        self._kind = "optimizer"

    def _leave_optimizer(self, *_: Any) -> None:
        self._kind = None


def _attention_operations(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    count: Any = sdpa_flop_count
    return int(count(query.shape, key.shape, value.shape))


def _attention_backward_operations(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    # As in PyTorch: the scores are recomputed; dq, dk, dv and ds take one product each.
    return _attention_operations(query, key, value) * 5 // 2


_OPERATIONS: dict[Any, Any] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_operations,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_operations,
}


def partial_method(method: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls `method(plain, instance, ...)` when a class binds it."""

    def bound(instance: Any, *args: Any, **kwargs: Any) -> Any:
        return method(plain, instance, *args, **kwargs)

    return bound
