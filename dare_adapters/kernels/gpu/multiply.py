"""Many tokens: tiles of a delta are made dense in registers and go to the tensor cores.

A block of B columns is padded to P, the next power of two: entry b of block j is the value of slot
j where b is its offset and zero elsewhere. So expanding takes a comparison for each entry, without
a division or a scattered store, and x is read with the same padding. Codes are small whole numbers,
exact in half precision; scales are multiplied with the sums. What is said of columns makes lanes
read x side by side in every version of the compiler.
"""

import triton
import triton.language as tl

from dare_adapters.kernels.gpu.group_tokens import tokens_of_tile
from dare_adapters.kernels.gpu.stored_numbers import block_offsets, block_values

__all__ = ["multiply_blocked", "multiply_transposed"]


@triton.jit
def multiply_blocked(
    x, y, order, starts, table, weights,
    slots, rows, columns, blocks, x_stride, y_stride,
    BLOCK: tl.constexpr, PADDED: tl.constexpr, PHASE: tl.constexpr, OFFSET_BITS: tl.constexpr,
    BITS: tl.constexpr, FLOAT: tl.constexpr, WEIGHTED: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr, SLOTS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """y[t] += w[s] * x[t] Δ_sᵀ. Grid: (blocks of rows, tiles of tokens)."""
    slot, offsets_at, values_at, token, live = _delta_and_tokens(
        starts, order, table, tl.program_id(1), slots, TOKENS, SLOTS
    )
    if values_at == 0:
        return
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_long = row.to(tl.int64)
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    within = tl.arange(0, PADDED)
    for start in range(0, blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        inside = (row < rows)[:, None] & (block < blocks)[None, :]
        offset = block_offsets(
            offsets_at, row_long[:, None], block[None, :], blocks, inside, OFFSET_BITS
        )
        value = block_values(
            values_at, row_long[:, None] * blocks + block[None, :], inside, BITS, FLOAT
        ).to(OPERAND)
        column = (block * BLOCK - PHASE)[:, None] + within[None, :]
        exists = (within < BLOCK)[None, :] & (block < blocks)[:, None]
        exists = exists & (column >= 0) & (column < columns)
        kept = (offset[:, :, None] == within[None, None, :]) & exists[None, :, :]
        dense = tl.where(kept, value[:, :, None], 0.0).to(OPERAND)
        dense = tl.reshape(dense, [ROWS, BLOCKS * PADDED])
        column = tl.max_contiguous(tl.reshape(column, [BLOCKS * PADDED]), PADDED)
        exists = tl.reshape(exists, [BLOCKS * PADDED])
        entry = tl.load(
            x + (token * x_stride)[None, :] + column[:, None],
            mask=exists[:, None] & live[None, :], other=0,
        )  # fmt: skip
        total = tl.dot(dense, entry.to(OPERAND), total, input_precision=PRECISION)
    if BITS < 16:
        scales = tl.load(table + slot * 5 + 2).to(tl.pointer_type(tl.float32))
        total = total * tl.load(scales + row, mask=row < rows, other=0)[:, None]
    if WEIGHTED:
        total = total * tl.load(weights + slot)
    change = tl.trans(total)
    to = y + (token * y_stride)[:, None] + row[None, :]
    written = live[:, None] & (row < rows)[None, :]
    before = tl.load(to, mask=written, other=0)
    tl.store(to, (before.to(tl.float32) + change).to(before.dtype), mask=written)


@triton.jit
def multiply_transposed(
    x, y, order, starts, table, weights,
    slots, rows, columns, blocks, x_stride, y_stride,
    BLOCK: tl.constexpr, PADDED: tl.constexpr, PHASE: tl.constexpr, OFFSET_BITS: tl.constexpr,
    BITS: tl.constexpr, FLOAT: tl.constexpr, WEIGHTED: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr, SLOTS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """y[t] += w[s] * x[t] Δ_s. Grid: (tiles of blocks of columns, tiles of tokens)."""
    slot, offsets_at, values_at, token, live = _delta_and_tokens(
        starts, order, table, tl.program_id(1), slots, TOKENS, SLOTS
    )
    if values_at == 0:
        return
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    within = tl.arange(0, PADDED)
    total = tl.zeros([TOKENS, BLOCKS * PADDED], tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        row_long = row.to(tl.int64)
        inside = (row < rows)[:, None] & (block < blocks)[None, :]
        offset = block_offsets(
            offsets_at, row_long[:, None], block[None, :], blocks, inside, OFFSET_BITS
        )
        value = block_values(
            values_at, row_long[:, None] * blocks + block[None, :], inside, BITS, FLOAT
        )
        if BITS < 16:
            scales = tl.load(table + slot * 5 + 2).to(tl.pointer_type(tl.float32))
            value = value * tl.load(scales + row, mask=row < rows, other=0)[:, None]
        kept = (offset[:, :, None] == within[None, None, :]) & inside[:, :, None]
        dense = tl.where(kept, value[:, :, None], 0.0).to(OPERAND)
        dense = tl.reshape(dense, [ROWS, BLOCKS * PADDED])
        entry = tl.load(
            x + (token * x_stride)[:, None] + row[None, :],
            mask=live[:, None] & (row < rows)[None, :], other=0,
        )  # fmt: skip
        total = tl.dot(entry.to(OPERAND), dense, total, input_precision=PRECISION)
    if WEIGHTED:
        total = total * tl.load(weights + slot)
    column = (block * BLOCK - PHASE)[:, None] + within[None, :]
    exists = (within < BLOCK)[None, :] & (block < blocks)[:, None]
    exists = exists & (column >= 0) & (column < columns)
    column = tl.max_contiguous(tl.reshape(column, [BLOCKS * PADDED]), PADDED)
    exists = tl.reshape(exists, [BLOCKS * PADDED])
    to = y + (token * y_stride)[:, None] + column[None, :]
    written = live[:, None] & exists[None, :]
    before = tl.load(to, mask=written, other=0)
    tl.store(to, (before.to(tl.float32) + total).to(before.dtype), mask=written)


@triton.jit
def _delta_and_tokens(
    starts, order, table, tile, slots, TOKENS: tl.constexpr, SLOTS: tl.constexpr
):  # fmt: skip
    """The slot of a tile, where its offsets and values are (0: there is nothing to do), its tokens,
    and which of them there are."""
    slot, first, end = tokens_of_tile(starts, tile, slots, TOKENS, SLOTS)
    offsets_at = tl.load(table + slot * 5, mask=slot < slots, other=0)
    values_at = tl.load(table + slot * 5 + 1, mask=slot < slots, other=0)
    place = first + tl.arange(0, TOKENS)
    live = place < end
    token = tl.load(order + place, mask=live, other=0).to(tl.int64)
    return slot, offsets_at, values_at, token, live
