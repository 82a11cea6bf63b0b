"""One parameter as a matrix over the storage it lives in, contiguous or not."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["MatrixView"]


@dataclass(frozen=True)
class MatrixView:
    """A (rows, columns) window on a one-dimensional tensor that shares the parameter's storage.

    Entry (r, c) is `storage[offset + r * row_stride + c * column_stride]`; where that cannot
    describe it, entry (r, c) is `storage[positions[r * columns + c]]`.
    """

    storage: torch.Tensor
    rows: int
    columns: int
    offset: int
    row_stride: int
    column_stride: int
    positions: torch.Tensor | None = None

    @classmethod
    def over(cls, tensor: torch.Tensor, rows: int, columns: int) -> MatrixView:
        """A window on a contiguous tensor of rows * columns entries."""
        return cls(tensor.detach().view(-1), rows, columns, 0, columns, 1)

    @property
    def device(self) -> torch.device:
        return self.storage.device

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    def mark_written(self) -> None:
        """Tell autograd of a write that it did not see."""
        if not self.storage.is_inference():
            torch.autograd.graph.increment_version(self.storage)

    def on_device(self, index: torch.Tensor | None) -> torch.Tensor | None:
        """An index moved to where the storage is."""
        return None if index is None else index.to(self.device, non_blocking=True)

    def flat_places(self, index: torch.Tensor, start: int) -> torch.Tensor | None:
        """Where in `storage` an index relative to row `start` is, or None: it takes long to say."""
        if self.positions is not None or self.column_stride != 1 or self.row_stride != self.columns:
            return None
        return index + (self.offset + start * self.columns)

    def take(self, start: int, stop: int, index: torch.Tensor | None) -> torch.Tensor:
        """Entries at `index` (relative to row `start`; None: all) of some rows, as a new vector."""
        part = self._contiguous(start, stop)
        if part is not None:
            return part.clone() if index is None else part.index_select(0, index)
        return self.storage.index_select(0, self._place(start, stop, index))

    def put(self, start: int, stop: int, index: torch.Tensor | None, values: torch.Tensor) -> None:
        """Overwrite the entries that :meth:`take` with the same arguments would read."""
        part = self._contiguous(start, stop)
        if part is None:
            self.storage.index_copy_(0, self._place(start, stop, index), values)
        elif index is None:
            part.copy_(values)
        else:
            part.index_copy_(0, index, values)

    def _contiguous(self, start: int, stop: int) -> torch.Tensor | None:
        if self.positions is not None or self.column_stride != 1 or self.row_stride != self.columns:
            return None
        first = self.offset + start * self.columns
        return self.storage[first : first + (stop - start) * self.columns]

    def _place(self, start: int, stop: int, index: torch.Tensor | None) -> torch.Tensor:
        if index is None:
            index = torch.arange((stop - start) * self.columns, device=self.device)
        if self.positions is not None:
            return self.positions[start * self.columns + index]
        row = index // self.columns
        column = index - row * self.columns
        return self.offset + (row + start) * self.row_stride + column * self.column_stride
