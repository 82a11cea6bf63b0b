"""A support that no seed gives: a bitmap in memory, on disk whatever is smaller.

Two encodings, both of the flat, row-major matrix:

    bitmap  uint8 (rows, ceil(columns / 8)), the lowest bit is the first column
    gaps    uint8 (n,): how many entries were skipped before each survivor; 255 skips 255
            entries and names no survivor
"""

from __future__ import annotations

from functools import cached_property
from typing import Literal

import numpy as np
import torch

from dare_adapters.errors import AdapterFormatError
from dare_adapters.mask import Slots, Support, count_rows, padded_slots

__all__ = ["StoredSupport", "SupportEncoding", "decode_support", "encode_support"]

SupportEncoding = Literal["bitmap", "gaps"]
ESCAPE = 255


class StoredSupport(Support):
    """Any support, as one bit for each entry.

    Args:
        bitmap: uint8 (rows, ceil(columns / 8)), the lowest bit is the first column.
    """

    def __init__(self, bitmap: np.ndarray, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns
        self.bitmap = bitmap

    @classmethod
    def from_positions(cls, positions: np.ndarray, rows: int, columns: int) -> StoredSupport:
        """From flat, row-major positions (any order, no repeats)."""
        bitmap = np.zeros((rows, -(-columns // 8)), dtype=np.uint8)
        row, column = np.divmod(positions, columns)
        np.bitwise_or.at(bitmap, (row, column >> 3), np.left_shift(1, column & 7).astype(np.uint8))
        return cls(bitmap, rows, columns)

    @cached_property
    def row_counts(self) -> np.ndarray:
        return count_rows(self._kept, self.rows, self.columns)

    @property
    def slots_per_row(self) -> int:
        return self.columns

    def _kept(self, start: int, stop: int) -> np.ndarray:
        rows = self.bitmap[start:stop]
        return np.unpackbits(rows, axis=1, count=self.columns, bitorder="little").view(bool)

    def contains(self, index: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        kept: torch.Tensor = torch.from_numpy(self._kept(start, stop).reshape(-1))[index]
        return kept

    def slots(self, start: int, stop: int) -> Slots:
        return padded_slots(self._kept(start, stop))


def encode_support(support: StoredSupport) -> tuple[SupportEncoding, np.ndarray]:
    """The smaller of the two encodings of a support."""
    positions = _positions(support)
    skipped = np.diff(positions, prepend=-1) - 1
    escapes = skipped // ESCAPE
    size = len(positions) + int(escapes.sum())
    if size >= support.bitmap.size:
        return "bitmap", support.bitmap
    stream = np.full(size, ESCAPE, dtype=np.uint8)
    stream[np.cumsum(escapes + 1) - 1] = (skipped % ESCAPE).astype(np.uint8)
    return "gaps", stream


def decode_support(
    encoding: SupportEncoding, data: np.ndarray, rows: int, columns: int, name: str
) -> StoredSupport:
    """A support from its encoding.

    Raises:
        AdapterFormatError: a survivor of parameter `name` lies outside the (rows, columns) matrix.
    """
    if encoding == "bitmap":
        unused = columns % 8
        if unused and np.any(data[:, -1] >> unused):
            raise AdapterFormatError(f"{name}: its bitmap names columns beyond {columns}")
        return StoredSupport(data, rows, columns)
    survivor = data != ESCAPE
    reached = np.cumsum(data.astype(np.int64) + survivor)
    positions = reached[survivor] - 1
    if len(positions) and positions[-1] >= rows * columns:
        raise AdapterFormatError(
            f"{name}: its column gaps run to entry {positions[-1]} of {rows} x {columns}"
        )
    return StoredSupport.from_positions(positions, rows, columns)


def _positions(support: StoredSupport) -> np.ndarray:
    step = max(1, (1 << 20) // max(support.columns, 1))
    found = [
        np.flatnonzero(support._kept(start, min(start + step, support.rows)))
        + start * support.columns
        for start in range(0, support.rows, step)
    ]
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)
