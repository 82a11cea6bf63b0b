"""model_stock, against its formula written out."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dare_adapters.combine import get_method
from dare_adapters.combine.model_stock import model_stock
from dare_adapters.errors import CombinationError
from tests.combine.whole import Models, assert_near, dot, flat, minus, models, norm, plus, times


def ratio(deltas: list[list[float]], eps: float) -> float:
    count, cosines = len(deltas), []
    for a, b in itertools.combinations(deltas, 2):
        lengths = max(norm(a) * norm(b), eps)
        cosines.append(max(-1.0, min(1.0, dot(a, b) / lengths)) if lengths else 0.0)
    cosine = math.fsum(cosines) / len(cosines)
    denominator = 1 + (count - 1) * cosine
    return 0.0 if abs(denominator) < 1e-6 else count * cosine / denominator


def between(base: list[float], tuned: list[list[float]], eps: float) -> list[float]:
    t = ratio([minus(one, base) for one in tuned], eps)
    average = times(1 / len(tuned), plus(*tuned))
    return plus(times(t, average), times(1 - t, base))


# Of one entry the cosine is ±1, where the formula has its pole.
SEVERAL = [(7,), (1, 9), (5, 8), (6, 7), (3, 4, 5)]


@settings(max_examples=60, deadline=None)
@given(drawn=models(2, 5, SEVERAL), eps=st.sampled_from([0.0, 1e-6, 0.1]))
def test_is_the_formula(drawn: Models, eps: float) -> None:
    ones = [1.0] * len(drawn.tuned)
    t = ratio(drawn.deltas, eps)
    expected = between(flat(drawn.base), [flat(one) for one in drawn.tuned], eps)
    found = model_stock(drawn.tuned, ones, eps=eps, base=drawn.base)
    assert_near(found, expected, 1e-5 * max(1.0, abs(t)))


@settings(max_examples=60, deadline=None)
@given(drawn=models(2, 4, [(1, 9), (5, 8), (3, 4, 5), (7,)]))
def test_filter_wise_is_the_formula_row_by_row(drawn: Models) -> None:
    found = model_stock(drawn.tuned, [1.0] * len(drawn.tuned), filter_wise=True, base=drawn.base)
    length = drawn.base.shape[-1]
    rows = [tensor.reshape(-1, length) for tensor in (found, drawn.base, *drawn.tuned)]
    for own, base, *tuned in zip(*rows, strict=True):
        t = ratio([minus(flat(one), flat(base)) for one in tuned], 1e-6)
        expected = between(flat(base), [flat(one) for one in tuned], 1e-6)
        assert_near(own, expected, 1e-5 * max(1.0, abs(t)))


@settings(max_examples=60, deadline=None)
@given(drawn=models(1, 1), count=st.integers(2, 4))
def test_equal_fine_tunes_are_kept(drawn: Models, count: int) -> None:
    found = model_stock(drawn.tuned * count, [1.0] * count, base=drawn.base, eps=0)
    assert_near(found, flat(drawn.tuned[0]), 1e-6)


def test_fine_tunes_at_right_angles_leave_the_base() -> None:
    base = torch.tensor([1.0, 1.0])
    tuned = [torch.tensor([2.0, 1.0]), torch.tensor([1.0, 3.0])]
    assert torch.equal(model_stock(tuned, [1, 1], base=base), base)


def test_the_result_is_where_the_paper_draws_it() -> None:
    """Two deltas of length 1, 60° apart: t = 2 · ½ / (1 + ½) = ⅔ of the way to their middle."""
    base, up = torch.zeros(2), math.sqrt(3) / 2
    tuned = [torch.tensor([1.0, 0.0]), torch.tensor([0.5, up])]
    expected = torch.tensor([0.75, up / 2]) * 2 / 3
    torch.testing.assert_close(model_stock(tuned, [1, 1], base=base), expected)


def test_opposite_fine_tunes_leave_the_base() -> None:
    base, delta = torch.ones(4), torch.arange(4.0)
    found = model_stock([base + delta, base - delta], [1, 1], base=base)
    assert torch.equal(found, base)


@pytest.mark.parametrize("filter_wise", [False, True])
@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_where_nothing_changed_the_base_stays(filter_wise: bool, eps: float) -> None:
    base = torch.randn(3, 4)
    tuned = [base.clone(), base.clone()]
    assert torch.equal(
        model_stock(tuned, [1, 1], filter_wise=filter_wise, eps=eps, base=base), base
    )


def test_refuses_weights() -> None:
    with pytest.raises(CombinationError, match=r"model_stock has no weights, \[1, 2\] are given"):
        model_stock([torch.ones(2)] * 2, [1, 2], base=torch.zeros(2))


def test_takes_at_least_two() -> None:
    with pytest.raises(CombinationError, match="at least 2 adapters, 1 are given"):
        get_method("model_stock").check({}, 1)
