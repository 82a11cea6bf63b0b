"""ram and ramplus_tl, against their formulas written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dare_adapters.combine import vectors
from dare_adapters.combine.ram import ram, ramplus_tl
from dare_adapters.errors import CombinationError
from tests.combine.whole import Models, assert_near, flat, models

EPSILONS = st.sampled_from([0.0, 1e-5, 0.02, 0.3])


def merged(drawn: Models, epsilon: float, factors: list[float]) -> list[float]:
    result = []
    for place, base in enumerate(flat(drawn.base)):
        changing = [
            (number, delta[place])
            for number, delta in enumerate(drawn.deltas)
            if abs(delta[place]) > epsilon
        ]
        if len(changing) == 1:
            number, delta = changing[0]
            result.append(base + factors[number] * delta)
        else:
            result.append(base + sum(delta for _, delta in changing) / max(1, len(changing)))
    return result


@settings(max_examples=60, deadline=None)
@given(drawn=models(1, 4), epsilon=EPSILONS)
def test_ram_is_the_formula(drawn: Models, epsilon: float) -> None:
    ones = [1.0] * len(drawn.tuned)
    found = ram(drawn.tuned, ones, epsilon=epsilon, base=drawn.base)
    assert_near(found, merged(drawn, epsilon, ones))


@settings(max_examples=60, deadline=None)
@given(
    drawn=models(1, 4),
    epsilon=EPSILONS,
    r=st.sampled_from([0.0, 0.1, 3.0]),
    alpha=st.sampled_from([0.0, 0.2, 50.0]),
)
def test_ramplus_tl_is_the_formula(drawn: Models, epsilon: float, r: float, alpha: float) -> None:
    factors = []
    for number, delta in enumerate(drawn.deltas):
        shared = alone = 0
        for place, value in enumerate(delta):
            others = [d for n, d in enumerate(drawn.deltas) if n != number]
            together = any(abs(other[place]) > epsilon for other in others)
            if abs(value) > epsilon:
                shared, alone = shared + together, alone + (not together)
        factors.append(1 + r * min(alpha, shared / alone if alone else 0))
    found = ramplus_tl(
        drawn.tuned, [1.0] * len(factors), r=r, alpha=alpha, epsilon=epsilon, base=drawn.base
    )
    assert_near(found, merged(drawn, epsilon, factors))


def test_what_one_alone_changes_stays_whole_and_the_rest_is_averaged() -> None:
    base = torch.zeros(3)
    tuned = [torch.tensor([4.0, 1.0, 0.0]), torch.tensor([0.0, 3.0, 0.0])]
    assert ram(tuned, [1, 1], base=base).tolist() == [4.0, 2.0, 0.0]
    # The first changes one entry alone and one along with the second: 1 + 0.5 · min(1, 10).
    found = ramplus_tl(tuned, [1, 1], r=0.5, alpha=10, base=base)
    assert found.tolist() == [6.0, 2.0, 0.0]


def test_steps_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    base, *tuned = torch.randn(4, 9, 10, generator=torch.Generator().manual_seed(1))
    whole = ramplus_tl(tuned, [1, 1, 1], epsilon=1, base=base)
    monkeypatch.setattr(vectors, "STEP_ENTRIES", 7)
    assert torch.equal(ramplus_tl(tuned, [1, 1, 1], epsilon=1, base=base), whole)


def test_refuses_what_it_cannot_use() -> None:
    one, base = [torch.ones(2)], torch.ones(2)
    with pytest.raises(CombinationError, match="ram has no weights"):
        ram(one, [2], base=base)
    with pytest.raises(CombinationError, match=r"epsilon is -1; it must be .* at least 0"):
        ram(one, [1], epsilon=-1, base=base)
    with pytest.raises(CombinationError, match=r"alpha is -1; it must be .* at least 0"):
        ramplus_tl(one, [1], alpha=-1, base=base)
