"""Few tokens: each survivor of a row is multiplied with the entries of x that it finds.

One lane walks one row, so that the lanes of a warp, all in one block of columns, gather from the
same few bytes of x; warps share out a row's blocks. All tensors have one dimension, so that it is
written here, and not chosen by a compiler's version, which lane has what. A program serves one slot
and some rows, and finds the slot's tokens by itself: nothing is sorted before it.
"""

import triton
import triton.language as tl

from dare_adapters.kernels.gpu.stored_numbers import block_values, code_value

__all__ = ["gather_blocked", "gather_compressed"]


@triton.jit
def _slot_here(
    token_slot, which, slot_of, lane, slots, TOKENS: tl.constexpr, BY_SLOT: tl.constexpr
):
    """The slot that this program serves, or -1: none, or the first of its tokens has another."""
    if BY_SLOT:
        slot = which.to(tl.int64)
    else:
        own = tl.load(token_slot + which).to(tl.int64)
        first = tl.min(tl.where(slot_of == own, lane, TOKENS), axis=0)
        slot = tl.where((first == which) & (own < slots), own, -1)
    return slot


@triton.jit
def _token(mine, rank, lane, wanted):
    """The token of rank `wanted` among `mine`, int64."""
    return tl.sum(tl.where(mine & (rank == wanted), lane, 0), axis=0).to(tl.int64)


@triton.jit
def _plus(total, x, token, x_stride, place, used, value):
    """total + x[token, place] * value."""
    entry = tl.load(x + token * x_stride + place, mask=used, other=0)
    return total + entry.to(tl.float32) * value


@triton.jit
def _add(total, y, token, y_stride, row, written, factor, INNER: tl.constexpr, ROWS: tl.constexpr):
    """y[token, row] += factor * sums; lanes of one row are INNER apart, or side by side (1)."""
    if INNER == 1:
        change = tl.sum(tl.reshape(total, [ROWS, total.shape[0] // ROWS]), axis=1)
    else:
        change = tl.sum(tl.reshape(total, [total.shape[0] // ROWS, ROWS]), axis=0)
    to = y + token * y_stride + row
    before = tl.load(to, mask=written, other=0)
    tl.store(to, (before.to(tl.float32) + change * factor).to(before.dtype), mask=written)


@triton.jit
def gather_blocked(
    x, y, token_slot, table, weights,
    tokens, slots, rows, columns, groups, x_stride, y_stride,
    BLOCK: tl.constexpr, PHASE: tl.constexpr, OFFSET_BITS: tl.constexpr,
    BITS: tl.constexpr, FLOAT: tl.constexpr, WEIGHTED: tl.constexpr, BY_SLOT: tl.constexpr,
    TOKENS: tl.constexpr, AT_ONCE: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """y[t] += w[s] * x[t] Δ_sᵀ of blocked deltas. Grid: (blocks of rows, slots or tokens).

    AT_ONCE tokens, 1, 2 or 4, share what was decoded.
    """
    which = tl.program_id(1)
    lane = tl.arange(0, TOKENS)
    slot_of = tl.load(token_slot + lane, mask=lane < tokens, other=-1).to(tl.int64)
    slot = _slot_here(token_slot, which, slot_of, lane, slots, TOKENS, BY_SLOT)
    if slot < 0:
        return
    values_at = tl.load(table + slot * 5 + 1)
    mine = slot_of == slot
    count = tl.sum(mine.to(tl.int32), axis=0)
    if (values_at == 0) | (count == 0):
        return
    offsets_at = tl.load(table + slot * 5)
    rank = tl.cumsum(mine.to(tl.int32), axis=0) - 1
    own = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    thread = tl.arange(0, SPLIT * ROWS)
    row = tl.program_id(0) * ROWS + thread % ROWS
    share = (groups + SPLIT - 1) // SPLIT
    row_start = row.to(tl.int64) * groups
    factor = tl.full([ROWS], 1.0, tl.float32)
    if BITS < 16:
        scales = tl.load(table + slot * 5 + 2).to(tl.pointer_type(tl.float32))
        factor = tl.load(scales + own, mask=own < rows, other=0)
    if WEIGHTED:
        factor = factor * tl.load(weights + slot)
    for done in range(0, count, AT_ONCE):
        token = _token(mine, rank, lane, done)
        total = tl.zeros([SPLIT * ROWS], tl.float32)
        if AT_ONCE >= 2:
            token_1 = _token(mine, rank, lane, done + 1)
            total_1 = tl.zeros([SPLIT * ROWS], tl.float32)
        if AT_ONCE == 4:
            token_2 = _token(mine, rank, lane, done + 2)
            token_3 = _token(mine, rank, lane, done + 3)
            total_2 = tl.zeros([SPLIT * ROWS], tl.float32)
            total_3 = tl.zeros([SPLIT * ROWS], tl.float32)
        for step in range(0, share):
            group = (thread // ROWS) * share + step
            inside = (group < groups) & (row < rows)
            at = row_start + group
            column = group * (8 * BLOCK) - PHASE
            if OFFSET_BITS == 4:
                offset_word = tl.load(
                    offsets_at.to(tl.pointer_type(tl.uint32)) + at, mask=inside, other=0
                )
            if BITS == 4:
                code_word = tl.load(
                    values_at.to(tl.pointer_type(tl.uint32)) + at, mask=inside, other=0
                ).to(tl.int32, bitcast=True)
            elif BITS == 2:
                code_word = tl.load(
                    values_at.to(tl.pointer_type(tl.uint16)) + at, mask=inside, other=0
                ).to(tl.int32)
            elif BITS == 1:
                code_word = tl.load(
                    values_at.to(tl.pointer_type(tl.uint8)) + at, mask=inside, other=0
                ).to(tl.int32)
            for i in tl.static_range(8):
                if OFFSET_BITS == 4:
                    offset = ((offset_word >> (4 * i)) & 15).to(tl.int32)
                elif OFFSET_BITS == 8:
                    if i % 4 == 0:
                        offset_word = tl.load(
                            offsets_at.to(tl.pointer_type(tl.uint32)) + at * 2 + i // 4,
                            mask=inside, other=0,
                        )  # fmt: skip
                    offset = ((offset_word >> (8 * (i % 4))) & 255).to(tl.int32)
                elif OFFSET_BITS == 16:
                    offset = tl.load(
                        offsets_at.to(tl.pointer_type(tl.uint16)) + at * 8 + i,
                        mask=inside, other=0,
                    ).to(tl.int32)  # fmt: skip
                else:
                    offset = tl.zeros([SPLIT * ROWS], tl.int32)
                place = column + i * BLOCK + offset
                used = inside & (place >= 0) & (place < columns)
                if BITS >= 16:  # what is unused may be infinite
                    value = tl.load(
                        values_at.to(tl.pointer_type(FLOAT)) + at * 8 + i, mask=used, other=0
                    ).to(tl.float32)
                elif BITS == 8:
                    if i % 4 == 0:
                        code_word = tl.load(
                            values_at.to(tl.pointer_type(tl.uint32)) + at * 2 + i // 4,
                            mask=inside, other=0,
                        ).to(tl.int32, bitcast=True)  # fmt: skip
                    value = code_value((code_word >> (8 * (i % 4))) & 255, 8)
                else:
                    value = code_value((code_word >> (BITS * i)) & ((1 << BITS) - 1), BITS)
                total = _plus(total, x, token, x_stride, place, used, value)
                if AT_ONCE >= 2:
                    more = used & (done + 1 < count)
                    total_1 = _plus(total_1, x, token_1, x_stride, place, more, value)
                if AT_ONCE == 4:
                    more = used & (done + 2 < count)
                    total_2 = _plus(total_2, x, token_2, x_stride, place, more, value)
                    more = used & (done + 3 < count)
                    total_3 = _plus(total_3, x, token_3, x_stride, place, more, value)
        written = own < rows
        _add(total, y, token, y_stride, own, written, factor, ROWS, ROWS)
        if AT_ONCE >= 2:
            more = written & (done + 1 < count)
            _add(total_1, y, token_1, y_stride, own, more, factor, ROWS, ROWS)
        if AT_ONCE == 4:
            more = written & (done + 2 < count)
            _add(total_2, y, token_2, y_stride, own, more, factor, ROWS, ROWS)
            more = written & (done + 3 < count)
            _add(total_3, y, token_3, y_stride, own, more, factor, ROWS, ROWS)


@triton.jit
def gather_compressed(
    x, y, token_slot, table, weights,
    tokens, slots, rows, columns, x_stride, y_stride,
    SHORT: tl.constexpr, BITS: tl.constexpr, FLOAT: tl.constexpr, WEIGHTED: tl.constexpr,
    BY_SLOT: tl.constexpr, TOKENS: tl.constexpr, ENTRIES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The same of compressed rows, whose entries are shared out among the lanes of a warp."""
    which = tl.program_id(1)
    lane = tl.arange(0, TOKENS)
    slot_of = tl.load(token_slot + lane, mask=lane < tokens, other=-1).to(tl.int64)
    slot = _slot_here(token_slot, which, slot_of, lane, slots, TOKENS, BY_SLOT)
    if slot < 0:
        return
    index_at = tl.load(table + slot * 5)
    mine = slot_of == slot
    count = tl.sum(mine.to(tl.int32), axis=0)
    if (index_at == 0) | (count == 0):
        return
    values_at = tl.load(table + slot * 5 + 1)
    rank = tl.cumsum(mine.to(tl.int32), axis=0) - 1
    own = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    thread = tl.arange(0, ROWS * ENTRIES)
    row = tl.program_id(0) * ROWS + thread // ENTRIES
    starts = tl.load(table + slot * 5 + 3).to(tl.pointer_type(tl.int64))
    survivors = tl.load(table + slot * 5 + 4)
    begin = tl.maximum(tl.load(starts + row, mask=row < rows, other=0), 0)
    end = tl.minimum(tl.load(starts + row + 1, mask=row < rows, other=0), survivors)
    longest = tl.max(end - begin, axis=0)
    factor = tl.full([ROWS], 1.0, tl.float32)
    if BITS < 16:
        scales = tl.load(table + slot * 5 + 2).to(tl.pointer_type(tl.float32))
        factor = tl.load(scales + own, mask=own < rows, other=0)
    if WEIGHTED:
        factor = factor * tl.load(weights + slot)
    for done in range(0, count):
        token = _token(mine, rank, lane, done)
        total = tl.zeros([ROWS * ENTRIES], tl.float32)
        for first in range(0, longest, ENTRIES):
            at = begin + first + thread % ENTRIES
            used = at < end
            if SHORT:
                index = tl.load(
                    index_at.to(tl.pointer_type(tl.uint16)) + at, mask=used, other=0
                ).to(tl.int32)
            else:
                index = tl.load(index_at.to(tl.pointer_type(tl.int32)) + at, mask=used, other=0)
            used = used & (index >= 0) & (index < columns)
            value = block_values(values_at, at, used, BITS, FLOAT)
            total = _plus(total, x, token, x_stride, index, used, value)
        _add(total, y, token, y_stride, own, own < rows, factor, 1, ROWS)
