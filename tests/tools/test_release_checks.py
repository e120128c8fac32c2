"""The release's own checks: moved decodes, copies, labelled pictures."""

from __future__ import annotations

import torch

from openpae.eval.extractors import load_extractor
from openpae.models.lpips import LPIPS
from openpae.models.tokenizer import PAE
from tools import release_checks as checks


def test_the_first_decode_is_the_reconstruction_and_larger_angles_lead_farther(tiny_pae: PAE) -> None:
    x = torch.rand(4, 3, 32, 32)
    still, medium, large = checks.decodes(tiny_pae, x)
    torch.testing.assert_close(still, tiny_pae.reconstruct(x))
    assert 0 < (medium - still).abs().mean() < (large - still).abs().mean()
    assert torch.equal(checks.decodes(tiny_pae, x)[1], medium)


def test_a_tokenizer_that_ignores_moves_finds_every_emoji(tiny_pae: PAE) -> None:
    """With a decoder that always shows the images themselves, all distances are 0 and all hits 1."""
    extractor, x = load_extractor("random"), torch.rand(6, 3, 32, 32)
    gallery = checks.Gallery(extractor.features(x).pooled, torch.arange(6), torch.arange(6) // 2)
    tiny_pae.decode = lambda z: x  # type: ignore[method-assign]
    found = checks.walk_metrics(tiny_pae, x, torch.arange(6), gallery, extractor, LPIPS("alex"))
    for name in ("m", "l"):
        assert torch.equal(found[f"lpips_{name}"], torch.zeros(6))
        assert torch.equal(found[f"same_emoji_{name}"], torch.ones(6))
        assert torch.equal(found[f"same_category_{name}"], torch.ones(6))
    tiny_pae.decode = lambda z: x.roll(1, dims=0)  # type: ignore[method-assign]
    found = checks.walk_metrics(tiny_pae, x, torch.arange(6), gallery, extractor, LPIPS("alex"))
    assert torch.equal(found["same_emoji_m"], torch.zeros(6))
    assert torch.equal(found["same_category_m"], torch.tensor([0.0, 1.0] * 3))


def test_copies_are_seen_and_pictures_of_one_distribution_are_none() -> None:
    """Exact copies count all; samples distributed as the held-out pictures count one in twenty."""
    known, held_out, samples = torch.randn(3, 1000, 8)
    of_held_out = checks.copy_distances(held_out, known)
    copied = checks.copy_metrics(checks.copy_distances(known[:100] * 3, known), of_held_out)["copies"]
    assert copied.mean() == 1
    alike = checks.copy_metrics(checks.copy_distances(samples, known), of_held_out)["copies"]
    assert abs(float(alike.mean()) - 0.05) < 0.04  # four standard errors of both sides
    assert checks.copy_picture(of_held_out, of_held_out).axes[0].get_legend() is not None


def test_rows_stand_beside_their_names(tiny_pae: PAE) -> None:
    x = torch.rand(3, 3, 32, 32)
    sheet = checks.comparison(x, {"with": tiny_pae, "without": tiny_pae})
    assert sheet.size == (190 + 3 * 34 - 2, 7 * 34 - 2)
    darkest = sheet.crop((0, 0, 190, sheet.height)).convert("L").getextrema()[0]
    assert darkest < 128
