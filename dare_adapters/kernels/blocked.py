"""The layout of a blocked mask: one entry in each block of B columns, so no index is needed.

    offsets  uint8 (R, S / 2), two blocks a byte, lowest first     B <= 16
             uint8 (R, S)                                          B <= 256
             int16 (R, S), the bits of an unsigned number          larger B
             absent                                                B = 1
    values   float (R, S), or uint8 (R, S * bits / 8) codes
    scales   float32 (R,), where values are codes

Slot j of a row is the entry of column j * B + offset - phase; a column outside the matrix is none.
So a ragged last block costs nothing, a slice of columns is a slice of bytes, and S can be a
multiple of eight: eight slots begin a byte whatever the bits, and no kernel has a remainder.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch

from dare_adapters.delta import STEP_ENTRIES
from dare_adapters.kernels.gpu.available import can_compile
from dare_adapters.kernels.layout import Declared, Entries, Layout, Rows, Tensors, picked
from dare_adapters.mask import BlockedSupport
from dare_adapters.scales import load_scales
from dare_adapters.sparse_delta import SparseDelta

__all__ = ["BlockedLayout", "pack_blocked"]

# Slots that begin a byte at any bits.
GROUP = 8


@dataclass(frozen=True)
class BlockedLayout(Layout):
    """One entry in each block.

    Attributes:
        block: B.
        slots: S, a multiple of eight; some may lie outside the matrix.
        phase: columns of the first stored block that lie before column 0.
    """

    block: int
    slots: int
    phase: int = 0

    kind = 1

    @property
    def width(self) -> int:
        return self.slots

    @property
    def offset_bits(self) -> int:
        """Bits of a stored offset: 0, 4, 8 or 16."""
        return 0 if self.block == 1 else 4 if self.block <= 16 else 8 if self.block <= 256 else 16

    def declare(self) -> dict[str, Declared]:
        declared = {}
        if self.offset_bits == 4:
            declared["offsets"] = Declared((self.rows, self.slots // 2), torch.uint8)
        elif self.offset_bits:
            dtype = torch.uint8 if self.offset_bits == 8 else torch.int16
            declared["offsets"] = Declared((self.rows, self.slots), dtype)
        width = self.slots if self.bits >= 16 else self.slots * self.bits // 8
        declared["values"] = Declared((self.rows, width), self.dtype)
        return declared | self.scale_tensors()

    def entries(self, tensors: Tensors, rows: Rows) -> Entries:
        stored = picked(tensors["values"], rows)
        first = torch.arange(self.slots, device=stored.device) * self.block - self.phase
        if self.block == 1:
            column = first.expand(len(stored), -1)
        else:
            column = self._offsets(picked(tensors["offsets"], rows)) + first
        scales = picked(tensors["scales"], rows) if self.bits < 16 else None
        value = self.decode(stored, scales)
        if not self.phase and self.slots * self.block == self.columns:
            return Entries(column, value, None)
        used = (column >= 0) & (column < self.columns)
        return Entries(column.clamp(0, max(self.columns - 1, 0)), value, used)

    def _offsets(self, stored: torch.Tensor) -> torch.Tensor:
        """Integers (n, S)."""
        if self.offset_bits == 8:
            return stored.to(torch.int64)
        if self.offset_bits == 16:
            return stored.to(torch.int64) & 0xFFFF
        return torch.stack([stored & 15, stored >> 4], dim=-1).flatten(1).to(torch.int64)

    def slice_rows(self, tensors: Tensors, start: int, stop: int) -> tuple[Layout, Tensors]:
        layout = replace(self, shape=self.resized(stop - start, self.columns))
        return layout, {name: one[start:stop].clone() for name, one in tensors.items()}

    def slice_columns(self, tensors: Tensors, start: int, stop: int) -> tuple[Layout, Tensors]:
        first = (start + self.phase) // self.block // GROUP * GROUP
        last = min(_whole_groups(-(-(stop + self.phase) // self.block)), self.slots)
        layout = replace(
            self,
            shape=self.resized(self.rows, stop - start),
            slots=max(last - first, 0),
            phase=self.phase + start - first * self.block,
        )
        kept = {}
        for name, (shape, _) in layout.declare().items():
            if name == "scales":
                kept[name] = tensors[name].clone()
                continue
            bits = self.offset_bits if name == "offsets" else self.bits
            begin = first * bits // 8 if tensors[name].dtype == torch.uint8 else first
            kept[name] = tensors[name][:, begin : begin + shape[1]].clone()
        return layout, kept

    def numbers(self) -> tuple[int, ...]:
        return self.block, self.slots, self.phase

    @classmethod
    def from_numbers(
        cls, shape: tuple[int, int], bits: int, dtype: torch.dtype, numbers: tuple[int, ...]
    ) -> BlockedLayout:
        return cls(shape, bits, dtype, *numbers)


def pack_blocked(
    delta: SparseDelta, device: torch.device | None = None
) -> tuple[BlockedLayout, dict[str, torch.Tensor]]:
    """A delta whose support is blocked; its offsets are drawn from the seed.

    Args:
        device: where they are drawn, if it can; the other tensors are then there as well.
    """
    support = cast(BlockedSupport, delta.support)
    drawn = support.slots_per_row
    layout = BlockedLayout(
        delta.shape, delta.bits, delta.values.dtype, support.block, _whole_groups(drawn)
    )
    declared = layout.declare()
    stored = delta.values.reshape(layout.rows, -1) if layout.rows else delta.values.view(0, 0)
    shape, dtype = declared["values"]
    tensors = {"values": torch.nn.functional.pad(stored, (0, shape[1] - stored.shape[1]))}
    if delta.scales is not None:
        tensors["scales"] = load_scales(delta.scales, delta.exponent)
    if layout.offset_bits and device is not None and can_compile(device):
        from dare_adapters.kernels.gpu.change import offsets_on_device

        shape, dtype = declared["offsets"]
        tensors = {name: one.to(device) for name, one in tensors.items()}
        tensors["offsets"] = torch.empty(shape, dtype=dtype, device=device)
        offsets_on_device(support.where, layout.rows, tensors["offsets"], layout.slots)
    elif layout.offset_bits:
        shape, dtype = declared["offsets"]
        offsets = torch.empty(shape, dtype=dtype)
        step = max(1, STEP_ENTRIES // max(drawn, 1))
        for start in range(0, layout.rows, step):
            stop = min(start + step, layout.rows)
            offsets[start:stop] = _drawn_offsets(support, layout, start, stop)
        tensors["offsets"] = offsets
    return layout, tensors


def _drawn_offsets(
    support: BlockedSupport, layout: BlockedLayout, start: int, stop: int
) -> torch.Tensor:
    """Offsets of some rows as they are stored."""
    found = support.slots(start, stop)
    row_starts = torch.arange(stop - start)[:, None] * layout.columns
    drawn = found.index.shape[1]
    offset = found.index - row_starts - torch.arange(drawn) * layout.block
    if found.valid is not None:  # the last place of a block that ends outside is outside
        offset[:, -1].masked_fill_(~found.valid, layout.block - 1)
    offset = torch.nn.functional.pad(offset, (0, layout.slots - drawn))
    if layout.offset_bits == 16:
        return offset.to(torch.int16)  # wraps around
    if layout.offset_bits == 8:
        return offset.to(torch.uint8)
    return (offset[:, ::2] | offset[:, 1::2] << 4).to(torch.uint8)


def _whole_groups(slots: int) -> int:
    return -(-slots // GROUP) * GROUP
