"""Seeded random numbers: functions of (seed, step, name), or of (seed, sample index). Nothing is saved."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Draws:
    """Random numbers of one device batch: a pure function of (seed, step, name, rows).

    They are drawn for the global batch and sliced. Device batch size and number of devices therefore do not
    change the numbers of a sample, and a resumed run needs no generator state.

    Args:
        seed: seed of the run.
        step: the step of the data order. It differs from the optimizer step after a rollback.
        rows: rows of the global batch in this device batch.
        global_batch_size: images of one step on all ranks.
        device: device on which the numbers are drawn.
    """

    def __init__(
        self, seed: int, step: int, rows: range, global_batch_size: int, device: torch.device
    ) -> None:
        self.seed, self.step, self.rows = seed, step, rows
        self.global_batch_size, self.device = global_batch_size, device

    def normal(self, name: str, *shape: int) -> Tensor:
        """Standard normal, (B, *shape)."""
        return self._draw(torch.randn, name, shape)

    def uniform(self, name: str, *shape: int) -> Tensor:
        """Uniform in [0, 1), (B, *shape)."""
        return self._draw(torch.rand, name, shape)

    def integers(self, name: str, below: int, count: int) -> list[int]:
        """`count` integers in [0, below), equal for all rows of the step."""
        # From the hash: reading numbers from a GPU would make the step wait.
        return [_seed(self.seed, self.step, name, i) % below for i in range(count)]

    def _draw(self, draw: Callable[..., Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(_seed(self.seed, self.step, name))
        numbers = draw(self.global_batch_size, *shape, generator=generator, device=self.device)
        return numbers[self.rows.start : self.rows.stop : self.rows.step]


class SampleNoise:
    """Standard normal draws for a batch of samples, each from its own generator.

    The draws of a sample depend only on (seed, index), to the bit, as the CPU draws all of them. A GPU does
    not wait: the host draws while the GPU computes.

    Args:
        seed: seed of the samples.
        indices: index of each sample, (B,).
        shape: shape of one draw, (C, h, w).
        device: device of the results.
    """

    def __init__(
        self,
        seed: int,
        indices: Sequence[int],
        shape: tuple[int, int, int],
        device: torch.device | str = "cpu",
    ) -> None:
        self.shape, self.device = shape, torch.device(device)
        self.generators = [torch.Generator().manual_seed(_seed(seed, index)) for index in indices]

    def draw(self) -> Tensor:
        """The next draws, (B, C, h, w), float32: first the initial noise, then one per step of the SDE."""
        noise = torch.empty(len(self.generators), *self.shape)
        for row, generator in zip(noise, self.generators, strict=True):
            row.normal_(generator=generator)
        return _moved(noise, self.device)


def initial_noise(seed: int, indices: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
    """First draws of `SampleNoise` for these indices, (B, C, h, w), float32, CPU."""
    return SampleNoise(seed, indices, shape).draw()


def _moved(x: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to a device without waiting."""
    if device.type != "cuda":
        return x.to(device)
    # PyTorch keeps the pinned memory until the copy has finished.
    return x.pin_memory().to(device, non_blocking=True)


def _seed(*parts: int | str) -> int:
    """A 56-bit hash of parts in order: (0, 1) and (1, 0) differ."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
