"""A packed delta is the delta, bit for bit, whole or in parts."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dare_adapters.delta import Delta, DenseDelta
from dare_adapters.errors import AdapterFormatError
from dare_adapters.kernels import PackedDelta
from dare_adapters.mask import BlockedSupport
from dare_adapters.sparse_delta import SparseDelta
from tests.kernels.deltas import blocked, deltas, stored

quickly = settings(max_examples=150, deadline=None)
sizes = st.tuples(st.integers(1, 12), st.integers(1, 90))
any_delta = sizes.flatmap(lambda size: deltas(*size))


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype == torch.float32
    assert found.shape == expected.shape
    assert torch.equal(found.view(torch.int32), expected.contiguous().view(torch.int32))


@quickly
@given(delta=any_delta)
def test_dense_is_the_delta_bit_for_bit(delta: Delta):
    assert_same_bits(PackedDelta.from_delta(delta).dense(), delta.dense())


@quickly
@given(delta=any_delta, data=st.data())
def test_rows_at_gathers_rows_in_any_order(delta: Delta, data: st.DataObject):
    index = torch.tensor(
        data.draw(st.lists(st.integers(0, delta.rows - 1), max_size=20)), dtype=torch.int64
    )
    assert_same_bits(PackedDelta.from_delta(delta).rows_at(index), delta.dense()[index])


@quickly
@given(delta=any_delta, data=st.data())
def test_slices_of_slices_are_slices_of_the_dense_delta(delta: Delta, data: st.DataObject):
    packed, dense = PackedDelta.from_delta(delta), delta.dense()
    for _ in range(data.draw(st.integers(1, 4))):
        across = data.draw(st.booleans())
        size = dense.shape[1] if across else dense.shape[0]
        start = data.draw(st.integers(0, size - 1))
        stop = data.draw(st.integers(start + 1, size))
        if across:
            packed, dense = packed.slice_columns(start, stop), dense[:, start:stop]
        else:
            packed, dense = packed.slice_rows(start, stop), dense[start:stop]
        assert_same_bits(packed.dense(), dense)


@quickly
@given(delta=any_delta, degree=st.sampled_from([2, 4, 8]), across=st.booleans())
def test_shards_of_any_degree_make_up_the_whole(delta: Delta, degree: int, across: bool):
    packed = PackedDelta.from_delta(delta)
    size = delta.columns if across else delta.rows
    borders = [size * rank // degree for rank in range(degree + 1)]
    cut = packed.slice_columns if across else packed.slice_rows
    parts = [cut(start, stop) for start, stop in itertools.pairwise(borders)]
    assert_same_bits(torch.cat([part.dense() for part in parts], int(across)), delta.dense())


@quickly
@given(delta=any_delta)
def test_declared_tensors_are_those_it_has_and_make_it_again(delta: Delta):
    packed = PackedDelta.from_delta(delta)
    declared, tensors = packed.layout.declare(), packed.tensors()
    assert declared.keys() == tensors.keys()
    for name, (shape, dtype) in declared.items():
        assert (tuple(tensors[name].shape), tensors[name].dtype) == (shape, dtype)
    assert packed.nbytes == sum(one.nbytes for one in tensors.values())
    copies = {name: one.clone() for name, one in tensors.items()}
    again = PackedDelta.from_tensors(packed.layout, copies)
    assert again.layout == packed.layout
    assert hash(again.layout) == hash(packed.layout)
    assert_same_bits(again.dense(), delta.dense())


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (2, 3, 130), (50,), (), (4, 2, 2)])
def test_parameters_of_any_dimension_keep_their_shape(shape: tuple[int, ...]):
    delta = DenseDelta(torch.randn(shape))
    packed = PackedDelta.from_delta(delta)
    assert (packed.shape, packed.rows, packed.columns) == (shape, delta.rows, delta.columns)
    assert_same_bits(packed.dense(), delta.dense())
    support = BlockedSupport(1, "x", delta.rows, delta.columns, 10)
    sparse = SparseDelta(shape, support, 32, torch.randn(support.slot_count))
    assert_same_bits(PackedDelta.from_delta(sparse).dense(), sparse.dense())


def test_rows_of_a_convolution_are_output_channels():
    dense = torch.randn(6, 4, 3, 3)
    packed = PackedDelta.from_delta(DenseDelta(dense))
    assert_same_bits(packed.slice_rows(2, 5).dense(), dense[2:5])
    assert_same_bits(packed.slice_columns(9, 27).dense(), dense.view(6, 36)[:, 9:27])


@pytest.mark.parametrize(
    ("block", "bits", "per_survivor"),
    [(10, 4, 8), (10, 1, 5), (10, 16, 20), (20, 4, 12), (256, 4, 12), (257, 4, 20), (1, 4, 4)],
)
def test_a_blocked_delta_takes_an_offset_and_a_value_a_survivor(block, bits, per_survivor):
    packed = PackedDelta.from_delta(blocked(8, 64 * block, block, bits))
    scales = 0 if bits == 16 else 8 * 4
    assert packed.nbytes == 8 * 64 * per_survivor // 8 + scales


def test_an_offset_outside_the_matrix_keeps_nothing():
    found = [PackedDelta.from_delta(blocked(40, 21, 10, 1, seed)).dense() for seed in range(3)]
    # One column is left to the last block: a tenth of the draws fall inside.
    kept = [int((dense[:, 20] != 0).sum()) for dense in found]
    assert 0 < sum(kept) < 40
    assert all(
        int((dense != 0).sum()) == 80 + last for dense, last in zip(found, kept, strict=True)
    )


def test_wide_rows_need_wider_column_numbers():
    packed = PackedDelta.from_delta(stored(3, 70000, 0.99, 4))
    assert packed.tensors()["column_index"].dtype == torch.int32
    assert_same_bits(packed.dense(), stored(3, 70000, 0.99, 4).dense())


def test_dense_can_be_asked_for_in_another_dtype():
    delta = blocked(9, 40, 10, 16)
    packed = PackedDelta.from_delta(delta)
    assert torch.equal(packed.dense(torch.bfloat16), delta.dense().to(torch.bfloat16))


def test_tensors_that_were_cast_are_refused_by_name():
    packed = PackedDelta.from_delta(blocked(9, 40, 10, 4))
    tensors = packed.tensors()
    tensors["scales"] = tensors["scales"].half()
    with pytest.raises(AdapterFormatError, match=r"scales .* should be torch.float32 \(9,\)"):
        PackedDelta.from_tensors(packed.layout, tensors)
    with pytest.raises(AdapterFormatError, match="'offsets', 'scales', 'values'"):
        PackedDelta.from_tensors(packed.layout, {"values": tensors["values"]})


def test_slices_outside_are_refused():
    packed = PackedDelta.from_delta(blocked(9, 40, 10, 4))
    with pytest.raises(ValueError, match="rows 3 … 10 of a packed delta that has 9"):
        packed.slice_rows(3, 10)
    with pytest.raises(ValueError, match="columns 5 … 4"):
        packed.slice_columns(5, 4)


def test_moving_moves_every_tensor():
    moved = PackedDelta.from_delta(blocked(9, 40, 10, 4), device="meta")
    assert moved.device.type == "meta"
    assert {one.device.type for one in moved.tensors().values()} == {"meta"}
