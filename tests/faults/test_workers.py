"""A process that reads data and dies, out of memory for one, names the file it was at."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from PIL import Image

from openpae.data.images import ImageFolder
from openpae.data.order import StepBatches
from openpae.data.training import TrainingImages, image_batches


class Deadly(ImageFolder):
    """A folder with an image that kills whoever reads it, as one that fills the memory does."""

    how = "SIGKILL"

    def read(self, index: int) -> Image.Image:
        if self.name(index) == "discs/7.png":
            if self.how == "exit":
                os._exit(3)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(index)


@pytest.mark.parametrize("how", ["SIGKILL", pytest.param("exit", marks=pytest.mark.slow)])
def test_a_reader_that_dies_names_the_file_it_was_at(image_folder: Path, how: str) -> None:
    """The error comes with the next batch, not in the middle of saving."""
    source, handler = Deadly(image_folder), signal.getsignal(signal.SIGCHLD)
    source.how = how
    batches = image_batches(
        TrainingImages(source, size=8, seed=0), StepBatches(range(10), 5, [range(5)]), 2, pin=False
    )
    handlers = []
    with pytest.raises(ChildProcessError, match=r"images died at discs/7.png; remove the file if it dies"):
        handlers += [signal.getsignal(signal.SIGCHLD) for _ in batches]
    assert set(handlers) <= {handler}


def test_other_errors_of_the_loop_are_left_alone(image_folder: Path) -> None:
    source = Deadly(image_folder)
    images = TrainingImages(source, size=8, seed=0)
    images.source.read = None  # type: ignore[method-assign, assignment]
    with pytest.raises(TypeError, match="not callable"):
        next(image_batches(images, StepBatches(range(1), 5, [range(5)]), 0, pin=False))
