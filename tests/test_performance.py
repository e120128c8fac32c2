"""The page on memory and time says what the models say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_performance", ROOT / "tools" / "make_performance.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_page_is_up_to_date(script: ModuleType) -> None:
    assert (ROOT / "docs" / "performance.md").read_text(encoding="utf-8") == script.page(plans=True)


def test_products_of_the_largest_preset_by_hand(script: ModuleType) -> None:
    dim, tokens, hidden = 1152, 256, 3072
    block = tokens * (8 * dim**2 + 6 * dim * hidden + 4 * tokens * dim) + 12 * dim**2
    ends = tokens * 2 * (32 * dim + dim * 32) + 2 * (256 * dim + dim**2) + 4 * dim**2
    assert script.generator_row("xl")["forward"] == pytest.approx(28 * block + ends, rel=1e-3)


def test_what_xl_keeps_by_hand(script: ModuleType) -> None:
    """Bytes that the backward pass of a block keeps under bf16 autocast.

    float32, width D: x, x / rms and its product with the norm's weight, in both branches.
    bf16, width D: what the qkv layer takes, q, k, 3 D of qkv, attention's output, the projection's output,
    what the MLP takes and gives. bf16, width H: W1 x, W2 x, silu(W1 x), the product.
    """
    dim, tokens, hidden = 1152, 256, 3072
    block = tokens * (4 * 6 * dim + 2 * (10 * dim + 4 * hidden))
    assert script.generator_row("xl")["kept"] == pytest.approx(28 * block, rel=0.02)


def test_the_table_of_presets_has_their_device_batches(script: ModuleType) -> None:
    lines = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8").splitlines()
    rows = dict(line.strip("| ").split(" | ")[:2] for line in lines if line.startswith("| `"))
    presets = script.large_presets()
    assert len(presets) >= 12
    assert rows == {f"`{name}`": str(run.loop.device_batch_size) for name, run in presets.items()}


def test_vgg_products_are_those_of_the_literature(script: ModuleType) -> None:
    """15.3 G multiply-adds at 224 pixels, all 13 convolutions (Simonyan & Zisserman's network D)."""
    assert script.vgg_products(224) == pytest.approx(2 * 15.35e9, rel=0.01)


def test_a_lost_mark_is_told(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "performance.md"
    page.write_text("# nothing\n", encoding="utf-8")
    monkeypatch.setattr(script, "PAGE", page)
    monkeypatch.setattr(script, "tables", lambda _: {"generators": ""})
    with pytest.raises(ValueError, match=r"performance\.md holds no marks <!-- generators -->"):
        script.page()
