"""arcee_fusion, against its formula written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings

from dare_adapters.combine import fusion
from dare_adapters.combine.fusion import arcee_fusion
from dare_adapters.errors import CombinationError
from tests.combine.whole import Models, flat, models


def softmax(row: list[float]) -> list[float]:
    largest = max(row)
    powers = [math.exp(value - largest) for value in row]
    return [power / math.fsum(powers) + 1e-8 for power in powers]


def fused(a: torch.Tensor, b: torch.Tensor) -> tuple[list[float], list[float], float]:
    """Entries, importances, threshold."""
    length = a.shape[-1] if a.dim() else 1
    importance: list[float] = []
    for x, y in zip(a.reshape(-1, length), b.reshape(-1, length), strict=True):
        p, q = softmax(flat(y)), softmax(flat(x))
        divergence = math.fsum(s * math.log(s / r) for s, r in zip(p, q, strict=True))
        importance += [abs(v - u) * divergence for u, v in zip(flat(x), flat(y), strict=True)]
    ranked = sorted(importance)
    first, median, third = (ranked[int(share * (len(ranked) - 1))] for share in (0.25, 0.5, 0.75))
    threshold = median + 1.5 * (third - first)
    entries = [
        v if weight >= threshold else u
        for u, v, weight in zip(flat(a), flat(b), importance, strict=True)
    ]
    return entries, importance, threshold


@settings(max_examples=60, deadline=None)
@given(drawn=models(1, 2))
def test_is_the_formula(drawn: Models) -> None:
    a, b = drawn.tuned if len(drawn.tuned) == 2 else (drawn.base, drawn.tuned[0])
    found = flat(arcee_fusion(drawn.tuned, [1.0] * len(drawn.tuned), base=drawn.base))
    entries, importance, threshold = fused(a, b)
    for own, expected, weight in zip(found, entries, importance, strict=True):
        if abs(weight - threshold) > 1e-6 * abs(threshold) + 1e-12:
            assert own == expected


@settings(max_examples=60, deadline=None)
@given(drawn=models(2, 2))
def test_every_entry_is_one_of_the_two(drawn: Models) -> None:
    a, b = drawn.tuned
    found = arcee_fusion([a, b], [1, 1], base=drawn.base)
    assert bool(((found == a) | (found == b)).all())


@settings(max_examples=60, deadline=None)
@given(drawn=models(1, 1))
def test_of_equal_parameters_is_that_parameter(drawn: Models) -> None:
    found = arcee_fusion(drawn.tuned * 2, [1, 1], base=drawn.base)
    assert torch.equal(found, drawn.tuned[0])


def test_what_stands_out_is_taken() -> None:
    a = torch.zeros(4, 8)
    b = a + 0.01 * torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    b[2, 3] = 5.0
    found = arcee_fusion([b], [1], base=a)
    assert found[2, 3] == 5.0
    assert (found == a).float().mean() > 0.5


def test_ranges_of_rows_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randn(2, 9, 10, generator=torch.Generator().manual_seed(1))
    whole = arcee_fusion([b], [1], base=a)
    monkeypatch.setattr(fusion, "STEP_ENTRIES", 20)
    assert torch.equal(arcee_fusion([b], [1], base=a), whole)


def test_of_nothing_is_nothing() -> None:
    assert arcee_fusion([torch.zeros(0, 3)], [1], base=torch.zeros(0, 3)).shape == (0, 3)


def test_refuses_weights() -> None:
    with pytest.raises(CombinationError, match="arcee_fusion has no weights"):
        arcee_fusion([torch.ones(2)], [0.5], base=torch.ones(2))
