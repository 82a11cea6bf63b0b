"""The compiled loops that choose among entries give what PyTorch gives, bit for bit."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dare_adapters import compiled, compiled_selection
from dare_adapters.combine.select import Threshold, largest
from dare_adapters.delta import Delta
from dare_adapters.difference import ParameterDifference
from dare_adapters.mask import BlockedSupport
from dare_adapters.sparse_delta import SparseDelta
from tests.combine.sources import aligned_deltas
from tests.test_compiled import random_delta
from tests.test_compiled_combine import DTYPES, difference

pytestmark = pytest.mark.skipif(
    not compiled_selection.available(), reason="the loops were not compiled"
)


def without_loops(patch: pytest.MonkeyPatch) -> None:
    for module in (compiled, compiled_selection):
        patch.setattr(module, "available", lambda: False)


def packed(
    seed: int, rows: int, columns: int, block: int, bits: int, own_seed: int = 7
) -> SparseDelta:
    """A packed delta, of a support of its own."""
    made = random_delta(torch.Generator().manual_seed(seed), rows, columns, block, bits)
    made.support = BlockedSupport(own_seed, "some.weight", rows, columns, block)
    return made


@pytest.mark.parametrize(("base_dtype", "dtype"), list(itertools.product(DTYPES, DTYPES)))
@pytest.mark.parametrize("columns", [1, 15, 1024, 1025, 3000])
def test_differences_are_compared_as_pytorch_compares_them(
    base_dtype: torch.dtype, dtype: torch.dtype, columns: int
):
    delta = difference(base_dtype, dtype, 3, columns)
    whole = delta.finetuned.float() - delta.base.float()
    for start, stop in ((0, 3), (1, 2), (2, 2)):
        rows = whole[start * columns : stop * columns]
        assert torch.equal(delta.rows_between(start, stop), rows)
        for value in (0.0, 2 / 64, 9.0):
            above, equal = delta.count_around(value, start, stop)
            places = (rows.abs() == value).nonzero().squeeze(1)
            assert (above, equal) == (int((rows.abs() > value).sum()), len(places))
            for wanted in {1, max(1, len(places)), len(places) + 1}:
                there = wanted <= len(places)
                expected = (wanted, int(places[wanted - 1])) if there else (len(places), None)
                assert delta.equal_to(value, wanted, start, stop) == expected
                assert Delta.equal_to(delta, value, wanted, start, stop) == expected
            for last in (-5, 0, 700, math.inf):
                found = torch.full_like(rows, math.nan)
                delta.fill_above(found, value, last, start, stop)
                keep = rows.abs() > value
                keep[: int(min(last + 1, len(rows)))] |= (
                    (rows.abs() == value)[: int(min(last + 1, len(rows)))] if last >= 0 else False
                )
                expected_values = torch.where(keep, rows, -0.0)
                assert torch.equal(found.view(torch.int32), expected_values.view(torch.int32))


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 1000),
    bits=st.sampled_from([8, 4, 2, 1]),
    rows=st.integers(1, 9),
    columns=st.integers(1, 300),
    block=st.integers(1, 40),
    other=st.integers(1, 40),
    same=st.booleans(),
    factor=st.sampled_from([1.0, 2.5]),
)
def test_two_supports_keep_what_both_keep(
    seed: int,
    bits: int,
    rows: int,
    columns: int,
    block: int,
    other: int,
    same: bool,
    factor: float,
):
    delta = packed(seed, rows, columns, block, bits)
    support = BlockedSupport(7 if same else 8, "some.weight", rows, columns, other)
    dense = delta.dense().view(-1)
    stored, both = (torch.zeros(rows * columns, dtype=torch.bool) for _ in range(2))
    stored[delta.positions(0, rows)] = True
    slots = support._drawn_slots(0, rows)
    both[slots.compact(slots.index)] = True
    both &= stored
    start = seed % rows
    index, values = delta.read_kept(support, factor, start, rows)
    places = both[start * columns :].nonzero().squeeze(1)
    assert torch.equal(index.unique(), places)
    found = torch.zeros((rows - start) * columns)
    found[index] = values
    expected = torch.where(both, dense * factor, 0.0)[start * columns :]
    assert torch.equal(found, expected)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 1000),
    bits=st.sampled_from([8, 4, 2, 1]),
    rows=st.integers(1, 9),
    columns=st.integers(2, 300),
    block=st.integers(1, 40),
)
def test_codes_are_counted_as_they_are_read(
    seed: int, bits: int, rows: int, columns: int, block: int
):
    delta = packed(seed, rows, columns, block, bits)
    if delta.packed_support is None:
        return
    magnitudes, counts = delta.magnitude_counts(0, rows)
    for row in range(rows):
        index, values = delta.read(row, row + 1)
        once = torch.ones(len(index), dtype=torch.bool)
        once[1:] = index[1:] != index[:-1]
        read = values[once].abs().sort().values
        counted = magnitudes[row].repeat_interleave(counts[row]).sort().values
        assert torch.equal(read, counted)
        total = float(read.sum(dtype=torch.float64))
        assert delta.l1(row, row + 1) == pytest.approx(total, rel=1e-12)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 1000),
    bits=st.sampled_from([4, 2, 1]),
    count=st.integers(1, 3),
    equal_scales=st.booleans(),
    share=st.floats(0.01, 0.99),
)
def test_the_largest_of_packed_codes_are_those_of_the_entries(
    seed: int, bits: int, count: int, equal_scales: bool, share: float
):
    deltas = [packed(seed + n, 5 + n, 200 + n, 3, bits, seed + n) for n in range(count)]
    for delta in deltas:
        if equal_scales and delta.scales is not None:
            delta.scales[:] = delta.scales[0]  # equal magnitudes across rows
    assert all(delta.counts_magnitudes for delta in deltas)
    stored = sum(int(delta.magnitude_counts(0, delta.rows)[1].sum()) for delta in deltas)
    keep = max(1, int(share * stored))
    sizes, where = [], []
    for number, delta in enumerate(deltas):
        index = delta.positions(0, delta.rows).unique()
        sizes.append(delta.dense().view(-1)[index].abs())
        where += [(number, place) for place in index.tolist()]
    order = torch.cat(sizes).sort(descending=True, stable=True).indices[:keep]
    expected = {where[place] for place in order.tolist()}
    found = set()
    for number, (delta, limit) in enumerate(zip(deltas, largest(deltas, keep), strict=True)):
        index, values = delta.read(0, delta.rows)
        kept = index[limit.keeps(values.abs(), index, 0)]
        found |= {(number, place) for place in kept.tolist()}
    assert found == expected


@pytest.mark.parametrize("share", [0.001, 0.05, 0.1, 0.3, 0.5, 0.9])
def test_magnitudes_that_many_share_have_the_threshold_that_selecting_finds(share: float):
    generator = torch.Generator().manual_seed(3)
    base = (torch.randn(600 * 700, generator=generator) * 0.02).bfloat16()
    moved = base.float() + torch.randn(base.shape, generator=generator) * 1e-4
    delta = ParameterDifference("w", (600, 700), base, moved.bfloat16())
    keep = int(share * len(base))
    size = (delta.finetuned.float() - delta.base.float()).abs()
    order = size.sort(descending=True, stable=True).indices[:keep]
    expected = torch.zeros(len(base), dtype=torch.bool)
    expected[order] = True
    (found,) = largest([delta], keep)
    assert isinstance(found, Threshold)
    assert torch.equal(found.keeps(size, None, 0), expected)


@settings(max_examples=100, deadline=None)
@given(deltas=aligned_deltas(most=1), value=st.sampled_from([0.0, 0.5, 1.0]))
def test_every_delta_is_filled_in_as_it_is_read(deltas: list[Delta], value: float):
    delta = deltas[0]
    size = delta.rows * delta.columns
    with pytest.MonkeyPatch.context() as patch:
        without_loops(patch)
        index, values = delta.read_above(value, math.inf, 0, delta.rows)
    expected = torch.full((size,), -0.0)
    expected[index] = values
    found = torch.full((size,), math.nan)
    delta.fill_above(found, value, math.inf, 0, delta.rows)
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
