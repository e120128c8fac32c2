"""Random draws depend on seed, step and name, and not on how a batch is split."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from openpae.runtime.draws import Draws


@given(
    whole=st.integers(1, 12),
    data=st.data(),
    seed=st.integers(0, 2**40),
    step=st.integers(0, 10**7),
)
def test_draws_do_not_depend_on_how_the_batch_is_cut(
    whole: int, data: st.DataObject, seed: int, step: int
) -> None:
    part = data.draw(st.sampled_from([n for n in range(1, whole + 1) if whole % n == 0]))
    device = torch.device("cpu")
    every = Draws(seed, step, range(whole), whole, device)
    cuts = [Draws(seed, step, range(i, i + part), whole, device) for i in range(0, whole, part)]
    for name, shape in (("a", (2, 3)), ("b", ())):
        assert torch.equal(torch.cat([cut.normal(name, *shape) for cut in cuts]), every.normal(name, *shape))
        assert torch.equal(
            torch.cat([cut.uniform(name, *shape) for cut in cuts]), every.uniform(name, *shape)
        )
    assert torch.equal(every.normal("a"), every.normal("a"))


def test_draws_differ_by_seed_step_and_name() -> None:
    drawn = [
        Draws(seed, step, range(100), 100, torch.device("cpu")).normal(name)
        for seed, step, name in (
            (0, 0, "a"),
            (1, 0, "a"),
            (0, 1, "a"),
            (0, 0, "b"),
            (1, 11, "a"),
            (11, 1, "a"),
        )
    ]
    correlation = torch.corrcoef(torch.stack(drawn)) - torch.eye(6)
    assert correlation.abs().max() < 0.5
