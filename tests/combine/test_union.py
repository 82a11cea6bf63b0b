"""Deltas read together, against the dense ones stacked."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dare_adapters.combine.consensus import disjoint_merge
from dare_adapters.combine.union import Elementwise, WeightedSum, read_union
from dare_adapters.delta import Delta, DenseDelta, NoChange
from dare_adapters.mask import matrix_shape
from tests.combine.sources import (
    KINDS,
    SHAPES,
    aligned_deltas,
    close,
    delta_of,
    distinct,
    encoded,
    in_pieces,
    normal,
    range_starts,
    stack,
    supports,
)

SPARSE = [kind for kind in KINDS if kind not in ("float32", "bfloat16", "float16")]


def total(values: torch.Tensor) -> torch.Tensor:
    return values.sum(dim=0)


def sharing(kind: str, shape: Sequence[int], count: int = 3, bits: int = 32) -> list[Delta]:
    """Deltas with other values over equal supports."""
    found: list[Delta] = []
    for number in range(count):
        rows, columns = matrix_shape(tuple(shape))
        found.append(encoded(distinct(shape, number), supports(rows, columns, 5)[kind], bits))
    return found


@settings(max_examples=120, deadline=None)
@given(deltas=aligned_deltas(), data=st.data())
def test_every_delta_is_read_at_every_position_that_any_changes(deltas, data):
    rows, columns = deltas[0].rows, deltas[0].columns
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    index, values = read_union(deltas, start, stop)
    dense = torch.from_numpy(stack(deltas)).view(len(deltas), rows, columns)
    expected = dense[:, start:stop].reshape(len(deltas), -1)
    assert values.dtype == torch.float32
    if index is None:
        assert torch.equal(values.double(), expected)
        return
    assert index.dtype == torch.int64
    assert torch.equal(values.double(), expected[:, index])
    changed = [delta.read(start, stop)[0] for delta in deltas]
    assert set(index.tolist()) == {place for part in changed for place in part.tolist()}
    assert not expected[:, sorted(set(range(expected.shape[1])) - set(index.tolist()))].any()


@settings(max_examples=60, deadline=None)
@given(deltas=aligned_deltas(least=2, kinds=SPARSE))
def test_no_position_is_named_twice_that_no_input_names_twice(deltas):
    index, _ = read_union(deltas, 0, deltas[0].rows)
    most = max(
        len(part) - len(part.unique())
        for part in (delta.read(0, delta.rows)[0] for delta in deltas)
    )
    assert len(index) - len(index.unique()) <= most
    assert bool((index[1:] >= index[:-1]).all())


def test_of_supports_that_differ_no_position_is_named_twice():
    # Both repeat positions in their ragged last blocks.
    deltas = [delta_of("blocked", distinct((40, 53), n), n) for n in (1, 6)]
    for delta in deltas:
        index = delta.read(0, 40)[0]
        assert len(index.unique()) < len(index)
    index, _ = read_union(deltas, 0, 40)
    assert len(index.unique()) == len(index)


def test_one_dense_delta_makes_all_of_it_dense():
    sparse, dense = delta_of("stored", distinct((5, 16), 1), 1), DenseDelta(distinct((5, 16), 2))
    for deltas in ([sparse, dense], [dense, sparse], [NoChange((5, 16)), dense]):
        assert read_union(deltas, 1, 3)[0] is None
        assert Elementwise(deltas, total).support_key is None


@pytest.mark.parametrize("bits", [32, 4, 1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["blocked", "bernoulli"])
def test_one_support_stays_that_support(kind, shape, bits):
    deltas = sharing(kind, shape, bits=bits)
    merged = Elementwise(deltas, total)
    assert merged.support_key == deltas[0].support_key is not None
    for start in range(merged.rows):
        index, values = merged.read(start, merged.rows)
        assert torch.equal(index, deltas[0].read(start, merged.rows)[0])
        assert len(values) == len(index)
    assert torch.equal(merged.dense().double().view(-1), torch.from_numpy(stack(deltas).sum(0)))


@pytest.mark.parametrize(
    "deltas",
    [
        [*sharing("blocked", (5, 16), 2), NoChange((5, 16))],
        [sharing("blocked", (5, 16), 1)[0], sharing("bernoulli", (5, 16), 1)[0]],
        [delta_of("blocked", distinct((5, 16), n), n) for n in (1, 6)],
        sharing("stored", (5, 16)),
    ],
    ids=["one changes nothing", "two kinds", "two seeds", "stored"],
)
def test_supports_that_differ_or_are_unknown_have_no_key(deltas):
    assert Elementwise(deltas, total).support_key is None


@settings(max_examples=80, deadline=None)
@given(deltas=aligned_deltas(most=7), data=st.data())
@pytest.mark.parametrize("divisor", ["count", "weights", None])
def test_no_bit_depends_on_how_rows_are_read(divisor, deltas, data):
    weights = data.draw(
        st.lists(st.floats(-2, 2, width=32), min_size=len(deltas), max_size=len(deltas))
    )
    merged = (
        WeightedSum(deltas, weights)
        if divisor is None
        else Elementwise(deltas, disjoint_merge(weights, vote="weighted", divisor=divisor))
    )
    starts = data.draw(range_starts(merged.rows))
    assert torch.equal(in_pieces(merged, starts), merged.dense().view(-1))


@pytest.mark.parametrize("count", [2, 5, 9])
@pytest.mark.parametrize("divisor", ["count", "weights", None])
def test_no_bit_depends_on_an_entrys_place_in_memory(divisor, count):
    weights = [0.3 + 0.1 * number for number in range(count)]
    zeros = [NoChange((1, 1))] * count
    merge = (
        WeightedSum(zeros, weights).function
        if divisor is None
        else disjoint_merge(weights, divisor=divisor)
    )
    values = normal((count, 999), 1)
    whole = merge(values.clone())
    for width in (1, 3, 7, 31, 100):
        parts = [merge(part.clone()) for part in values.split(width, dim=1)]
        assert torch.equal(torch.cat(parts), whole), width


@settings(max_examples=60, deadline=None)
@given(deltas=aligned_deltas(), data=st.data())
def test_what_is_asked_for_at_positions_is_what_is_there(deltas, data):
    merged = WeightedSum(deltas, [0.3] * len(deltas))
    start = data.draw(st.integers(0, merged.rows - 1))
    size = (merged.rows - start) * merged.columns
    index = torch.tensor(data.draw(st.lists(st.integers(0, size - 1), max_size=20)), dtype=int)
    dense = merged.dense().view(-1)[start * merged.columns :]
    assert torch.equal(merged.at(index, start, merged.rows), dense[index])
    positions, (read, _) = merged.positions(start, merged.rows), merged.read(start, merged.rows)
    assert positions is read is None or torch.equal(positions, read)


@settings(max_examples=40, deadline=None)
@given(deltas=aligned_deltas())
def test_reading_leaves_the_inputs_as_they_are(deltas):
    before = [delta.dense() for delta in deltas]
    merged = WeightedSum(deltas, [2.0] * len(deltas))
    first = merged.read(0, merged.rows)[1]
    first.fill_(7)  # the caller's own
    assert close(merged, 2 * torch.stack(before).double().sum(dim=0))
    assert all(torch.equal(d.dense(), b) for d, b in zip(deltas, before, strict=True))


def test_forgetting_is_passed_on():
    class Counting(DenseDelta):
        released = 0

        def release(self) -> None:
            self.released += 1

    deltas = [Counting(distinct((3,), n)) for n in range(3)]
    Elementwise([Elementwise(deltas[:2], total), deltas[2]], total).release()
    assert [delta.released for delta in deltas] == [1, 1, 1]
