"""What evaluation measures while a tokenizer is trained: which images, and how many."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from openpae.data.images import PackedImages
from openpae.data.settings import ImageData
from openpae.engine.settings import LoopConfig, OptimConfig
from openpae.models.configs import PAEConfig
from openpae.objective.settings import TokenizerLoss
from openpae.storage import files
from openpae.train.settings import TokenizerRun
from openpae.train.tokenizer import TokenizerTask

pytestmark = [
    pytest.mark.filterwarnings("ignore:eRank of"),
    pytest.mark.filterwarnings("ignore:.*classes hold one image"),
]


def check_picture(task: TokenizerTask) -> None:
    """Eight images, spread over the held-out ones, stand above their reconstructions."""
    assert task.held_out is not None
    with torch.no_grad():
        shown = np.asarray(task.picture())
        assert shown.shape == (32 + 2 + 32, 8 * (32 + 2) - 2, 3)
        count = min(task.run.data.evaluation_images, len(task.held_out))
        for column, row in enumerate(np.round(np.linspace(0, len(task.held_out) - 1, min(8, count)))):
            image = torch.as_tensor(np.asarray(task.held_out.read(int(row))).copy())
            pixels = image.permute(2, 0, 1)[None] / 255
            decoded = (task.model.decode(task.model.encode(pixels)).clamp(0, 1) * 255).round()[0]
            part = shown[:, column * 34 : column * 34 + 32].astype(int)
            assert np.array_equal(part[:32], image.numpy())
            assert np.abs(part[34:] - decoded.permute(1, 2, 0).numpy()).max() <= 1  # another batch size


@pytest.mark.parametrize(("wanted", "taken", "moved"), [(15, 15, 2), (10, 10, 1), (11, 11, 2), (500, 17, 2)])
def test_lpc_takes_a_tenth_of_the_held_out_images_rounded_up(
    tiny_config: PAEConfig, packed: PackedImages, tmp_path: Path, wanted: int, taken: int, moved: int
) -> None:
    """Each costs nine decodes."""
    draws = np.random.default_rng(0)
    for number in range(17):
        folder = tmp_path / packed.classes[number % 2]  # the classes of the training images
        folder.mkdir(exist_ok=True)
        pixels = draws.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    data = ImageData(
        images=packed.shards.folder, evaluation=tmp_path, evaluation_images=wanted, augment="none"
    )
    loss = TokenizerLoss(lpips_net="random", gan=0.0, ssr=0.0, mcr=0.0, scr=0.0)
    task = TokenizerTask(
        TokenizerRun(
            model=tiny_config, data=data, loss=loss, geometry=True, optim=OptimConfig(lr=1e-3),
            loop=LoopConfig(steps=1, global_batch_size=4, precision="fp32", device="cpu"),
        )
    )  # fmt: skip
    task.run_dir = tmp_path / "run"
    task.model.eval()
    with torch.no_grad():
        task.evaluate(1)
    check_picture(task)
    metrics = files.read_json(task.run_dir / "evaluations" / "step-00000001.json")["metrics"]
    assert metrics["lpc"]["n"] == moved
    assert metrics["gsq"]["n"] == metrics["psnr"]["n"] == taken
