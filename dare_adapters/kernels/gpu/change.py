"""Attach and detach on an accelerator: the seed is expanded there, and nothing but codes goes over.

The outcome is that of `_rows.c`, bit for bit: sums in float32, rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dare_adapters.compiled import Where
from dare_adapters.kernels.gpu.available import device_of
from dare_adapters.kernels.gpu.change_kernels import apply_blocked, draw_offsets, restore_blocked

__all__ = ["apply_on_device", "offsets_on_device", "restore_on_device"]

THREADS = 128
LANES = 16


def apply_on_device(
    where: Where,
    bits: int,
    values: torch.Tensor,
    scales: torch.Tensor | None,
    weight: float,
    target: torch.Tensor,
    row_stride: int,
    slots: int,
    start: int,
    stop: int,
) -> torch.Tensor:
    """Add a blocked delta to rows start … stop - 1, in place.

    Args:
        where: seed, key, columns and block.
        values: as they are stored in a file, on the device of `target`.
        scales: float32 (rows,), or None for floats.
        target: flat, from the parameter's first entry.

    Returns:
        What was there, ((stop - start) * slots,), of the dtype of `target`.
    """
    seed, key, columns, block = where
    count, stride = stop - start, -(-slots // LANES)
    originals = torch.empty(count * slots, dtype=target.dtype, device=target.device)
    units = slots if bits >= 16 else -(-slots * bits // 8)
    with device_of(target):
        apply_blocked[_grid(count * stride)](
            target, originals, values, target if scales is None else scales, *_halves(seed, key),
            start, count * stride, stride, slots, columns, row_stride, units, weight, BLOCK=block,
            BITS=bits, ALONE=slots % LANES == 1, THREADS=THREADS, enable_fp_fusion=False,
        )  # fmt: skip
    return originals


def restore_on_device(
    where: Where,
    target: torch.Tensor,
    row_stride: int,
    originals: torch.Tensor,
    slots: int,
    start: int,
    stop: int,
) -> None:
    """Put back what :func:`apply_on_device` returned."""
    seed, key, columns, block = where
    count, stride = stop - start, -(-slots // LANES)
    with device_of(target):
        restore_blocked[_grid(count * stride)](
            target, originals, *_halves(seed, key), start, count * stride, stride, slots, columns,
            row_stride, BLOCK=block, THREADS=THREADS,
        )  # fmt: skip


def offsets_on_device(where: Where, rows: int, offsets: torch.Tensor, padded_slots: int) -> None:
    """Draw the offsets that a packed blocked delta holds into `offsets` (rows, …)."""
    seed, key, columns, block = where
    slots = -(-columns // block)
    stride = -(-slots // LANES)
    bits = 4 if block <= 16 else 8 if block <= 256 else 16
    with device_of(offsets):
        draw_offsets[_grid(rows * stride)](
            offsets, *_halves(seed, key), rows * stride, stride, slots, padded_slots, columns,
            BLOCK=block, OFFSET_BITS=bits, THREADS=THREADS,
        )  # fmt: skip


def _grid(counters: int) -> tuple[int]:
    return (max(-(-counters // THREADS), 1),)


def _halves(*words: int) -> Sequence[int]:
    """64-bit words as pairs of signed 32-bit numbers, of which kernels have one type."""
    parts = [part for word in words for part in (word & 0xFFFFFFFF, word >> 32)]
    return [part - (1 << 32) if part >= 1 << 31 else part for part in parts]
