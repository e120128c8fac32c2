"""Models in half precision: which weights are rounded, and which parts stay in float32."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, Self, TypeVar

import torch
from torch import Tensor, nn

P = ParamSpec("P")
R = TypeVar("R")
M = TypeVar("M", bound="MixedPrecision")

HALF = (torch.bfloat16, torch.float16)
"""The types of half precision."""


class MixedPrecision(nn.Module):
    """A model that `.to(torch.bfloat16)`, `.bfloat16()` and `.half()` bring to half precision.

    Only the weights of linear layers are stored in half precision. The model computes under autocast, which
    also rounds the weights of convolutions, as training with `precision: bf16` does. So these stay in
    float32: norms and their weights, fixed and rotary positions, features of path positions, embeddings of
    classes, the residual stream, statistics of latents, the projection to the sphere, latents and images.
    Attention rounds queries, keys and values; its softmax is in float32. `.float()` keeps the rounded values,
    in float32.

    The outputs are those of float32 weights under autocast. From those of float32 they differ by at most
    about sqrt(n) u in relative root mean square: u is 2^-8 for bfloat16 and 2^-11 for float16, and n counts
    the roundings on the way, three for each linear layer and convolution.
    """

    half_dtype: torch.dtype | None = None
    """The type of the rounded weights; None in float32."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        rounded = {id(weight) for weight in self._rounded()}
        types: set[torch.dtype] = set()

        def applied(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            if id(tensor) in rounded:
                types.add(changed.dtype)
            elif changed.dtype in HALF and tensor.dtype not in HALF:
                return tensor.to(changed.device)
            return changed

        super()._apply(applied, recurse)  # type: ignore[no-untyped-call]
        for dtype in types:
            self.half_dtype = dtype if dtype in HALF else None
        return self

    def _rounded(self) -> list[Tensor]:
        """The weights of linear layers, and their gradients."""
        # Not of convolutions: some VFMs bring their rotary positions to the type of the first one.
        layers = [module for module in self.modules() if isinstance(module, nn.Linear)]
        weights = [weight for layer in layers for weight in layer.parameters(recurse=False)]
        return [*weights, *(weight.grad for weight in weights if weight.grad is not None)]


def own_precision(method: Callable[Concatenate[M, P], R]) -> Callable[Concatenate[M, P], R]:
    """Run a method of a model in half precision under autocast; a model in float32 is left alone."""

    @wraps(method)
    def wrapped(self: M, *args: P.args, **kwargs: P.kwargs) -> R:
        if self.half_dtype is None:
            return method(self, *args, **kwargs)
        with torch.autocast(next(self.parameters()).device.type, self.half_dtype):
            return method(self, *args, **kwargs)

    return wrapped  # type: ignore[return-value]  # mypy makes its first argument positional


def in_dtype(model: M, dtype: torch.dtype | None) -> M:
    """Bring a model to `torch_dtype` of `from_pretrained`; None leaves it.

    Raises:
        ValueError: another type than float32, bfloat16 and float16.
    """
    if dtype not in (None, torch.float32, *HALF):
        raise ValueError(f"torch_dtype must be torch.float32, torch.bfloat16 or torch.float16, got {dtype!r}")
    return model if dtype is None else model.to(dtype)
