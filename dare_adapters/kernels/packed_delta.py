"""One parameter's delta as a device holds it: packed, so that products are taken from it as it is.

A file stores no random support, and codes in the fewest bytes; a kernel can neither wait for the
seed's random numbers nor look far for a code. So the offsets are drawn once, here, and everything
else stays in the file's bits: at p = 0.9 and 4 bits 0.8 bits per parameter, a fortieth of float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch

from dare_adapters.delta import Delta
from dare_adapters.errors import AdapterFormatError
from dare_adapters.kernels.blocked import pack_blocked
from dare_adapters.kernels.compressed_rows import pack_read, pack_sparse
from dare_adapters.kernels.dense_rows import pack_dense
from dare_adapters.kernels.layout import Entries, Layout, Tensors
from dare_adapters.mask import BlockedSupport
from dare_adapters.sparse_delta import SparseDelta

__all__ = ["PackedDelta"]

# Entries that are made dense at once.
TILE_ENTRIES = 1 << 20


class PackedDelta:
    """The device layout of one parameter's delta, seen as a matrix (R, C) = `matrix_shape(shape)`.

    Immutable: what moves or slices it makes another. A delta's `added_rows` are no part of it.

    Args:
        layout: what the tensors mean; see :mod:`blocked`, :mod:`compressed_rows` and
            :mod:`dense_rows` for the tensors of each.
        tensors: by name, as `layout.declare()` says, all on one device.

    Attributes:
        layout: hashable, and equal for deltas that one compiled kernel serves; `layout.declare()`
            names the tensors with their shapes and dtypes.
        shape: of the parameter.
        rows, columns: R and C.
        bits: of a value: 32 or 16 (floats), or 8, 4, 2, 1 (codes).
        dtype: of the stored values; uint8 where they are codes.
        device: where the tensors are.
        nbytes: bytes of all tensors.
        prepared: what a back end keeps of it, by the back end's name; no copy has it.

    Raises:
        AdapterFormatError: a tensor is missing or of another shape or dtype.
    """

    def __init__(self, layout: Layout, tensors: Tensors) -> None:
        declared = layout.declare()
        if declared.keys() != tensors.keys():
            raise AdapterFormatError(
                f"a packed delta of this layout has the tensors {sorted(declared)}, "
                f"not {sorted(tensors)}"
            )
        for name, (shape, dtype) in declared.items():
            if tuple(tensors[name].shape) != shape or tensors[name].dtype != dtype:
                found = f"{tensors[name].dtype} {tuple(tensors[name].shape)}"
                raise AdapterFormatError(
                    f"{name} of a packed delta should be {dtype} {shape}, not {found}; if a module "
                    f"was cast as a whole, keep packed tensors out of the cast"
                )
        self.layout = layout
        self.shape, self.rows, self.columns = layout.shape, layout.rows, layout.columns
        self.bits, self.dtype, self.nbytes = layout.bits, layout.dtype, layout.nbytes
        self._tensors = {name: tensors[name].contiguous() for name in declared}
        self.device = self._tensors["values"].device
        self.prepared: dict[str, Any] = {}

    def __reduce__(self) -> tuple[type[PackedDelta], tuple[Layout, Tensors]]:
        """Copies have tensors, and so addresses, of their own."""
        return PackedDelta, (self.layout, self._tensors)

    @classmethod
    def from_delta(cls, delta: Delta, *, device: torch.device | str | None = None) -> PackedDelta:
        """Pack a delta of any kind.

        Args:
            delta: a blocked one keeps its codes and gets its column offsets; any other sparse one
                keeps its codes, in compressed rows; whatever else is read is kept in float32,
                sparse or dense, whichever is smaller.
            device: where to.
        """
        device = None if device is None else torch.device(device)
        layout, tensors = _pack(delta, device)
        packed = cls(layout, tensors)
        return packed if device is None else packed.to(device)

    @classmethod
    def from_tensors(cls, layout: Layout, tensors: Mapping[str, torch.Tensor]) -> PackedDelta:
        """What `layout` and :meth:`tensors` of another describe, from those tensors."""
        return cls(layout, tensors)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors, by name."""
        return dict(self._tensors)

    @cached_property
    def addresses(self) -> tuple[int, int, int, int]:
        """Of the offsets or column index, values, scales, and row starts; 0 for none."""
        where = "column_index" if "column_index" in self._tensors else "offsets"
        found = [self._tensors.get(name) for name in (where, "values", "scales", "row_starts")]
        first, second, third, fourth = (0 if one is None else one.data_ptr() for one in found)
        return first, second, third, fourth

    def __repr__(self) -> str:
        return f"PackedDelta({self.layout}, nbytes={self.nbytes}, device='{self.device}')"

    def to(self, device: torch.device | str) -> PackedDelta:
        """The same on a device."""
        moved = {name: one.to(device) for name, one in self._tensors.items()}
        return PackedDelta(self.layout, moved)

    def slice_rows(self, start: int, stop: int) -> PackedDelta:
        """Rows start … stop - 1 alone, as a tensor-parallel rank holds them.

        Raises:
            ValueError: there are no such rows.
        """
        _check_range("rows", start, stop, self.rows)
        return PackedDelta(*self.layout.slice_rows(self._tensors, start, stop))

    def slice_columns(self, start: int, stop: int) -> PackedDelta:
        """Columns start … stop - 1 alone; they need not lie on the borders of blocks.

        Raises:
            ValueError: there are no such columns.
        """
        _check_range("columns", start, stop, self.columns)
        return PackedDelta(*self.layout.slice_columns(self._tensors, start, stop))

    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The whole change, of `shape`; in float32 bit for bit `Delta.dense()`."""
        whole = torch.empty(self.rows, self.columns, dtype=dtype, device=self.device)
        step = max(1, TILE_ENTRIES // max(self.columns, 1))
        for start in range(0, self.rows, step):
            stop = min(start + step, self.rows)
            whole[start:stop] = self.matrix(start, stop)
        return whole.view(self.shape)

    def entries(self, start: int, stop: int) -> Entries:
        """The entries of rows start … stop - 1, W slots for each."""
        return self.layout.entries(self._tensors, slice(start, stop))

    def matrix(self, start: int, stop: int) -> torch.Tensor:
        """Rows start … stop - 1 made dense, float32 (n, C)."""
        return self.layout.matrix(self._tensors, slice(start, stop))

    def rows_at(self, index: torch.Tensor) -> torch.Tensor:
        """Some rows made dense, float32 (len(index), C), as an embedding's look-up needs them.

        Args:
            index: int (n,), rows in any order, with repeats.
        """
        return self.layout.matrix(self._tensors, index.to(torch.int64))


def _pack(delta: Delta, device: torch.device | None) -> tuple[Layout, Tensors]:
    if isinstance(delta, SparseDelta):
        if isinstance(delta.support, BlockedSupport):
            return pack_blocked(delta, device)
        return pack_sparse(delta)
    sparse = None if delta.entries_per_row >= delta.columns else pack_read(delta)
    return pack_dense(delta) if sparse is None else sparse


def _check_range(what: str, start: int, stop: int, size: int) -> None:
    if not 0 <= start <= stop <= size:
        raise ValueError(f"{what} {start} … {stop} of a packed delta that has {size}")
