"""The table of encoders and its page in the docs."""

from __future__ import annotations

from pathlib import Path

from openpae.models.vfms import ENCODERS


def test_the_page_of_encoders_matches_the_table() -> None:
    """docs/encoders.md: every row with its facts."""
    lines = (Path(__file__).parents[2] / "docs" / "encoders.md").read_text(encoding="utf-8").splitlines()
    documented = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")
    ]
    expected = [
        [
            f"`{name}`",
            f"`{spec.repo}`" if spec.repo else "-",
            *(str(number) for number in (16 * spec.stride, spec.stride // spec.merge)),
            *(str(number) for number in (spec.dim, spec.num_heads, spec.num_prefix_tokens)),
        ]
        for name, spec in ENCODERS.items()
    ]
    assert [row[:7] for row in documented] == expected
    assert all(row[7] for row in documented)  # its licence
