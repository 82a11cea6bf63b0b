"""Supports that no seed gives: bitmaps and column gaps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dare_adapters.errors import AdapterFormatError
from dare_adapters.stored_support import StoredSupport, decode_support, encode_support
from tests import reference


@st.composite
def supports(draw: st.DrawFn) -> tuple[int, int, list[int]]:
    """(rows, columns, sorted positions), from empty to full, with long gaps now and then."""
    rows, columns = draw(st.integers(1, 12)), draw(st.integers(1, 300))
    size = rows * columns
    positions = draw(
        st.one_of(
            st.sets(st.integers(0, size - 1), max_size=30),
            st.just(set(range(size))),
            st.integers(1, 9).map(lambda step: set(range(0, size, step))),
        )
    )
    return rows, columns, sorted(positions)


def positions_of(support: StoredSupport) -> list[int]:
    slots = support.slots(0, support.rows)
    return slots.compact(slots.index).tolist()


def sparse_positions() -> list[int]:
    """Gaps of 0, 1, 254, 255, 256, 509, 510, 511 and 1100 entries."""
    return (np.cumsum([1, 2, 255, 256, 257, 510, 511, 512, 1101]) - 1).tolist()


@settings(max_examples=120, deadline=None)
@given(case=supports(), shuffle=st.randoms(use_true_random=False))
def test_a_support_holds_exactly_its_positions(case, shuffle):
    rows, columns, positions = case
    order = list(positions)
    shuffle.shuffle(order)
    support = StoredSupport.from_positions(np.array(order, dtype=np.int64), rows, columns)
    assert positions_of(support) == positions
    assert reference.bitmap_positions(support.bitmap.tobytes(), rows, columns) == positions
    per_row = np.bincount(np.array(positions, dtype=np.int64) // columns, minlength=rows)
    assert support.row_counts.tolist() == per_row.tolist()


@settings(max_examples=120, deadline=None)
@given(case=supports())
def test_the_smaller_encoding_is_chosen_and_comes_back(case):
    rows, columns, positions = case
    support = StoredSupport.from_positions(np.array(positions, dtype=np.int64), rows, columns)
    encoding, data = encode_support(support)
    gaps = np.diff(np.array(positions), prepend=-1) - 1
    gap_bytes = sum(1 + int(gap) // 255 for gap in gaps)
    bitmap_bytes = rows * -(-columns // 8)
    assert data.nbytes == min(gap_bytes, bitmap_bytes)
    if encoding == "gaps":
        assert reference.gap_positions(data.tobytes()) == positions
    else:
        assert reference.bitmap_positions(data.tobytes(), rows, columns) == positions
    assert positions_of(decode_support(encoding, data, rows, columns, "w")) == positions


def test_gaps_of_more_than_a_byte_are_escaped():
    positions = sparse_positions()
    support = StoredSupport.from_positions(np.array(positions), 8, 500)
    encoding, data = encode_support(support)
    assert encoding == "gaps"
    assert data.tolist() == [0, 1, 254, 255, 0, 255, 1, 255, 254, 255, 255, 0, 255, 255, 1] + (
        [255] * 4 + [80]
    )
    assert positions_of(decode_support("gaps", data, 8, 500, "w")) == positions


@settings(max_examples=60, deadline=None)
@given(stream=st.binary(max_size=12), columns=st.integers(1, 40))
def test_gaps_are_read_as_described_or_refused(stream, columns):
    rows = 20
    data = np.frombuffer(stream, dtype=np.uint8)
    expected = reference.gap_positions(stream)
    if expected and expected[-1] >= rows * columns:
        with pytest.raises(AdapterFormatError, match="w: its column gaps run to entry"):
            decode_support("gaps", data, rows, columns, "w")
    else:
        assert positions_of(decode_support("gaps", data, rows, columns, "w")) == expected


def test_the_last_entry_is_inside_and_the_next_is_not():
    last = np.array([255, 255, 89], dtype=np.uint8)  # entry 599 of 600
    assert positions_of(decode_support("gaps", last, 3, 200, "w")) == [599]
    with pytest.raises(AdapterFormatError, match="run to entry 600 of 3 x 200"):
        decode_support("gaps", last + np.array([0, 0, 1], dtype=np.uint8), 3, 200, "w")


@given(columns=st.integers(1, 40), row=st.integers(0, 4))
@settings(deadline=None)
def test_a_bitmap_that_names_columns_beyond_the_last_is_refused(columns, row):
    bitmap = np.zeros((5, -(-columns // 8)), dtype=np.uint8)
    if columns % 8:
        bitmap[row, -1] = 1 << (columns % 8)
        with pytest.raises(AdapterFormatError, match=f"columns beyond {columns}"):
            decode_support("bitmap", bitmap, 5, columns, "w")
    else:
        bitmap[row, -1] = 0x80
        assert positions_of(decode_support("bitmap", bitmap, 5, columns, "w")) == [
            row * columns + columns - 1
        ]


@settings(max_examples=40, deadline=None)
@given(case=supports(), data=st.data())
def test_a_range_of_rows_is_a_slice_of_the_whole(case, data):
    rows, columns, positions = case
    support = StoredSupport.from_positions(np.array(positions, dtype=np.int64), rows, columns)
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    slots = support.slots(start, stop)
    low, high = start * columns, stop * columns
    assert slots.compact(slots.index).tolist() == [p - low for p in positions if low <= p < high]
