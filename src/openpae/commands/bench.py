"""`pae bench`: measure speed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from openpae.commands.console import Precision, at_least_one
from openpae.runtime.terminal import say

if TYPE_CHECKING:
    from openpae.bench.record import Comparison

Part = Literal["generator", "tokenizer"]


def bench(
    part: Part,
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
    overwrite: bool = False,
) -> Mapping[str, Any]:
    """Measure the speed of the generator or the tokenizer on this machine; optionally compare two records.

    Args:
        part: generator (each size: cost, speed of training and sampling), or tokenizer (a training step of
            the quickstart with the full objective, and with L1 + LPIPS alone).
        out: file for the record (JSON).
        compare: record of the same part to compare with; prints the ratio of each figure.
        sizes: generators to measure; by default all on a GPU and none on a CPU. The options from here to
            checkpoint_blocks are for the generator.
        patch_size: latent cells per token and axis; 1 by default.
        batch_size: images per step; by default 256 on a GPU, halved until it fits, and 2 on a CPU.
        sample_steps: Euler steps of the timed samples; 45 by default.
        precision: precision of training and sampling; bf16 by default.
        compile: compile the generator.
        checkpoint_blocks: blocks with activation checkpointing; none by default.
        overwrite: replace a file OUT that this command did not make.
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
    if part != "generator" and given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"{names} belongs to pae bench generator; pae bench {part} has no such option")
    if out is not None:
        known = [out] if "figures" in read_record(out) else []
        check_outputs(out, inputs=[compare], own=known, overwrite=overwrite)
    other = None if compare is None else record.read_record(compare, part)
    measured = generator.bench_generator(**given) if part == "generator" else tokenizer.bench_tokenizer()
    own = record.record(part, measured)
    for line in json.dumps(own, indent=1).splitlines():
        say(line)
    if out is not None:
        write_json(out, own)
    return own if other is None else own | _compared(*record.compare(own, other))


def _compared(figures: Sequence[Comparison], different: Sequence[str]) -> dict[str, Any]:
    """Print the comparison, and return it."""
    say()
    say(f"{'figure':44} {'this':>14} {'other':>14} {'ratio':>8}")
    for figure in figures:
        ratio = "-" if figure.ratio is None else f"{figure.ratio:.3f}"
        say(f"{figure.name:44} {figure.value:14.6g} {figure.other:14.6g} {ratio:>8}")
    for line in different:
        say(f"different: {line}")
    return {"comparison": [dataclasses.asdict(one) for one in figures], "different": list(different)}
