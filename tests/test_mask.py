"""Masks: the published generator, one survivor in each block, addressable by row."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dare_adapters.mask import (
    BernoulliSupport,
    BlockedSupport,
    Support,
    block_size,
    count_rows,
    matrix_shape,
    padded_slots,
    parameter_key,
    philox_words,
)
from tests import reference

WORDS = st.integers(0, 2**64 - 1)
ONES = 2**64 - 1
# Random123 1.14, tests/kat_vectors: philox4x64 10 <counter> <key> <output>.
KNOWN_ANSWERS = [
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B),
    ),
    (
        (ONES, ONES, ONES, ONES),
        (ONES, ONES),
        (0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0),
    ),
    (
        (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89),
        (0x452821E638D01377, 0xBE5466CF34E90C6C),
        (0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6),
    ),
]

# Part of the file format: these columns must never change.
GOLDEN_SEED, GOLDEN_NAME = 20240721, "model.layers.0.mlp.down_proj.weight"
GOLDEN_BLOCKED = {  # rows 0, 1, 5 of (8, 45) in blocks of 10
    0: [8, 11, 27, 38],
    1: [6, 19, 23, 31],
    5: [8, 10, 20, 38, 40],
}
GOLDEN_BERNOULLI = {  # rows 0, 1, 5 of (8, 45) at p = 0.8125
    0: [0, 6, 9, 14, 18, 23, 29, 38, 40],
    1: [0, 15, 20, 21, 28, 29, 31],
    5: [1, 4, 11, 14, 19, 20, 30, 31, 35, 40, 42],
}


def used(support: Support, start: int, stop: int) -> list[int]:
    """Flat positions of the survivors of some rows, relative to `start`."""
    slots = support.slots(start, stop)
    return slots.compact(slots.index).tolist()


def columns_of(support: Support, row: int) -> list[int]:
    return sorted(used(support, row, row + 1))


def kept(support: Support) -> np.ndarray:
    """The whole mask, bool (rows, columns)."""
    mask = np.zeros(support.rows * support.columns, dtype=bool)
    mask[used(support, 0, support.rows)] = True
    return mask.reshape(support.rows, support.columns)


# --- the generator


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_the_generator_gives_the_published_answers(counter, key, answer):
    number = sum(word << (64 * place) for place, word in enumerate(counter))
    assert reference.philox4x64(counter, key) == answer
    assert tuple(philox_words(*key, number, 1).tolist()) == answer


@settings(max_examples=60, deadline=None)
@given(seed=WORDS, key=WORDS, counter=st.integers(0, 2**256 - 1), blocks=st.integers(0, 5))
def test_words_agree_with_a_generator_in_plain_python(seed, key, counter, blocks):
    expected = reference.words_of(seed, key, counter, blocks)
    assert philox_words(seed, key, counter, blocks).tolist() == expected


def test_the_counter_starts_at_zero_and_carries_over_64_bits():
    assert philox_words(3, 4, 0, 1).tolist() == reference.words_of(3, 4, 0, 1)
    assert philox_words(3, 4, ONES, 2).tolist() == reference.words_of(3, 4, ONES, 2)


@given(name=st.text(max_size=40))
def test_a_name_is_keyed_with_its_sha256(name):
    assert parameter_key(name) == reference.name_key(name)


# --- golden vectors


@pytest.mark.parametrize("row", [0, 1, 5])
def test_golden_columns_of_a_blocked_mask(row):
    expected = reference.blocked_row(GOLDEN_SEED, GOLDEN_NAME, row, 45, 10)
    assert [column for column in expected if column is not None] == GOLDEN_BLOCKED[row]
    support = BlockedSupport(GOLDEN_SEED, GOLDEN_NAME, 8, 45, 10)
    assert columns_of(support, row) == GOLDEN_BLOCKED[row]


@pytest.mark.parametrize("row", [0, 1, 5])
def test_golden_columns_of_a_bernoulli_mask(row):
    assert (
        reference.bernoulli_row(GOLDEN_SEED, GOLDEN_NAME, row, 45, 0.8125)
        == (GOLDEN_BERNOULLI[row])
    )
    support = BernoulliSupport(GOLDEN_SEED, GOLDEN_NAME, 8, 45, 0.8125)
    assert columns_of(support, row) == GOLDEN_BERNOULLI[row]


# --- both random masks


@settings(max_examples=60, deadline=None)
@given(
    seed=WORDS,
    name=st.text(max_size=8),
    rows=st.integers(1, 6),
    columns=st.integers(1, 90),
    block=st.integers(1, 40),
)
def test_a_blocked_mask_is_the_one_of_a_plain_loop(seed, name, rows, columns, block):
    support = BlockedSupport(seed, name, rows, columns, block)
    for row in range(rows):
        expected = reference.blocked_row(seed, name, row, columns, block)
        assert columns_of(support, row) == [c for c in expected if c is not None]
    assert support.row_counts is None
    assert support.slot_count == rows * math.ceil(columns / block)


@settings(max_examples=60, deadline=None)
@given(
    seed=WORDS,
    name=st.text(max_size=8),
    rows=st.integers(1, 6),
    columns=st.integers(1, 60),
    drop_rate=st.floats(0, 0.999),
)
def test_a_bernoulli_mask_is_the_one_of_a_plain_loop(seed, name, rows, columns, drop_rate):
    support = BernoulliSupport(seed, name, rows, columns, drop_rate)
    found = [reference.bernoulli_row(seed, name, row, columns, drop_rate) for row in range(rows)]
    assert [columns_of(support, row) for row in range(rows)] == found
    assert support.row_counts.tolist() == [len(row) for row in found]
    assert support.slot_count == sum(len(row) for row in found)


@pytest.mark.parametrize(
    "support",
    [
        BlockedSupport(5, "a", 40, 123, 7),
        BlockedSupport(5, "a", 40, 300, 10),
        BernoulliSupport(5, "a", 40, 123, 0.83),
    ],
    ids=["ragged", "blocked", "bernoulli"],
)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_row_is_addressable_alone(support, data):
    start = data.draw(st.integers(0, 39))
    stop = data.draw(st.integers(start + 1, 40))
    whole = kept(support)[start:stop]
    assert sorted(used(support, start, stop)) == np.flatnonzero(whole).tolist()


@pytest.mark.parametrize("kind", [BlockedSupport, BernoulliSupport])
def test_names_and_seeds_give_independent_masks(kind):
    last = 10 if kind is BlockedSupport else 0.9
    masks = [
        kept(kind(seed, name, 100, 1000, last))
        for seed, name in [(1, "a"), (2, "a"), (1, "b"), (2**63 + 1, "a")]
    ]
    for one in range(len(masks)):
        for other in range(one):
            # Of 10000 survivors 1000 are shared by chance, give or take 30.
            shared = int((masks[one] & masks[other]).sum())
            assert 850 < shared < 1150, (one, other)
    again = kept(kind(1, "a", 100, 1000, last))
    assert np.array_equal(masks[0], again)


def test_rows_are_independent_of_each_other():
    mask = kept(BlockedSupport(9, "w", 101, 1000, 10))
    shared = int((mask[1:] & mask[:-1]).sum())
    assert 850 < shared < 1150


def test_a_row_does_not_depend_on_how_many_rows_there_are():
    few, many = BlockedSupport(1, "a", 3, 50, 7), BlockedSupport(1, "a", 300, 50, 7)
    assert columns_of(few, 2) == columns_of(many, 2)


# --- blocked


@settings(max_examples=50, deadline=None)
@given(seed=WORDS, columns=st.integers(1, 200), block=st.integers(1, 70))
def test_every_full_block_has_exactly_one_survivor(seed, columns, block):
    mask = kept(BlockedSupport(seed, "w", 5, columns, block))
    full = columns // block
    per_block = mask[:, : full * block].reshape(5, full, block).sum(axis=2)
    assert (per_block == 1).all()
    assert (mask[:, full * block :].sum(axis=1) <= 1).all()


def test_a_ragged_tail_keeps_its_columns_as_often_as_any_other():
    rows, block, tail = 40000, 10, 3
    mask = kept(BlockedSupport(11, "w", rows, 20 + tail, block))
    expected, spread = rows / block, math.sqrt(rows / block)
    assert (abs(mask.sum(axis=0) - expected) < 5 * spread).all()


@pytest.mark.parametrize("block", [2, 10, 33])
def test_survivors_are_uniform_over_the_columns_of_a_block(block):
    blocks, rows = 20, 3000
    mask = kept(BlockedSupport(1, "w", rows, blocks * block, block))
    seen = mask.reshape(rows, blocks, block).sum(axis=(0, 1))
    expected = rows * blocks / block
    chi_square = float(((seen - expected) ** 2 / expected).sum())
    freedom = block - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom) + 5


def test_a_block_of_one_keeps_everything():
    assert kept(BlockedSupport(1, "w", 3, 17, 1)).all()


@pytest.mark.parametrize("block", [0, -1, 65537])
def test_a_block_outside_the_lanes_is_refused(block):
    with pytest.raises(ValueError, match=f"block must be 1 … 65536, got {block}"):
        BlockedSupport(1, "w", 2, 2, block)


def test_the_largest_block_reaches_every_column():
    columns = columns_of(BlockedSupport(1, "w", 64, 65536 * 40, 65536), 7)
    assert [column >> 16 for column in columns] == list(range(40))
    assert max(column & 0xFFFF for column in columns) > 60000


# --- bernoulli


@pytest.mark.parametrize("drop_rate", [0.1, 0.5, 0.9, 0.99, 0.999])
def test_bernoulli_keeps_one_minus_p(drop_rate):
    support = BernoulliSupport(3, "w", 500, 2000, drop_rate)
    expected = 1e6 * (1 - drop_rate)
    assert abs(support.slot_count - expected) < 5 * math.sqrt(expected * drop_rate)


def test_bernoulli_at_zero_keeps_everything():
    assert kept(BernoulliSupport(3, "w", 4, 33, 0.0)).all()


@pytest.mark.parametrize("drop_rate", [1.0, -0.1, 1.5, math.nan])
def test_bernoulli_refuses_other_rates(drop_rate):
    with pytest.raises(ValueError, match="drop_rate must be in"):
        BernoulliSupport(3, "w", 4, 33, drop_rate)


# --- slots


@settings(max_examples=60, deadline=None)
@given(
    mask=st.integers(1, 6).flatmap(
        lambda width: st.lists(st.lists(st.booleans(), min_size=width, max_size=width), max_size=6)
    )
)
def test_padded_slots_name_the_true_entries_row_by_row(mask):
    array = np.array(mask, dtype=bool).reshape(len(mask), -1) if mask else np.zeros((0, 3), bool)
    slots = padded_slots(array)
    assert slots.compact(slots.index).tolist() == np.flatnonzero(array).tolist()
    assert count_rows(lambda a, b: array[a:b], *array.shape).tolist() == array.sum(axis=1).tolist()


def test_clearing_touches_unused_slots_only():
    ragged = BlockedSupport(4, "w", 30, 25, 10).slots(0, 30)
    padded = BernoulliSupport(4, "w", 30, 25, 0.7).slots(0, 30)
    for slots in (ragged, padded):
        ones = torch.ones(slots.index.shape)
        cleared = slots.clear_unused(ones.clone())
        assert slots.compact(cleared).tolist() == slots.compact(ones).tolist()
        assert int(cleared.sum()) == len(slots.compact(ones))
        assert slots.valid is not None
        assert not bool(slots.valid.all())


# --- shapes and rates


@pytest.mark.parametrize(
    ("drop_rate", "block"),
    [
        (0.0, 1),
        (0.5, 2),
        (2 / 3, 3),
        (0.75, 4),
        (0.8, 5),
        (0.875, 8),
        (0.9, 10),
        (0.9375, 16),
        (0.95, 20),
        (0.98, 50),
        (0.99, 100),
        (0.995, 200),
        (0.999, 1000),
        (1 - 1 / 65536, 65536),
        (0.3, None),
        (0.6, None),
        (0.7, None),
        (0.85, None),
        (0.97, None),
        (0.9376, None),
        (1 - 1 / 65537, None),
    ],
)
def test_block_size_is_the_reciprocal_of_what_is_kept(drop_rate, block):
    assert block_size(drop_rate) == block


@given(block=st.integers(1, 65536))
def test_every_block_is_found_from_its_rate(block):
    assert block_size(1 - 1 / block) == block


@pytest.mark.parametrize(
    ("shape", "matrix"),
    [
        ((), (1, 1)),
        ((7,), (1, 7)),
        ((0,), (1, 0)),
        ((3, 5), (3, 5)),
        ((4096, 11008), (4096, 11008)),
        ((64, 3, 7, 7), (64, 147)),  # a convolution: a row for each output channel
        ((64, 64, 3, 3), (64, 576)),
        ((8, 1, 3, 3), (8, 9)),  # no further than the first dimension
        ((768, 1, 128), (768, 128)),
        ((8, 1024, 256), (8192, 256)),  # experts: a row for each row of each expert
        ((8, 1024, 64), (8, 65536)),
        ((2, 3, 4, 200), (24, 200)),
    ],
)
def test_a_parameter_is_seen_as_a_matrix(shape, matrix):
    assert matrix_shape(shape) == matrix


@given(shape=st.lists(st.integers(1, 300), max_size=5).map(tuple))
def test_the_matrix_has_the_parameters_entries(shape):
    assert matrix_shape(shape) == reference.matrix_of(shape)
    assert math.prod(matrix_shape(shape)) == math.prod(shape)
