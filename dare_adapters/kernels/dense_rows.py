"""The layout of a delta of every entry, as norms and biases have: its values, float (R, C)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from dare_adapters.delta import Delta, DenseDelta
from dare_adapters.kernels.layout import Declared, Entries, Layout, Rows, Tensors, picked

__all__ = ["DenseRowsLayout", "pack_dense"]


@dataclass(frozen=True)
class DenseRowsLayout(Layout):
    """Every entry."""

    kind = 3

    @property
    def is_sparse(self) -> bool:
        return False

    @property
    def width(self) -> int:
        return self.columns

    def declare(self) -> dict[str, Declared]:
        return {"values": Declared((self.rows, self.columns), self.dtype)}

    def entries(self, tensors: Tensors, rows: Rows) -> Entries:
        value = self.matrix(tensors, rows)
        column = torch.arange(self.columns, device=value.device)
        return Entries(column.expand(len(value), -1), value, None)

    def matrix(self, tensors: Tensors, rows: Rows) -> torch.Tensor:
        return picked(tensors["values"], rows).to(torch.float32)

    def slice_rows(self, tensors: Tensors, start: int, stop: int) -> tuple[Layout, Tensors]:
        layout = replace(self, shape=self.resized(stop - start, self.columns))
        return layout, {"values": tensors["values"][start:stop].clone()}

    def slice_columns(self, tensors: Tensors, start: int, stop: int) -> tuple[Layout, Tensors]:
        layout = replace(self, shape=self.resized(self.rows, stop - start))
        return layout, {"values": tensors["values"][:, start:stop].clone()}

    def numbers(self) -> tuple[int, ...]:
        return ()

    @classmethod
    def from_numbers(
        cls, shape: tuple[int, int], bits: int, dtype: torch.dtype, numbers: tuple[int, ...]
    ) -> DenseRowsLayout:
        return cls(shape, bits, dtype)


def pack_dense(delta: Delta) -> tuple[DenseRowsLayout, Tensors]:
    """Any delta, whole; a :class:`DenseDelta` keeps its dtype."""
    values = delta.values if isinstance(delta, DenseDelta) else delta.dense()
    if values.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        values = values.to(torch.float32)
    layout = DenseRowsLayout(delta.shape, values.dtype.itemsize * 8, values.dtype)
    return layout, {"values": values.detach().reshape(layout.rows, layout.columns)}
