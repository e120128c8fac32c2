"""The command that measures speed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from openpae.commands.console import Precision, at_least_one

if TYPE_CHECKING:
    from openpae.bench.record import Comparison

What = Literal["generator", "tokenizer"]


def bench(
    what: What,
    /,
    out: Path | None = None,
    compare: Path | None = None,
    sizes: tuple[Literal["s", "b", "l", "xl", "1p0b", "1p6b"], ...] | None = None,
    patch_size: Literal[1, 2] | None = None,
    batch_size: int | None = None,
    sample_steps: int | None = None,
    precision: Precision | None = None,
    compile: bool = False,
    checkpoint_blocks: int | None = None,
) -> None:
    """Measure how fast a part is on this machine, beside another record of it if one is given.

    The options behind `compare` belong to the generator.

    Args:
        what: generator: every size counted, training and sampling measured; tokenizer: a step of the
            quickstart's full objective beside one of L1 + LPIPS.
        out: also write the record (JSON) here.
        compare: a record of the same bench, to stand beside this one with the ratio of each figure.
        sizes: which generators to measure; by default all on a GPU and none on a CPU. All are counted.
        patch_size: latent cells per token and axis; 1 by default.
        batch_size: images per step; by default 256 on a GPU, halved until it fits, and 2 on a CPU.
        sample_steps: Euler steps of the timed samples; 45 by default.
        precision: bf16 by default.
        compile: compile the generator first.
        checkpoint_blocks: blocks whose activations are computed again; none by default.
    """
    from openpae.bench import generator, record, tokenizer
    from openpae.storage.files import write_json
    from openpae.storage.outputs import check_outputs, read_record

    options: dict[str, Any] = {
        "sizes": sizes,
        "patch_size": patch_size,
        "batch_size": batch_size,
        "sample_steps": sample_steps,
        "precision": precision,
        "compile": compile or None,
        "checkpoint_blocks": checkpoint_blocks,
    }
    given = {name: value for name, value in options.items() if value is not None}
    at_least_one(batch_size=batch_size, sample_steps=sample_steps)
    if what != "generator" and given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"{names} belongs to pae bench generator; pae bench {what} has no such option")
    if out is not None:
        check_outputs(out, inputs=[compare], own=[out] if "figures" in read_record(out) else [])
    other = None if compare is None else record.read_record(compare, what)
    found = record.record(
        what, generator.bench_generator(**given) if what == "generator" else tokenizer.bench_tokenizer()
    )
    print(json.dumps(found, indent=1))
    if out is not None:
        write_json(out, found)
    if other is not None:
        _tell(*record.compare(found, other))


def _tell(figures: Sequence[Comparison], different: Sequence[str]) -> None:
    print(f"\n{'figure':44} {'here':>14} {'there':>14} {'ratio':>8}")
    for figure in figures:
        ratio = "-" if figure.ratio is None else f"{figure.ratio:.3f}"
        print(f"{figure.name:44} {figure.ours:14.6g} {figure.theirs:14.6g} {ratio:>8}")
    for line in different:
        print(f"not the same: {line}")
