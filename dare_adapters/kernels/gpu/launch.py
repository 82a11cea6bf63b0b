"""Which kernel serves a call, and with which tiles. Nothing here waits for the device.

What decides is known to the host: the layout, and how many tokens there are for each delta on
average. Grids are upper bounds, and programs that find nothing to do end at once.

    gather     few tokens a delta: work grows with survivors x tokens
    multiply   more: work grows with entries x tiles of tokens
    dense      very many: entries once, then a plain product; only where codes or values are exact
               in the dtype of x

The borders follow from counting instructions for sm_90 (see docs/kernels.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton.language as tl

from dare_adapters.kernels.blocked import GROUP, BlockedLayout
from dare_adapters.kernels.compressed_rows import SHORT_COLUMNS, CompressedRowsLayout
from dare_adapters.kernels.gpu.dense_tiles import multiply_dense, write_dense
from dare_adapters.kernels.gpu.gather import gather_blocked, gather_compressed
from dare_adapters.kernels.gpu.group_tokens import group_tokens
from dare_adapters.kernels.gpu.multiply import multiply_blocked, multiply_transposed
from dare_adapters.kernels.gpu.slot_table import slot_table
from dare_adapters.kernels.layout import Layout
from dare_adapters.kernels.packed_delta import PackedDelta

__all__ = ["add_same_layout", "choose_way", "exact_in", "kin"]

# Tokens a delta, for each column of a block, up to which gathering is cheaper than expanding.
GATHERED_PER_COLUMN = 2
# Tokens a delta from which a dense copy is cheaper than expanding for each tile of tokens.
DENSE_TOKENS = 512
# Larger blocks are not expanded: gathering costs little at such drop rates.
LARGEST_EXPANDED = 256
# Bytes of a dense copy: what stays in the second-level cache until it is read.
DENSE_BYTES = 1 << 25
# Tokens that a gathering program looks through for its own.
LOOKED_THROUGH = 4096

_FLOATS = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.uint8: tl.uint8,
}


def exact_in(dtype: torch.dtype, layout: Layout) -> bool:
    """Whether values, without their scales, are exact in a dtype of half precision."""
    return dtype.itemsize == 2 and (layout.bits < 16 or layout.dtype == dtype)


def choose_way(layout: Layout, x: torch.Tensor, live: int, transposed: bool) -> str | None:
    """gather, multiply or dense; None where no kernel is made for it.

    Args:
        x: (T, K).
        live: how many slots have a delta.
    """
    if isinstance(layout, CompressedRowsLayout):
        return None if transposed else "gather"
    if not isinstance(layout, BlockedLayout):
        return None
    expanded = layout.block <= LARGEST_EXPANDED
    if transposed:
        return "multiply" if expanded else None
    tokens = -(-len(x) // live)
    if not expanded or tokens <= GATHERED_PER_COLUMN * layout.block:
        return "gather"
    return "dense" if tokens >= DENSE_TOKENS and exact_in(x.dtype, layout) else "multiply"


def kin(layout: Layout) -> Layout:
    """Equal for layouts that one launch serves."""
    if isinstance(layout, CompressedRowsLayout):
        return replace(layout, survivors=0, widest=0)
    return layout


def add_same_layout(
    x: torch.Tensor,
    deltas: Sequence[PackedDelta | None],
    layout: Layout,
    token_slot: torch.Tensor,
    y: torch.Tensor,
    transposed: bool,
    weights: torch.Tensor | None,
    way: str | None,
) -> None:
    """Add the products of deltas of one :func:`kin`.

    Args:
        deltas: None for those of another.
        x, y: rows of which entries lie side by side.
        way: of :func:`choose_way`.
    """
    table = slot_table(deltas, x.device)
    if way == "gather":
        for first in range(0, len(x), LOOKED_THROUGH):
            some = slice(first, first + LOOKED_THROUGH)
            _gather(x[some], table, layout, token_slot[some], y[some], weights)
        return
    assert isinstance(layout, BlockedLayout)
    order, starts = _grouped(token_slot, len(deltas))
    if way == "multiply":
        _multiply(x, table, layout, order, starts, y, transposed, weights)
        return
    for slot, delta in enumerate(deltas):
        if delta is not None:
            _multiply_dense(x, table, slot, layout, order, starts, y, weights)


def _gather(
    x: torch.Tensor,
    table: torch.Tensor,
    layout: Layout,
    token_slot: torch.Tensor,
    y: torch.Tensor,
    weights: torch.Tensor | None,
) -> None:
    tokens, slots = len(x), len(table)
    named: dict[str, Any] = {
        "BITS": layout.bits,
        "FLOAT": _FLOATS[layout.dtype],
        "WEIGHTED": weights is not None,
        "BY_SLOT": slots <= tokens,
        "TOKENS": _power_of_two(tokens),
    }
    programs = min(slots, tokens)
    arguments = (x, y, token_slot, table, table if weights is None else weights, tokens, slots)
    if isinstance(layout, BlockedLayout):
        groups = layout.slots // GROUP
        split, rows = min(16, _power_of_two(groups)), 32
        gather_blocked[(_tiles(layout.rows, rows), programs)](
            *arguments, layout.rows, layout.columns, groups, x.stride(0), y.stride(0),
            BLOCK=layout.block, PHASE=layout.phase, OFFSET_BITS=layout.offset_bits,
            AT_ONCE=min(_power_of_two(-(-tokens // slots)), 4),
            SPLIT=split, ROWS=rows, num_warps=split, **named,
        )  # fmt: skip
        return
    assert isinstance(layout, CompressedRowsLayout)
    rows = 8
    gather_compressed[(_tiles(layout.rows, rows), programs)](
        *arguments, layout.rows, layout.columns, x.stride(0), y.stride(0),
        SHORT=layout.columns <= SHORT_COLUMNS, ENTRIES=32, ROWS=rows, num_warps=8, **named,
    )  # fmt: skip


def _grouped(token_slot: torch.Tensor, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens by slot, int32 (T,), and where each slot's begin, int32 (slots + 1,)."""
    order = torch.empty(len(token_slot), dtype=torch.int32, device=token_slot.device)
    starts = torch.empty(slots + 1, dtype=torch.int32, device=token_slot.device)
    chunk = min(_power_of_two(len(token_slot)), 1024)
    group_tokens[(slots + 1,)](token_slot, order, starts, len(token_slot), CHUNK=chunk)
    return order, starts


def _multiply(
    x: torch.Tensor,
    table: torch.Tensor,
    layout: BlockedLayout,
    order: torch.Tensor,
    starts: torch.Tensor,
    y: torch.Tensor,
    transposed: bool,
    weights: torch.Tensor | None,
) -> None:
    slots, padded = len(table), _power_of_two(layout.block)
    exact = exact_in(x.dtype, layout) and (layout.bits >= 16 or not transposed)
    tokens = min(max(_power_of_two(-(-len(x) // slots)), 16), 64 if exact else 32)
    blocks = max(64 // padded, 1)
    rows = 32 if transposed else 64
    kernel = multiply_transposed if transposed else multiply_blocked
    outputs = _tiles(layout.slots, blocks) if transposed else _tiles(layout.rows, rows)
    kernel[(outputs, len(x) // tokens + min(slots, len(x)))](
        x, y, order, starts, table, table if weights is None else weights, slots, layout.rows,
        layout.columns, layout.slots, x.stride(0), y.stride(0), BLOCK=layout.block, PADDED=padded,
        PHASE=layout.phase, OFFSET_BITS=layout.offset_bits, BITS=layout.bits,
        FLOAT=_FLOATS[layout.dtype], WEIGHTED=weights is not None,
        OPERAND=_FLOATS[x.dtype if exact else torch.float32],
        PRECISION="ieee" if exact or torch.version.hip else "tf32x3",
        SLOTS=_power_of_two(slots), TOKENS=tokens, ROWS=rows, BLOCKS=blocks, num_warps=4,
    )  # fmt: skip


def _multiply_dense(
    x: torch.Tensor,
    table: torch.Tensor,
    slot: int,
    layout: BlockedLayout,
    order: torch.Tensor,
    starts: torch.Tensor,
    y: torch.Tensor,
    weights: torch.Tensor | None,
) -> None:
    tokens, rows, columns = 128, 128, 64
    room = max(DENSE_BYTES // (layout.columns * x.itemsize) // rows, 1) * rows
    dense = torch.empty(min(room, layout.rows), layout.columns, dtype=x.dtype, device=x.device)
    for first in range(0, layout.rows, room):
        stop = min(first + room, layout.rows)
        write_dense[(stop - first, _tiles(layout.columns, 1024))](
            dense, starts, table, slot, first, layout.columns, layout.slots,
            BLOCK=layout.block, PHASE=layout.phase, OFFSET_BITS=layout.offset_bits,
            BITS=layout.bits, FLOAT=_FLOATS[layout.dtype], COLUMNS=1024, num_warps=4,
        )  # fmt: skip
        multiply_dense[(_tiles(len(x), tokens) * _tiles(stop - first, rows),)](
            x, y, order, starts, table, table if weights is None else weights, dense, slot, first,
            stop, layout.columns, x.stride(0), y.stride(0), BITS=layout.bits,
            WEIGHTED=weights is not None, PRECISION="ieee", TOKENS=tokens, ROWS=rows,
            COLUMNS=columns, TOGETHER=8, num_warps=8, num_stages=3,
        )  # fmt: skip


def _tiles(size: int, tile: int) -> int:
    return -(-size // tile)


def _power_of_two(number: int) -> int:
    """The least that is not below."""
    return 1 << max(number - 1, 0).bit_length()
