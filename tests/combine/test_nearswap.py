"""nearswap, against its formula written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dare_adapters.combine import get_method
from dare_adapters.combine.nearswap import nearswap
from dare_adapters.errors import CombinationError
from tests.combine.whole import Models, assert_near, flat, models


@settings(max_examples=60, deadline=None)
@given(drawn=models(1, 2), t=st.sampled_from([0.0, 1e-7, 0.01, 0.5, 10.0]))
def test_is_the_formula(drawn: Models, t: float) -> None:
    a, b = drawn.tuned if len(drawn.tuned) == 2 else (drawn.base, drawn.tuned[0])
    expected = []
    for x, y in zip(flat(a), flat(b), strict=True):
        share = min(1.0, t / max(abs(x - y), 1e-6))
        expected.append((1 - share) * x + share * y)
    assert_near(nearswap(drawn.tuned, [1.0] * len(drawn.tuned), t=t, base=drawn.base), expected)


@settings(max_examples=60, deadline=None)
@given(drawn=models(2, 2))
def test_nothing_is_near_at_zero_and_everything_at_a_large_t(drawn: Models) -> None:
    a, b = drawn.tuned
    assert torch.equal(nearswap([a, b], [1, 1], t=0, base=drawn.base), a)
    assert torch.equal(nearswap([a, b], [1, 1], t=1e9, base=drawn.base), b)


def test_entries_nearer_than_t_are_swapped_whole() -> None:
    a, b = torch.tensor([1.0, 1.0]), torch.tensor([1.25, 5.0])
    found = nearswap([a, b], [1, 1], t=0.5, base=torch.zeros(2))
    torch.testing.assert_close(found, torch.tensor([1.25, 1.5]))


def test_small_differences_are_measured_too() -> None:
    a = torch.tensor([0.0, 0.0])
    b = torch.tensor([2e-3, 5e-7])
    found = nearswap([a, b], [1, 1], t=1e-3, base=a)
    torch.testing.assert_close(found, torch.tensor([1e-3, 5e-7]), rtol=1e-6, atol=0)
    found = nearswap([a, b], [1, 1], t=1e-7, base=a)
    torch.testing.assert_close(found, torch.tensor([1e-7, 5e-8]), rtol=1e-6, atol=0)


def test_refuses_what_it_cannot_use() -> None:
    both, base = [torch.ones(2)] * 2, torch.ones(2)
    with pytest.raises(CombinationError, match=r"t is -1; it must be a number of at least 0"):
        nearswap(both, [1, 1], t=-1, base=base)
    with pytest.raises(CombinationError, match=r"no weights.*say with t how near is near"):
        nearswap(both, [1, 2], t=1, base=base)
    with pytest.raises(CombinationError, match="nearswap needs t"):
        get_method("nearswap").check({}, 2)
    with pytest.raises(CombinationError, match="1 to 2 adapters, 3 are given"):
        get_method("nearswap").check({"t": 1}, 3)
