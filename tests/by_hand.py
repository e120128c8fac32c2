"""Reference computations for tests, without the package:, in float64 and from the formulas alone.

In float64, rounding is a billion times smaller than any defect, on every processor and with any number of
threads. Adam's epsilon, 1e-8, is then far above the rounding of a gradient that is truly 0.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor

EPSILON = 1e-8
"""Of AdamW, PyTorch's default."""
STEPS, BATCH, EMA = 3, 6, 0.6
OPTIM: dict[str, Any] = {
    "lr": 2e-3, "final_lr": 5e-4, "warmup_steps": 1, "betas": (0.7, 0.8), "weight_decay": 0.3
}  # fmt: skip
LOOP: dict[str, Any] = {
    "steps": STEPS, "global_batch_size": BATCH, "precision": "fp32", "device": "cpu", "ema_decay": EMA,
    "log_every": 1,
}  # fmt: skip
"""Of three steps: no setting is at its default."""


@contextmanager
def double_precision() -> Iterator[None]:
    """Inside, torch computes in float64 where the package says float32, the compiler's tensors included."""
    before = torch.get_default_dtype(), torch.Tensor.float, FunctionalTensor.float
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    FunctionalTensor.float = FunctionalTensor.double  # type: ignore[method-assign]
    try:
        yield
    finally:
        dtype, torch.Tensor.float, FunctionalTensor.float = before  # type: ignore[method-assign]
        torch.set_default_dtype(dtype)


def generator(seed: int, step: int, name: str) -> torch.Generator:
    """The definition of a draw: it is named by seed, step and name, and drawn for the global batch."""
    digest = hashlib.blake2b(f"{seed}/{step}/{name}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


class Drawn:
    """The random numbers of some rows of a global batch of `count` samples."""

    def __init__(self, seed: int, step: int, count: int, rows: slice) -> None:
        self.seed, self.step, self.count, self.rows = seed, step, count, rows

    def normal(self, name: str, *shape: int) -> Tensor:
        return torch.randn(self.count, *shape, generator=generator(self.seed, self.step, name))[self.rows]

    def uniform(self, name: str, *shape: int) -> Tensor:
        return torch.rand(self.count, *shape, generator=generator(self.seed, self.step, name))[self.rows]


def order(seed: int, step: int, batch: int, rows: int) -> tuple[list[int], list[int]]:
    """The rows that a step sees, and for each the 64 random bits of its position in training.

    An epoch is NumPy's permutation by Philox of key (seed, epoch); the bits are two rounds of splitmix64.
    """
    seen, bits = [], []
    for position in range(step * batch, (step + 1) * batch):
        epoch, offset = divmod(position, rows)
        permutation = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(rows)
        seen.append(int(permutation[offset]))
        x = position + seed * 0x9E3779B97F4A7C15
        for _ in range(2):
            x = (x + 0x9E3779B97F4A7C15) % 2**64
            x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
            x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
            x ^= x >> 31
        bits.append(x)
    return seen, bits


def learning_rate(step: int) -> float:
    """Linear from lr / warm-up, then half a cosine to final_lr at the last step."""
    if step < OPTIM["warmup_steps"]:
        return float(OPTIM["lr"] * (step + 1) / OPTIM["warmup_steps"])
    angle = math.pi * (step - OPTIM["warmup_steps"]) / (STEPS - 1 - OPTIM["warmup_steps"])
    return float(OPTIM["final_lr"] + (OPTIM["lr"] - OPTIM["final_lr"]) * (1 + math.cos(angle)) / 2)


def averaged(average: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The moving average after one more step."""
    return {name: EMA * average[name] + (1 - EMA) * w.detach() for name, w in weights.items()}


class AdamWByHand:
    """AdamW (arXiv:1711.05101) with a limit on the norm of the gradient, written out."""

    def __init__(self, weights: Sequence[Tensor], clip: float) -> None:
        self.weights, self.clip = list(weights), clip
        self.m = [torch.zeros_like(w) for w in self.weights]
        self.v = [torch.zeros_like(w) for w in self.weights]
        self.count = 0

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], lr: float) -> float:
        """One step; returns the norm of the gradient before it was cut."""
        self.count += 1
        norm = math.sqrt(sum(float((g * g).sum()) for g in gradients))
        scale = min(1.0, self.clip / (norm + 1e-6))
        b1, b2 = OPTIM["betas"]
        for w, g, m, v in zip(self.weights, gradients, self.m, self.v, strict=True):
            g = g * scale
            m.copy_(b1 * m + (1 - b1) * g)
            v.copy_(b2 * v + (1 - b2) * g * g)
            first, second = m / (1 - b1**self.count), v / (1 - b2**self.count)
            w.copy_(w * (1 - lr * OPTIM["weight_decay"]) - lr * first / (second.sqrt() + EPSILON))
        return norm


def gradients_of(loss: Tensor, weights: Sequence[Tensor], parts: int) -> list[Tensor]:
    """Of one of the device batches of a step; zeros where the loss does not reach a weight."""
    gradients = torch.autograd.grad(loss / parts, list(weights), allow_unused=True, retain_graph=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, gradients, strict=True)]


def trained(module: torch.nn.Module) -> dict[str, Tensor]:
    """The weights that require a gradient, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def snapshot(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy without gradient."""
    return {name: w.detach().clone() for name, w in weights.items()}


def assert_equal(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Equal but for the rounding of float64, which a few steps of AdamW make some thousand times larger."""
    for name, value in expected.items():
        torch.testing.assert_close(actual[name].detach(), value, rtol=1e-9, atol=1e-10, msg=name)


def stored_images(folder: Path) -> Tensor:
    """All images of a packed folder, uint8, read without the package."""
    shards = sorted(file for file in folder.glob("*.npy") if file.stem.isdigit())
    return torch.from_numpy(np.concatenate([np.load(file) for file in shards]))


def gram(tokens: Tensor) -> Tensor:
    """Cosines of all pairs of tokens (B, N, C)."""
    unit = tokens / tokens.norm(dim=-1, keepdim=True)
    return unit @ unit.mT


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Of vectors in the last dimension."""
    return (a * b).sum(dim=-1) / (a.norm(dim=-1) * b.norm(dim=-1))
