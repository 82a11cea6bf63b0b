"""Selection of the largest entries, against a stable sort of everything."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dare_adapters.combine import select
from dare_adapters.combine.select import Threshold, largest
from dare_adapters.combine.sparsify import RandomMasks, drop_at_random
from dare_adapters.combine.union import Elementwise
from dare_adapters.delta import Delta, DenseDelta, NoChange
from dare_adapters.stored_support import StoredSupport
from tests.combine.sources import (
    aligned_deltas,
    delta_of,
    distinct,
    encoded,
    levels,
    normal,
    range_starts,
)


def stored_entries(delta: Delta) -> tuple[np.ndarray, np.ndarray]:
    """Position and magnitude of every entry that a delta stores, each once, by position."""
    found: dict[int, float] = {}
    for row in range(delta.rows):
        index, values = delta.read(row, row + 1)
        places = range(delta.columns) if index is None else index.tolist()
        for place, value in zip(places, values.tolist(), strict=True):
            found[row * delta.columns + place] = abs(value)
    places = sorted(found)
    return np.array(places, dtype=np.int64), np.array([found[place] for place in places])


def expected_positions(deltas: list[Delta], keep: int) -> list[set[int]]:
    """The `keep` largest of all, of equal ones the first, by a stable sort."""
    stored = [stored_entries(delta) for delta in deltas]
    owner = np.concatenate([np.full(len(p), number) for number, (p, _) in enumerate(stored)])
    places = np.concatenate([p for p, _ in stored])
    chosen = np.argsort(-np.concatenate([m for _, m in stored]), kind="stable")[: max(keep, 0)]
    return [set(places[chosen[owner[chosen] == n]].tolist()) for n in range(len(deltas))]


def kept_positions(delta: Delta, threshold: Threshold, starts: list[int] | None = None) -> set[int]:
    """Flat positions that a threshold keeps, from reads of some ranges."""
    found: list[int] = []
    starts = [0, delta.rows] if starts is None else starts
    for start, stop in itertools.pairwise(starts):
        index, values = delta.read(start, stop)
        keep = threshold.keeps(values.abs(), index, start * delta.columns)
        assert keep.shape == values.shape
        assert keep.dtype == torch.bool
        chosen = keep.nonzero().squeeze(1) if index is None else index[keep]
        found += (chosen + start * delta.columns).tolist()
    return set(found)


@settings(max_examples=150, deadline=None)
@given(
    deltas=aligned_deltas(least=1, most=4),
    share=st.floats(0, 1.2),
    extra=st.integers(-1, 1),
)
def test_exactly_the_largest_are_kept_and_of_equal_ones_the_first(deltas, share, extra):
    stored = sum(len(stored_entries(delta)[0]) for delta in deltas)
    keep = int(share * stored) + extra
    found = largest(deltas, keep)
    assert len(found) == len(deltas)
    expected = expected_positions(deltas, keep)
    assert [kept_positions(d, t) for d, t in zip(deltas, found, strict=True)] == expected
    assert sum(map(len, expected)) == max(0, min(keep, stored))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), deltas=aligned_deltas(least=1, most=2), share=st.floats(0, 1))
def test_what_is_kept_does_not_depend_on_how_rows_are_read(data, deltas, share):
    keep = int(share * sum(delta.rows * delta.columns for delta in deltas))
    for delta, threshold in zip(deltas, largest(deltas, keep), strict=True):
        starts = data.draw(range_starts(delta.rows))
        assert kept_positions(delta, threshold, starts) == kept_positions(delta, threshold)


@pytest.mark.parametrize("keep", [0, 1, 499, 500, 501, 999, 1000, 1001, 10**9])
def test_of_equal_magnitudes_the_first_of_the_first_delta_are_kept(keep):
    deltas = [DenseDelta(torch.full((10, 50), value)) for value in (0.5, -0.5)]
    first, second = largest(deltas, keep)
    assert kept_positions(deltas[0], first) == set(range(min(keep, 500)))
    assert kept_positions(deltas[1], second) == set(range(min(max(keep - 500, 0), 500)))


@pytest.mark.parametrize("kind", ["blocked", "bernoulli", "stored"])
def test_entries_that_nobody_stores_are_never_kept(kind):
    delta = delta_of(kind, distinct((20, 60), 1), 1)
    places, _ = stored_entries(delta)
    (threshold,) = largest([delta], len(places) + 1)
    assert kept_positions(delta, threshold) == set(places.tolist())


def test_a_change_of_nothing_takes_part_and_keeps_nothing():
    delta = DenseDelta(distinct((4, 8), 1))
    first, second = largest([NoChange((1000, 8)), delta], 5)
    assert kept_positions(NoChange((1000, 8)), first) == set()
    assert kept_positions(delta, second) == expected_positions([delta], 5)[0]


def test_a_parameter_without_rows_takes_part():
    empty, delta = DenseDelta(torch.zeros(0, 5)), DenseDelta(distinct((4, 8), 1))
    assert kept_positions(delta, largest([empty, delta], 5)[1]) == expected_positions([delta], 5)[0]


@pytest.mark.parametrize("seed", range(8))
def test_a_random_number_of_entries_is_counted_and_not_guessed(seed):
    # Of 3000 entries in one row a Bernoulli mask keeps 1500 give or take 27.
    masks = RandomMasks("w", [seed, seed + 50], "bernoulli")
    whole = DenseDelta(distinct((3000,), seed))
    dropped = drop_at_random(whole, 0.5, masks, 0)
    both = Elementwise([dropped, drop_at_random(whole, 0.5, masks, 1)], lambda v: v.sum(dim=0))
    for delta in (dropped, both):
        stored = len(stored_entries(delta)[0])
        for keep in (stored - 1, stored, stored + 1):
            (threshold,) = largest([delta], keep)
            assert len(kept_positions(delta, threshold)) == min(keep, stored)


MISLEADING = {
    "all too small": torch.zeros(64),
    "all too large": torch.full((64,), 1e9),
    "half of each": torch.tensor([0.0, 1e9]).repeat_interleave(32),
    "nothing at all": torch.zeros(0),
}


@pytest.mark.parametrize("sample", MISLEADING.values(), ids=MISLEADING.keys())
@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
def test_a_sample_that_misleads_costs_time_and_not_exactness(sample, share, monkeypatch):
    monkeypatch.setattr(select, "_sample", lambda *_: sample)
    for values in (distinct((60, 500), 1), levels((60, 500), 1)):
        delta = DenseDelta(values)
        keep = int(share * values.numel())
        (threshold,) = largest([delta], keep)
        assert kept_positions(delta, threshold) == expected_positions([delta], keep)[0]


def test_entries_far_from_where_the_sample_is_taken_are_found():
    # Only the last of 5000 rows changes at all.
    places = np.arange(4999 * 100, 5000 * 100)
    support = StoredSupport.from_positions(places, 5000, 100)
    delta = encoded(distinct((5000, 100), 1), support, 32)
    (threshold,) = largest([delta], 30)
    assert kept_positions(delta, threshold) == expected_positions([delta], 30)[0]


def test_small_and_large_parameters_are_ranked_together_holding_few_entries(monkeypatch):
    # Were every parameter sampled alike, the small ones, of another scale, would mislead.
    deltas: list[Delta] = [DenseDelta(normal((64,), n) * 100) for n in range(60)]
    deltas += [DenseDelta(normal((256, 512), 1000 + n)) for n in range(2)]
    total = sum(delta.rows * delta.columns for delta in deltas)
    held: list[int] = []
    count = select._count

    def spy(*arguments: Any) -> tuple[int, list[torch.Tensor]]:
        above, inside = count(*arguments)
        held.append(sum(map(len, inside)))
        return above, inside

    monkeypatch.setattr(select, "_count", spy)
    for share in (0.001, 0.1, 0.5):
        keep = int(share * total)
        kept = [kept_positions(d, t) for d, t in zip(deltas, largest(deltas, keep), strict=True)]
        assert kept == expected_positions(deltas, keep)
    assert max(held) < 0.05 * total


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 50),
    value=st.integers(-1, 4),
    last=st.one_of(st.integers(-1, 60), st.just(float("inf"))),
    offset=st.integers(0, 50),
)
@example(seed=0, value=2, last=0, offset=0)
def test_all_positions_named_is_as_none_named(seed, value, last, offset):
    magnitudes = levels((30,), seed).abs()
    threshold = Threshold(value * 2.0**-10, last)
    named = threshold.keeps(magnitudes, torch.arange(30), offset)
    assert torch.equal(threshold.keeps(magnitudes, None, offset), named)
    expected = [
        m > threshold.value or (m == threshold.value and place + offset <= last)
        for place, m in enumerate(magnitudes.tolist())
    ]
    assert named.tolist() == expected
