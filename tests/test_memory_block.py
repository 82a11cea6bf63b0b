"""Parts of one piece of memory: apart from each other, aligned, and never too few."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from dare_adapters.memory_block import MemoryBlock

DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])


@given(
    nbytes=st.sampled_from([0, 100, (2 << 20) - 1, 2 << 20, 5 << 20]),
    parts=st.lists(st.tuples(st.integers(0, 300_000), DTYPES), max_size=12),
)
def test_parts_never_overlap_whatever_was_asked_for(
    nbytes: int, parts: list[tuple[int, torch.dtype]]
) -> None:
    block = MemoryBlock(nbytes)
    taken = [block.take(count, dtype) for count, dtype in parts]
    for number, (one, (count, dtype)) in enumerate(zip(taken, parts, strict=True)):
        assert one.shape == (count,)
        assert one.dtype == dtype
        assert one.data_ptr() % dtype.itemsize == 0
        one.fill_(number)
    for number, one in enumerate(taken):
        assert bool((one == number).all())


def test_a_part_outlives_its_block() -> None:
    part = MemoryBlock(4 << 20).take(1 << 20, torch.float32)
    part.fill_(3.0)
    torch.zeros(1 << 21)
    assert bool((part == 3.0).all())


def test_what_fits_comes_from_one_piece() -> None:
    block = MemoryBlock(4 << 20)
    parts = [block.take(1 << 20, torch.uint8) for _ in range(4)]
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
    assert parts[0].data_ptr() % (2 << 20) == 0
    more = block.take(2 << 20, torch.uint8)
    assert more.untyped_storage().data_ptr() != parts[0].untyped_storage().data_ptr()
