"""Where a step stops being finite: the step is computed again, and everything in it is looked at in order."""

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
    """What was found, in order: forward passes in theirs, gradients in the backward pass's."""

    def __init__(self) -> None:
        self.looks = 0
        self.found: list[tuple[int, str]] = []

    def look(self, value: Any, what: str) -> None:
        """Note a tensor, or a tensor in a list or tuple of them, that is not finite."""
        self.looks += 1
        if isinstance(value, Tensor):
            here = value.to_local() if isinstance(value, DTensor) else value
            if here.is_floating_point() and not here.is_meta and not here.isfinite().all():
                kind = "nan" if here.isnan().any() else "infinite"
                self.found.append((self.looks, f"{what}, {tuple(value.shape)}, has {kind} values"))
        elif isinstance(value, list | tuple):
            for number, item in enumerate(value):
                self.look(item, f"{what}[{number}]" if len(value) > 1 else what)

    def first(self) -> str:
        """The first finding of all processes, which look at the same things in the same order."""
        heads = [found[0] for found in processes.gather(self.found[:1]) if found]
        return (
            f"first seen when computed again: {min(heads)[1]}" if heads else "computed again, all is finite"
        )


@contextmanager
def watched(task: Task, findings: Findings) -> Iterator[None]:
    """Inside, the output of every module of the players is looked at, and in a backward pass its gradient."""
    with ExitStack() as stack:
        for name, module in _modules(task).items():

            def look(
                module: nn.Module, inputs: Any, output: Any, at: str = f"{name} ({type(module).__name__})"
            ) -> None:
                findings.look(output, f"the output of {at}")
                for tensor in output if isinstance(output, list | tuple) else (output,):
                    if isinstance(tensor, Tensor) and tensor.requires_grad:
                        tensor.register_hook(  # type: ignore[no-untyped-call]
                            lambda gradient: findings.look(gradient, f"the gradient at the output of {at}")
                        )

            stack.enter_context(module.register_forward_hook(look))
        yield


def look_at_weights(task: Task, findings: Findings) -> None:
    """Weights and buffers that are not finite before the step begins."""
    for name, player in task.players.items():
        for key, value in unwrap(player).state_dict().items():
            findings.look(value, f"the weight {name}.{key}")


def looked_at(batches: Iterator[Any], findings: Findings) -> Iterator[Any]:
    """The data, each batch looked at before a module sees it."""
    for batch in batches:
        for field, value in batch._asdict().items():
            findings.look(value, f"the batch's {field}")
        yield batch


def look_at_terms(terms: Mapping[str, Tensor], findings: Findings) -> None:
    """The terms of the loss, where every module is sound."""
    for name, value in terms.items():
        findings.look(value, f"the term {name}")


def look_at_gradients(task: Task, findings: Findings) -> None:
    """The gradients of the weights, where those of the activations are sound."""
    for name, player in task.players.items():
        for key, parameter in unwrap(player).named_parameters():
            if parameter.grad is not None:
                findings.look(parameter.grad, f"the gradient of the weight {name}.{key}")


def _modules(task: Task) -> dict[str, nn.Module]:
    """The modules of all players by name; those that the whole model shares with a sharded one count once."""
    named: dict[nn.Module, str] = {}
    for name, player in [*task.players.items(), (next(iter(task.players)), task.model)]:
        for key, module in unwrap(player).named_modules():
            named.setdefault(module, f"{name}.{key}" if key else name)
    return {name: module for module, name in named.items()}
