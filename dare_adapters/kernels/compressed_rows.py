"""The layout of any other sparse delta: the columns of each row's entries, one row after another.

    row_starts    int64 (R + 1,): entries row_starts[r] … row_starts[r + 1] - 1 are of row r
    column_index  int16 (m,), the bits of an unsigned number, or int32 where C > 65536
    values        float (m,), or uint8 (ceil(m * bits / 8),) codes: entry i's begin at bit i * bits
    scales        float32 (R,), where values are codes

Unlike in the file, codes of a row do not begin at a byte: one number finds column and code.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dare_adapters import codec
from dare_adapters.delta import Delta
from dare_adapters.kernels.layout import Declared, Entries, Layout, Rows, Tensors, picked
from dare_adapters.mask import Slots
from dare_adapters.scales import load_scales
from dare_adapters.sparse_delta import SparseDelta

__all__ = ["CompressedRowsLayout", "pack_read", "pack_sparse"]

SHORT_COLUMNS = 1 << 16


@dataclass(frozen=True)
class CompressedRowsLayout(Layout):
    """Entries anywhere.

    Attributes:
        survivors: m, how many entries there are.
        widest: the most that a row has.
    """

    survivors: int
    widest: int

    kind = 2

    @property
    def width(self) -> int:
        return self.widest

    def declare(self) -> dict[str, Declared]:
        count = self.survivors
        units = count if self.bits >= 16 else codec.bytes_per_row(count, self.bits)
        return {
            "row_starts": Declared((self.rows + 1,), torch.int64),
            "column_index": Declared((count,), _index_dtype(self.columns)),
            "values": Declared((units,), self.dtype),
        } | self.scale_tensors()

    def entries(self, tensors: Tensors, rows: Rows) -> Entries:
        starts = tensors["row_starts"]
        begin, end = picked(starts[:-1], rows), picked(starts[1:], rows)
        place = begin[:, None] + torch.arange(self.widest, device=starts.device)
        used = place < end[:, None]
        place = place.clamp(max=max(self.survivors - 1, 0))
        column, stored = self._columns(tensors["column_index"][place]), self._at(tensors, place)
        if self.bits >= 16:
            return Entries(column, stored.to(torch.float32), used)
        plain = stored.to(torch.float32)
        plain = plain * 2 - 1 if self.bits == 1 else plain - (1 << (self.bits - 1))
        return Entries(column, plain * picked(tensors["scales"], rows)[:, None], used)

    def _columns(self, stored: torch.Tensor) -> torch.Tensor:
        column = stored.to(torch.int64)
        return column & 0xFFFF if stored.dtype == torch.int16 else column

    def _at(self, tensors: Tensors, place: torch.Tensor) -> torch.Tensor:
        """Stored floats or codes (uint8, 0 … 2**bits - 1) of some entries."""
        if self.bits >= 16:
            return tensors["values"][place]
        bit = place * self.bits
        shifted = tensors["values"][bit >> 3] >> (bit & 7).to(torch.uint8)
        return shifted & ((1 << self.bits) - 1)

    def slice_rows(self, tensors: Tensors, start: int, stop: int) -> tuple[Layout, Tensors]:
        starts = tensors["row_starts"][start : stop + 1]
        place = torch.arange(int(starts[0]), int(starts[-1]), device=starts.device)
        scales = tensors["scales"][start:stop].clone() if self.bits < 16 else None
        column = self._columns(tensors["column_index"][place])
        shape = self.resized(stop - start, self.columns)
        return _packed(shape, self.bits, starts.diff(), column, self._at(tensors, place), scales)

    def slice_columns(self, tensors: Tensors, start: int, stop: int) -> tuple[Layout, Tensors]:
        column = self._columns(tensors["column_index"])
        place = ((column >= start) & (column < stop)).nonzero().squeeze(1)
        before = torch.searchsorted(place, tensors["row_starts"])
        scales = tensors["scales"].clone() if self.bits < 16 else None
        shape = self.resized(self.rows, stop - start)
        return _packed(
            shape, self.bits, before.diff(), column[place] - start, self._at(tensors, place), scales
        )

    def numbers(self) -> tuple[int, ...]:
        return self.survivors, self.widest

    @classmethod
    def from_numbers(
        cls, shape: tuple[int, int], bits: int, dtype: torch.dtype, numbers: tuple[int, ...]
    ) -> CompressedRowsLayout:
        return cls(shape, bits, dtype, *numbers[:2])


def pack_sparse(delta: SparseDelta) -> tuple[CompressedRowsLayout, Tensors]:
    """A delta of any support, with its values as they are stored."""
    counts = delta.support.row_counts
    if counts is None:
        counts = np.full(delta.rows, delta.support.slots_per_row, dtype=np.int64)
    stored = delta.values.reshape(-1)
    if delta.bits < 16:
        stored = _codes(stored, counts, delta.bits)
    used_counts, columns, used = [], [], []
    for start, stop in delta.row_ranges():
        slots = delta.support.slots(start, stop)
        mask = _used(slots)
        row_starts = torch.arange(stop - start)[:, None] * delta.columns
        columns.append((slots.index - row_starts)[mask])
        used_counts.append(mask.sum(dim=1))
        used.append(mask[:, : max(counts[start:stop], default=0)])
    per_row, column = torch.cat(used_counts), torch.cat(columns)
    if delta.support.row_counts is None:  # unused slots are stored as well
        stored = stored[torch.cat(used).view(-1)]
    scales = None if delta.scales is None else load_scales(delta.scales, delta.exponent)
    return _packed(delta.shape, delta.bits, per_row, column, stored, scales)


def pack_read(delta: Delta) -> tuple[CompressedRowsLayout, Tensors] | None:
    """A delta of which nothing is known but what it reads, in float32; None: dense is smaller."""
    per_row, columns, values = [], [], []
    room = delta.rows * delta.columns * torch.float32.itemsize
    each = torch.float32.itemsize + _index_dtype(delta.columns).itemsize
    for start, stop in delta.row_ranges():
        index, value = delta.read(start, stop)
        room -= len(value) * each
        if index is None or room < 0:
            return None
        if len(index) > 1:  # what comes twice counts once
            once = torch.cat([torch.ones(1, dtype=torch.bool), index[1:] != index[:-1]])
            index, value = index[once], value[once]
        row = index // max(delta.columns, 1)
        per_row.append(torch.bincount(row, minlength=stop - start))
        columns.append(index - row * delta.columns)
        values.append(value)
    empty = torch.zeros(0)
    return _packed(
        delta.shape,
        32,
        torch.cat([empty.long(), *per_row]),
        torch.cat([empty.long(), *columns]),
        torch.cat([empty, *values]),
        None,
    )


def _packed(
    shape: tuple[int, ...],
    bits: int,
    per_row: torch.Tensor,
    column: torch.Tensor,
    stored: torch.Tensor,
    scales: torch.Tensor | None,
) -> tuple[CompressedRowsLayout, Tensors]:
    """Layout and tensors of entries in order of rows.

    Args:
        per_row: int64 (R,), entries of each row.
        column: int64 (m,).
        stored: (m,), floats, or codes uint8, 0 … 2**bits - 1.
    """
    row_starts = torch.nn.functional.pad(per_row.cumsum(0), (1, 0))
    widest = int(per_row.max()) if len(per_row) else 0
    layout = CompressedRowsLayout(shape, bits, stored.dtype, len(column), widest)
    if bits < 8:
        stored = _pack_codes(stored, bits)
    tensors = {
        "row_starts": row_starts,
        "column_index": column.to(_index_dtype(layout.columns)),  # int16 wraps around
        "values": stored,
    }
    return layout, tensors if scales is None else tensors | {"scales": scales}


def _pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes (m,) to bytes, lowest bits first."""
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, -len(codes) % per_byte)).view(-1, per_byte)
    packed = padded[:, 0].clone()
    for place in range(1, per_byte):
        packed |= padded[:, place] << (place * bits)
    return packed


def _codes(stored: torch.Tensor, counts: np.ndarray, bits: int) -> torch.Tensor:
    """The codes (m,) of rows that each begin at a byte, without what fills the last bytes."""
    per_byte = 8 // bits
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    codes = (stored[:, None] >> shifts & ((1 << bits) - 1)).view(-1)
    room = -(-counts // per_byte) * per_byte
    if np.array_equal(room, counts):
        return codes
    ends = np.stack([counts, room - counts], axis=1).reshape(-1)
    kept = np.repeat(np.tile([True, False], len(counts)), ends)
    return codes[torch.from_numpy(kept)]


def _used(slots: Slots) -> torch.Tensor:
    """Which slots are used, bool (n, K)."""
    used = torch.ones_like(slots.index, dtype=torch.bool)
    if slots.valid is not None and slots.valid.dim() == 1:
        used[:, -1] = slots.valid
        return used
    return used if slots.valid is None else slots.valid


def _index_dtype(columns: int) -> torch.dtype:
    return torch.int16 if columns <= SHORT_COLUMNS else torch.int32
