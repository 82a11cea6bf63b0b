"""A blocked delta drawn, added in place and taken back, where the parameter is.

A thread has one counter of the random stream and so sixteen blocks of one row. What it costs is the
bytes of the parameter: at p = 0.9 nearly every sector holds a survivor.
"""

import triton
import triton.language as tl

from dare_adapters.kernels.gpu.philox import lane_offset, philox, word_of
from dare_adapters.kernels.gpu.stored_numbers import code_value

__all__ = ["apply_blocked", "draw_offsets", "restore_blocked"]

_SEED = ["seed_low", "seed_high", "key_low", "key_high"]


@triton.jit
def _stored_value(values, row, slot, row_units, mask, BITS: tl.constexpr):
    """Stored floats, or the values of codes of rows that each begin at a byte, float32."""
    if BITS >= 16:
        value = tl.load(values + row * row_units + slot, mask=mask, other=0).to(tl.float32)
    else:
        bit = slot * BITS
        byte = tl.load(values + row * row_units + (bit >> 3), mask=mask, other=0).to(tl.int32)
        value = code_value((byte >> (bit & 7).to(tl.int32)) & ((1 << BITS) - 1), BITS)
    return value


@triton.jit(do_not_specialize=_SEED)
def apply_blocked(
    target, originals, values, scales, seed_low, seed_high, key_low, key_high,
    first_row, counters, stride, slots, columns, row_stride, row_units, weight,
    BLOCK: tl.constexpr, BITS: tl.constexpr, ALONE: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """target += weight * delta for rows from `first_row` on; what was there goes to `originals`.

    `originals` has a place for each slot. One that is not used, the last of a row, holds what the
    slot before it does, as `Slots.index` says; ALONE: that one is another counter's.
    """
    number = tl.program_id(0).to(tl.int64) * THREADS + tl.arange(0, THREADS)
    exists = number < counters
    here = number // stride
    row = here + first_row
    seed, key = word_of(seed_low, seed_high), word_of(key_low, key_high)
    a, b, c, d = philox(first_row.to(tl.int64) * stride + number, seed, key)
    start = (number - here * stride) * 16
    scale = tl.full([THREADS], 1.0, tl.float32)
    if BITS < 16:
        scale = tl.load(scales + row, mask=exists, other=0)
    for i in tl.static_range(16):
        slot = start + i
        column = slot * BLOCK + lane_offset(a, b, c, d, i, BLOCK)
        used = exists & (slot < slots) & (column < columns)
        change = _stored_value(values, row, slot, row_units, used, BITS) * scale * weight
        before = tl.load(target + row * row_stride + column, mask=used, other=0)
        after = (before.to(tl.float32) + change).to(before.dtype)
        tl.store(target + row * row_stride + column, after, mask=used)
        tl.store(originals + here * slots + slot, before, mask=used)
        following = (slot + 1) * BLOCK
        if i < 15:
            following += lane_offset(a, b, c, d, (i + 1) % 16, BLOCK)
            missing = exists & (slot == slots - 2) & (following >= columns)
            tl.store(originals + here * slots + slot + 1, before, mask=missing)
        elif ALONE:
            e, f, g, h = philox(first_row.to(tl.int64) * stride + number + 1, seed, key)
            following += lane_offset(e, f, g, h, 0, BLOCK)
            missing = exists & (slot == slots - 2) & (following >= columns)
            tl.store(originals + here * slots + slot + 1, before, mask=missing)


@triton.jit(do_not_specialize=_SEED)
def restore_blocked(
    target, originals, seed_low, seed_high, key_low, key_high,
    first_row, counters, stride, slots, columns, row_stride,
    BLOCK: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Put back what :func:`apply_blocked` kept."""
    number = tl.program_id(0).to(tl.int64) * THREADS + tl.arange(0, THREADS)
    exists = number < counters
    here = number // stride
    seed, key = word_of(seed_low, seed_high), word_of(key_low, key_high)
    a, b, c, d = philox(first_row.to(tl.int64) * stride + number, seed, key)
    start = (number - here * stride) * 16
    for i in tl.static_range(16):
        slot = start + i
        column = slot * BLOCK + lane_offset(a, b, c, d, i, BLOCK)
        used = exists & (slot < slots) & (column < columns)
        before = tl.load(originals + here * slots + slot, mask=used, other=0)
        tl.store(target + (here + first_row) * row_stride + column, before, mask=used)


@triton.jit(do_not_specialize=_SEED)
def draw_offsets(
    offsets, seed_low, seed_high, key_low, key_high,
    counters, stride, slots, padded_slots, columns,
    BLOCK: tl.constexpr, OFFSET_BITS: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """The offsets of `blocked.py`, from the seed; those of slots that only fill up are zero."""
    number = tl.program_id(0).to(tl.int64) * THREADS + tl.arange(0, THREADS)
    exists = number < counters
    row = number // stride
    a, b, c, d = philox(number, word_of(seed_low, seed_high), word_of(key_low, key_high))
    start = (number - row * stride) * 16
    for i in tl.static_range(16):
        slot = start + i
        offset = lane_offset(a, b, c, d, i, BLOCK)
        offset = tl.where(slot * BLOCK + offset < columns, offset, BLOCK - 1)
        offset = tl.where(slot < slots, offset, 0)
        stored = exists & (slot < padded_slots)
        at = row * padded_slots + slot
        if OFFSET_BITS == 4:
            if i % 2 == 0:
                lower = offset
            else:
                byte = (lower | (offset << 4)).to(tl.uint8)
                tl.store(offsets + (at >> 1), byte, mask=stored)
        else:
            tl.store(offsets + at, offset.to(offsets.dtype.element_ty), mask=stored)
