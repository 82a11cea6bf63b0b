"""The compiled loops that combine deltas give what PyTorch gives, bit for bit."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dare_adapters import compiled
from dare_adapters.combine import loops
from dare_adapters.combine.consensus import DIVISORS, VOTES, _merge, disjoint_merge
from dare_adapters.combine.della import magprune
from dare_adapters.combine.rescale import _Survivors
from dare_adapters.combine.sparsify import RandomMasks
from dare_adapters.combine.union import Elementwise, read_union
from dare_adapters.delta import Delta, DenseDelta, WeightedDelta
from dare_adapters.difference import ParameterDifference
from dare_adapters.mask import BernoulliSupport, BlockedSupport
from dare_adapters.matrix import MatrixView
from dare_adapters.row_sums import add_rows, apply_rows
from tests.combine.sources import aligned_deltas

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.skipif(not compiled.available(), reason="the loops were not compiled")


def difference(
    base_dtype: torch.dtype, dtype: torch.dtype, rows: int, columns: int, seed: int = 0
) -> ParameterDifference:
    """Few levels, so that many magnitudes are equal, and zeros of both signs."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(-4, 5, (rows * columns,), generator=generator) for _ in range(2)]
    base, finetuned = (values.to(torch.float32) / 64 for values in drawn)
    base[::7] = -0.0
    return ParameterDifference("w", (rows, columns), base.to(base_dtype), finetuned.to(dtype))


@pytest.mark.parametrize(("base_dtype", "dtype"), itertools.product(DTYPES, DTYPES))
@pytest.mark.parametrize("columns", [1, 15, 16, 1024, 1025, 3000])
def test_selection_is_pytorchs(base_dtype: torch.dtype, dtype: torch.dtype, columns: int):
    delta = difference(base_dtype, dtype, 3, columns)
    for start, stop in ((0, 3), (1, 2), (2, 2)):
        for low, high in ((0.0, math.inf), (1 / 64, 3 / 64), (0.0, 0.0), (5 / 64, 1 / 64)):
            count, inside = delta.between(low, high, start, stop)
            expected, reach = Delta.between(delta, low, high, start, stop)
            if low <= high:
                assert count == expected
                assert torch.equal(inside, reach)
        for value, last in itertools.product((0.0, 2 / 64, math.inf), (-5, 0, 700, math.inf)):
            index, values = delta.read_above(value, last, start, stop)
            places, expected_values = Delta.read_above(delta, value, last, start, stop)
            if value < math.inf or last == math.inf:
                assert torch.equal(index, places), (value, last)
                assert torch.equal(values, expected_values)
        total = delta.rows_between(start, stop).abs().sum(dtype=torch.float64)
        assert delta.l1(start, stop) == pytest.approx(float(total), rel=1e-6)


@pytest.mark.parametrize(("base_dtype", "dtype"), itertools.product(DTYPES, DTYPES))
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 250])
@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_what_is_drawn_is_what_pytorch_gathers(
    base_dtype: torch.dtype, dtype: torch.dtype, columns: int, factor: float
):
    delta = difference(base_dtype, dtype, 6, columns)
    for support in (
        BernoulliSupport(3, "w", 6, columns, 0.7),
        BlockedSupport(3, "w", 6, columns, 4),
        BlockedSupport(3, "w", 6, columns, 1),
    ):
        for start, stop in ((0, 6), (2, 5)):
            index, values = delta.read_support(support, factor, start, stop)
            places, expected = Delta.read_support(delta, support, factor, start, stop)
            assert torch.equal(index, places)
            assert torch.equal(values, expected)


@settings(max_examples=150, deadline=None)
@given(deltas=aligned_deltas())
def test_the_union_is_pytorchs(deltas: list[Delta]):
    rows = deltas[0].rows
    index, values = read_union(deltas, 0, rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "available", lambda: False)
        places, expected = read_union(deltas, 0, rows)
    assert (index is None) == (places is None)
    if index is not None:
        assert torch.equal(index, places)
    assert torch.equal(values, expected)


@pytest.mark.parametrize("factor", [1.0, 0.7])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("method", "vote", "divisor"),
    list(itertools.product(("total", "frequency"), VOTES, DIVISORS)),
)
def test_the_election_is_pytorchs(method: str, vote: str, divisor: str, count: int, factor: float):
    generator = torch.Generator().manual_seed(count)
    weights = torch.randn(count, generator=generator)
    values = torch.randn(count, 2050, generator=generator)
    coarse = torch.rand(count, 2050, generator=generator) < 0.6
    values[coarse] = values[coarse].mul(2).round()  # votes that end in a draw, and zeros
    merge = disjoint_merge(
        weights.tolist(), majority_sign_method=method, vote=vote, divisor=divisor, factor=factor
    )
    plain = _merge(values.clone(), weights, method == "frequency", vote == "weighted", divisor)
    assert torch.equal(merge(values), plain.mul_(factor))


@settings(max_examples=100, deadline=None)
@given(
    deltas=aligned_deltas(),
    dtype=st.sampled_from(DTYPES),
    weights=st.lists(st.sampled_from([1.0, -0.5, 0.3]), min_size=5, max_size=5),
)
def test_rows_are_added_to_as_pytorch_does(
    deltas: list[Delta], dtype: torch.dtype, weights: list[float]
):
    first = deltas[0]
    base = torch.randn(first.rows * first.columns, generator=torch.Generator().manual_seed(1))
    base[::3] = -0.0
    base = base.to(dtype)
    weighted = [WeightedDelta(d, w) for d, w in zip(deltas, weights, strict=False)]
    made = add_rows(base, weighted, 0, first.rows)
    view = MatrixView.over(base.clone(), first.rows, first.columns)
    apply_rows(view, weighted, 0, first.rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "available", lambda: False)
        plain = add_rows(base, weighted, 0, first.rows)
        slow = MatrixView.over(base.clone(), first.rows, first.columns)
        apply_rows(slow, weighted, 0, first.rows)
    bits = {2: torch.int16, 4: torch.int32}[base.element_size()]
    untouched = torch.ones(len(base), dtype=torch.bool)
    for delta in deltas:
        index, _ = delta.read(0, delta.rows)
        untouched[slice(None) if index is None else index] = False
    for found in (made, view.storage, slow.storage):
        assert torch.equal(found, plain)
        assert torch.equal(found.view(bits)[untouched], base.view(bits)[untouched])


@settings(max_examples=150, deadline=None)
@given(
    deltas=aligned_deltas(most=1),
    window=st.sampled_from([(0.1, 0.05), (0.5, 0.0), (0.75, 0.25)]),
    rescale=st.booleans(),
)
def test_ranks_are_numpys(deltas: list[Delta], window: tuple[float, float], rescale: bool):
    pruned = magprune(deltas[0], *window, RandomMasks("w", [5]), 0, rescale=rescale)
    index, values = pruned.read(0, pruned.rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loops, "available", lambda: False)
        places, expected = pruned.read(0, pruned.rows)
    assert torch.equal(index, places)
    assert torch.equal(values, expected)


@pytest.mark.parametrize("columns", [9, 1000, 1025, 40000])
@pytest.mark.parametrize("kind", ["normal", "few levels", "sixteen bits", "wide", "near", "zero"])
def test_ranks_are_numpys_of_every_kind_of_row(columns: int, kind: str):
    generator = torch.Generator().manual_seed(columns)
    rows = torch.randn(3, columns, generator=generator)
    if kind == "few levels":
        rows = rows.mul(3).round()
    elif kind == "sixteen bits":
        rows = (rows * 0.02).bfloat16().float() - (rows * 0.0201).bfloat16().float()
    elif kind == "wide":
        rows *= torch.exp(20 * torch.randn(rows.shape, generator=generator))
    elif kind == "near":  # one bucket holds nearly all of them, in another order
        rows = rows.sign() * (1 + torch.rand(rows.shape, generator=generator) * 1e-4)
        rows[:, ::3] *= 1e-30
    elif kind == "zero":
        rows *= 0
    pruned = magprune(DenseDelta(rows), 0.3, 0.2, RandomMasks("w", [5]), 0)
    index, values = pruned.read(0, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loops, "available", lambda: False)
        places, expected = pruned.read(0, 3)
    assert torch.equal(index, places)
    assert torch.equal(values, expected)


@settings(max_examples=100, deadline=None)
@given(deltas=aligned_deltas(), dtype=st.sampled_from(DTYPES), majority=st.booleans())
def test_a_dense_election_adds_what_a_sparse_one_does(
    deltas: list[Delta], dtype: torch.dtype, majority: bool
):
    weights = [1.0, 0.6, -0.5, 0.3, 1.0][: len(deltas)]
    merge = disjoint_merge(weights, vote="weighted" if majority else "unweighted")
    merged = Elementwise(deltas, merge)
    base = torch.randn(merged.rows * merged.columns, generator=torch.Generator().manual_seed(1))
    base[::3] = -0.0
    base = base.to(dtype)
    made = add_rows(base, [WeightedDelta(merged)], 0, merged.rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Elementwise, "read_dense", Delta.read_dense)
        sparse = add_rows(base, [WeightedDelta(merged)], 0, merged.rows)
    assert torch.equal(made, sparse)


@settings(max_examples=100, deadline=None)
@given(
    deltas=aligned_deltas(most=1),
    offset=st.sampled_from([0, 5, 1000, 1 << 31, 1 << 33]),
    expected=st.integers(0, 40),
    factor=st.floats(0.1, 10),
    weight=st.floats(-2, 2),
)
def test_survivors_are_remembered_as_pytorch_does(
    deltas: list[Delta], offset: int, expected: int, factor: float, weight: float
):
    delta = deltas[0]
    size = delta.rows * delta.columns
    half = delta.rows // 2
    parts = [(0, half), (half, delta.rows)] if half else [(0, delta.rows)]

    def remembered() -> tuple[_Survivors, float]:
        found, total = _Survivors(offset + size, expected), 0.0
        found.factor = factor
        for start, stop in parts:
            total += found.append(*delta.read(start, stop), offset + start * delta.columns)
        return found, total

    found, total = remembered()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loops, "available", lambda: False)
        plain, plain_total = remembered()
    assert total == pytest.approx(plain_total, rel=1e-12)
    assert total == pytest.approx(float(delta.dense().abs().sum(dtype=torch.float64)), rel=1e-6)
    for low, high in ((0, offset + size), (offset, offset + size // 2), (offset + size, offset)):
        for one, other in zip(found.between(low, high), plain.between(low, high), strict=True):
            assert torch.equal(one, other)
    # What is added is what is read, wherever a range of rows begins.
    start, stop = parts[-1]
    low = offset + start * delta.columns
    total_change = torch.linspace(-1, 1, (stop - start) * delta.columns)
    index, values = plain.between(low, low + len(total_change))
    once = total_change.clone()
    once[index] += values * weight  # assigns: a position that comes twice counts once
    found.add_to(total_change, weight, low)
    assert torch.equal(total_change, once)
