"""Random numbers without a state: pure functions of a seed, a step, a name and the number of a sample."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


class Draws:
    """The random numbers of one device batch: a pure function of (seed, step, name, rows).

    They are drawn for the global batch and cut, so neither the device batch size nor the number of
    devices changes what a sample gets, and an interrupted run needs no generator state to go on.

    Args:
        seed: of the run.
        step: the optimizer step.
        rows: rows of the global batch that this device batch holds.
        global_batch_size: images of one step, over all processes.
        device: where the numbers are drawn.
    """

    def __init__(
        self, seed: int, step: int, rows: range, global_batch_size: int, device: torch.device
    ) -> None:
        self.seed, self.step, self.rows, self.global_batch_size, self.device = (
            seed,
            step,
            rows,
            global_batch_size,
            device,
        )

    def normal(self, name: str, *shape: int) -> Tensor:
        """Standard normal, (B, *shape)."""
        return self._cut(
            torch.randn(self.global_batch_size, *shape, generator=self._generator(name), device=self.device)
        )

    def uniform(self, name: str, *shape: int) -> Tensor:
        """Uniform in [0, 1), (B, *shape)."""
        return self._cut(
            torch.rand(self.global_batch_size, *shape, generator=self._generator(name), device=self.device)
        )

    def integers(self, name: str, below: int, count: int) -> list[int]:
        """`count` whole numbers in [0, below), the same for all rows of the step."""
        # From the hash itself: to read numbers from a GPU would make the step wait.
        return [self._seed(f"{name}/{i}") % below for i in range(count)]

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self._seed(name))

    def _seed(self, name: str) -> int:
        digest = hashlib.blake2b(f"{self.seed}/{self.step}/{name}".encode(), digest_size=7).digest()
        return int.from_bytes(digest, "big")

    def _cut(self, numbers: Tensor) -> Tensor:
        return numbers[self.rows.start : self.rows.stop : self.rows.step]


class SampleNoise:
    """Standard normal draws for a batch of samples, each from a generator of its own.

    What a sample gets depends on (seed, index) alone, to the bit: not on the batch, the process or the
    device, because all is drawn on the CPU. A GPU does not wait: the host draws while it computes.

    Args:
        seed: another seed, other samples.
        indices: number of each sample, (B,).
        shape: of one draw, (C, h, w).
        device: where the draws are needed.
    """

    def __init__(
        self,
        seed: int,
        indices: Sequence[int],
        shape: tuple[int, int, int],
        device: torch.device | str = "cpu",
    ) -> None:
        self.shape, self.device = shape, torch.device(device)
        self.generators = [torch.Generator().manual_seed(_mix(seed, index)) for index in indices]

    def draw(self) -> Tensor:
        """The next draws, (B, C, h, w), float32: the initial noise first, then one a step of the SDE."""
        noise = torch.empty(len(self.generators), *self.shape)
        for row, generator in zip(noise, self.generators, strict=True):
            row.normal_(generator=generator)
        return _moved(noise, self.device)


def initial_noise(seed: int, indices: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
    """Initial noise of the samples with these indices, (B, C, h, w), float32, CPU; see `SampleNoise`."""
    return SampleNoise(seed, indices, shape).draw()


def _moved(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, without waiting for the copy."""
    if device.type != "cuda":
        return x.to(device)
    # PyTorch keeps the pinned memory until the copy is done.
    return x.pin_memory().to(device, non_blocking=True)


def _mix(seed: int, index: int) -> int:
    """One 56-bit seed of two numbers, so that (0, 1) and (1, 0) differ."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=7).digest(), "big")
