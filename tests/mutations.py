"""Plant defects in a copy of the package and see that the tests find each: python tests/mutations.py

Not collected by pytest. It writes the list and the tests that failed into docs/testing.md.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "testing.md"
BEGIN, END = "<!-- mutations -->\n", "<!-- end of mutations -->\n"


@dataclass(frozen=True, kw_only=True)
class Defect:
    """A change that makes the package wrong in a way that other code has been wrong."""

    what: str
    """In words."""
    file: str
    """Below src/openpae."""
    old: str
    """What stands there, at least once."""
    new: str
    """What takes its place, everywhere."""
    tests: str
    """Arguments for pytest: where it should be found."""


DEFECTS = (
    Defect(
        what="the optimizer is not restored",
        file="engine/checkpoints.py",
        old='optimizer.load_state_dict({**held, "state": sharded})',
        new='optimizer.load_state_dict({**held, "state": {}})',
        tests="tests/engine -k resumed",
    ),
    Defect(
        what="the average of the weights (EMA) is not restored",
        file="engine/checkpoints.py",
        old='_copy(state.ema.average, content["ema"], "ema")',
        new="pass",
        tests="tests/engine -k resumed",
    ),
    Defect(
        what="random numbers come from a state that a checkpoint does not restore",
        file="runtime/draws.py",
        old=", generator=self._generator(name)",
        new="",
        tests="tests/engine tests/runtime -k 'resumed or cut'",
    ),
    Defect(
        what="the data order is off by one: each step sees the last image of the step before",
        file="data/order.py",
        old="step * self.global_batch_size + row for row",
        new="step * (self.global_batch_size - 1) + row for row",
        tests="tests/data/test_order.py",
    ),
    Defect(
        what="a resumed run begins its data one step late",
        file="engine/loop.py",
        old="batches = self.batches(data_steps)",
        new="batches = self.batches([s + (start > 0) for s in data_steps])",
        tests="tests/engine -k resumed",
    ),
    Defect(
        what="gradients are reduced twice",
        file="engine/loop.py",
        old="        limit = math.inf if",
        new="        for weight in weights if torch.distributed.is_initialized() else []:\n"
        "            torch.distributed.all_reduce(weight.grad)\n"
        "        limit = math.inf if",
        tests="tests/engine -k 'two_processes_train or reduced_once'",
    ),
    Defect(
        what="the discriminator stays outside of DDP",
        file="train/tokenizer.py",
        old="distribute(self.discriminator, run.loop, small=True)",
        new="self.discriminator",
        tests="tests/engine -k two_processes_train",
    ),
    Defect(
        what="a checkpoint is written in its place",
        file="storage/files.py",
        old="    partial.mkdir()\n    try:\n",
        new="    path.mkdir(exist_ok=True)\n    yield path\n    return\n    partial.mkdir()\n    try:\n",
        tests="tests/storage tests/engine tests/faults/test_kills.py "
        "-k 'folder or killed or training_a_generator'",
    ),
    Defect(
        what="the checksum of a checkpoint is not checked",
        file="engine/checkpoints.py",
        old="if file_hash(folder / name) != digest:",
        new="if False:",
        tests="tests/engine tests/faults/test_cases.py -k 'damaged'",
    ),
    Defect(
        what="the checksum of a shard is not checked",
        file="data/shards.py",
        old='if file_hash(self.folder / f"{number:05d}.npy") != expected:',
        new="if False:",
        tests="tests/data/test_shards.py -k bit",
    ),
    Defect(
        what="the largest checkpoint is taken for the newest",
        file="storage/model_folder.py",
        old="return sorted(int(match[1]) for match in found if match)",
        new="steps = [int(match[1]) for match in found if match]\n"
        '    files = {s: checkpoint_path(run_dir, s).rglob("*") for s in steps}\n'
        "    sizes = {s: sum(file.stat().st_size for file in files[s]) for s in steps}\n"
        "    return sorted(steps, key=sizes.__getitem__)",
        tests="tests/engine tests/storage -k newest",
    ),
    Defect(
        what="the null branch is computed and thrown away outside of the guidance interval",
        file="sampling/guidance.py",
        old="        if not guides_at(t):\n            return model(x, here, labels)\n",
        new="        if not guides_at(t):\n"
        "            return model(torch.cat([x, x]), torch.cat([here, here]), twice).chunk(2)[0]\n",
        tests="tests/sampling -k 'null or evaluations or fifth'",
    ),
)


def failing(defect: Defect) -> list[str]:
    """The tests that fail where the defect is, of those that should."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("src", "tests", "docs", "tools", "configs"):
            shutil.copytree(ROOT / name, copy / name, symlinks=True)
        shutil.copy(ROOT / "pyproject.toml", copy)
        file = copy / "src" / "openpae" / defect.file
        text = file.read_text(encoding="utf-8")
        if defect.old not in text:
            raise ValueError(f"{defect.file} does not hold {defect.old!r}; bring the defect up to date")
        file.write_text(text.replace(defect.old, defect.new), encoding="utf-8")
        command = f"{sys.executable} -m pytest -W error -q --tb=no -rfE -p no:cacheprovider {defect.tests}"
        environment = os.environ | {"PYTHONPATH": str(copy / "src"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, shell=True, cwd=copy, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest itself failed on {defect.what!r}:\n{done.stdout}\n{done.stderr}")
    return re.findall(r"^(?:FAILED|ERROR) tests/(\S+)", done.stdout, re.M)


def table(found: dict[str, list[str]]) -> str:
    """What was planted and what failed, as Markdown."""
    rows = ["| defect | tests that fail |", "|---|---|"]
    for what, tests in found.items():
        names = sorted({re.sub(r"\[.*", "", test) for test in tests})
        shown = ", ".join(f"`{name}`" for name in names[:3])
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        rows.append(f"| {what} | {len(tests)}: {shown}{more} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    """Run all defects, or those whose words are given; write the page if all were run and found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="only defects that are described with one of these")
    words = parser.parse_args().words
    chosen = [defect for defect in DEFECTS if not words or any(word in defect.what for word in words)]
    found: dict[str, list[str]] = {}
    for defect in chosen:
        found[defect.what] = failing(defect)
        print(f"{len(found[defect.what]):3} tests fail: {defect.what}", flush=True)
    if missed := [what for what, tests in found.items() if not tests]:
        sys.exit(f"no test finds: {'; '.join(missed)}")
    if chosen == list(DEFECTS):
        text = PAGE.read_text(encoding="utf-8")
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        PAGE.write_text(before + BEGIN + table(found) + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
