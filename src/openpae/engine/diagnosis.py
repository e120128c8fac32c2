"""Find the first tensor of a step that is not finite, by computing the step again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from openpae.engine.parallel import unwrap
from openpae.engine.task import Task
from openpae.runtime import processes


class Findings:
    """Tensors that are not finite, in the order of the forward and the backward pass."""

    def __init__(self) -> None:
        self.checks = 0
        self.nonfinite: list[tuple[int, str]] = []

    def check(self, value: Any, label: str) -> None:
        """Record a tensor that is not finite; lists and tuples are searched."""
        self.checks += 1
        if isinstance(value, Tensor):
            local = value.to_local() if isinstance(value, DTensor) else value
            if local.is_floating_point() and not local.is_meta and not local.isfinite().all():
                kind = "nan" if local.isnan().any() else "infinite"
                self.nonfinite.append((self.checks, f"{label}, {tuple(value.shape)}, has {kind} values"))
        elif isinstance(value, list | tuple):
            for number, item in enumerate(value):
                self.check(item, f"{label}[{number}]" if len(value) > 1 else label)

    def check_all(self, values: Mapping[str, Any], label: str) -> None:
        """Record the named tensors that are not finite."""
        for name, value in values.items():
            self.check(value, f"{label} {name}")

    def first(self) -> str:
        """The first finding over all ranks, which check the same tensors in the same order."""
        heads = [own[0] for own in processes.gather(self.nonfinite[:1]) if own]
        return (
            f"first seen when computed again: {min(heads)[1]}" if heads else "computed again, all is finite"
        )


@contextmanager
def watched(task: Task, findings: Findings) -> Iterator[None]:
    """Inside, hooks check the output of every module of the players, and its gradient."""
    with ExitStack() as stack:
        for name, module in _modules(task).items():

            def hook(
                module: nn.Module, inputs: Any, output: Any, at: str = f"{name} ({type(module).__name__})"
            ) -> None:
                findings.check(output, f"the output of {at}")
                for tensor in output if isinstance(output, list | tuple) else (output,):
                    if isinstance(tensor, Tensor) and tensor.requires_grad:
                        tensor.register_hook(  # type: ignore[no-untyped-call]
                            lambda gradient: findings.check(gradient, f"the gradient at the output of {at}")
                        )

            stack.enter_context(module.register_forward_hook(hook))
        yield


def check_weights(task: Task, findings: Findings) -> None:
    """Check weights and buffers before the step."""
    for name, player in task.players.items():
        for key, value in unwrap(player).state_dict().items():
            findings.check(value, f"the weight {name}.{key}")


def check_batches(batches: Iterator[Any], findings: Findings) -> Iterator[Any]:
    """Yield the batches, each one checked."""
    for batch in batches:
        findings.check_all(batch._asdict(), "the batch's")
        yield batch


def check_gradients(task: Task, findings: Findings) -> None:
    """Check the gradients of the weights."""
    for name, player in task.players.items():
        for key, parameter in unwrap(player).named_parameters():
            if parameter.grad is not None:
                findings.check(parameter.grad, f"the gradient of the weight {name}.{key}")


def _modules(task: Task) -> dict[str, nn.Module]:
    """The modules of all players by name. A module shared by a sharded player and the model counts once."""
    named: dict[nn.Module, str] = {}
    for name, player in [*task.players.items(), (next(iter(task.players)), task.model)]:
        for key, module in unwrap(player).named_modules():
            named.setdefault(module, f"{name}.{key}" if key else name)
    return {name: module for module, name in named.items()}
