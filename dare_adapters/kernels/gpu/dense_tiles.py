"""Very many tokens of few slots: some rows of a delta written dense once, and then multiplied.

Expanding costs about a comparison for each entry however many tokens follow, and a tile of tokens
that expands for itself pays it again. Rows are taken so many at a time that what was written is
still in the second-level cache when it is read.
"""

import triton
import triton.language as tl

from dare_adapters.kernels.gpu.stored_numbers import block_offsets, block_values

__all__ = ["multiply_dense", "write_dense"]


@triton.jit
def write_dense(
    dense, starts, table, slot, first_row, columns, blocks,
    BLOCK: tl.constexpr, PHASE: tl.constexpr, OFFSET_BITS: tl.constexpr,
    BITS: tl.constexpr, FLOAT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Values of rows, before their scales, in `dense` (n, columns). Grid: (n, column tiles)."""
    if tl.load(starts + slot) == tl.load(starts + slot + 1):
        return
    values_at = tl.load(table + slot * 5 + 1)
    offsets_at = tl.load(table + slot * 5)
    here = tl.program_id(0).to(tl.int64)
    row = here + first_row
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    block = (column + PHASE) // BLOCK
    inside = column < columns
    offset = block_offsets(offsets_at, row, block, blocks, inside, OFFSET_BITS)
    value = block_values(values_at, row * blocks + block, inside, BITS, FLOAT)
    value = tl.where(offset == column + PHASE - block * BLOCK, value, 0.0)
    to = dense + here * columns + column
    tl.store(to, value.to(dense.dtype.element_ty), mask=inside)


@triton.jit
def multiply_dense(
    x, y, order, starts, table, weights, dense,
    slot, first_row, stop_row, columns, x_stride, y_stride,
    BITS: tl.constexpr, WEIGHTED: tl.constexpr, PRECISION: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """y[t] += w[s] * x[t] Δ_sᵀ for those rows and all tokens of the slot. Grid: tiles."""
    row_tiles = tl.cdiv(stop_row - first_row, ROWS)
    token_tiles = tl.num_programs(0) // row_tiles
    # Neighbours share tiles of both, so that each is read from the cache.
    group = tl.program_id(0) // (TOGETHER * row_tiles)
    rest = tl.program_id(0) % (TOGETHER * row_tiles)
    high = tl.minimum(token_tiles - group * TOGETHER, TOGETHER)
    begin = tl.load(starts + slot) + (group * TOGETHER + rest % high) * TOKENS
    end = tl.load(starts + slot + 1)
    if begin >= end:
        return
    place = begin + tl.arange(0, TOKENS)
    live = place < end
    token = tl.load(order + place, mask=live, other=0).to(tl.int64)
    row = first_row + (rest // high) * ROWS + tl.arange(0, ROWS)
    known = row < stop_row
    within = tl.arange(0, COLUMNS)
    from_x = x + (token * x_stride)[:, None] + within[None, :]
    from_dense = dense + (row - first_row).to(tl.int64)[None, :] * columns + within[:, None]
    total = tl.zeros([TOKENS, ROWS], tl.float32)
    for start in range(0, columns, COLUMNS):
        left = columns - start
        entry = tl.load(from_x + start, mask=live[:, None] & (within < left)[None, :], other=0)
        value = tl.load(from_dense + start, mask=known[None, :] & (within < left)[:, None], other=0)
        total = tl.dot(entry, value, total, input_precision=PRECISION)
    if BITS < 16:
        scales = tl.load(table + slot * 5 + 2).to(tl.pointer_type(tl.float32))
        total = total * tl.load(scales + row, mask=known, other=0)[None, :]
    if WEIGHTED:
        total = total * tl.load(weights + slot)
    to = y + (token * y_stride)[:, None] + row[None, :]
    written = live[:, None] & known[None, :]
    before = tl.load(to, mask=written, other=0)
    tl.store(to, (before.to(tl.float32) + total).to(before.dtype), mask=written)
