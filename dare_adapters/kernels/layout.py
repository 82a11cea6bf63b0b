"""What a packed delta looks like in memory: the description, apart from the tensors it describes.

A layout is a few numbers, known before any tensor is: it says which tensors there are, and how the
entries of some rows are read from them. Three kinds: `blocked.py`, `compressed_rows.py`, and
`dense_rows.py`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from dare_adapters import codec
from dare_adapters.mask import matrix_shape

__all__ = [
    "VALUE_DTYPES",
    "WORDS",
    "Declared",
    "Entries",
    "Layout",
    "Rows",
    "Tensors",
    "layout_from_words",
    "picked",
]

Tensors = Mapping[str, torch.Tensor]
Rows = slice | torch.Tensor
"""Rows to read: a slice with a start and a stop, or an int64 index."""

# Of values; their place here is what stands for them where a layout is written as numbers.
VALUE_DTYPES = (torch.uint8, torch.float32, torch.bfloat16, torch.float16)
# Numbers that a layout is written as.
WORDS = 8


class Declared(NamedTuple):
    """Shape and dtype of one of the tensors."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Entries(NamedTuple):
    """Entries of n rows, in W slots each.

    column: int64 (n, W); anything from 0 to columns - 1 where a slot is unused.
    value: float32 (n, W); anything where a slot is unused.
    used: bool (n, W), or None: all are.
    """

    column: torch.Tensor
    value: torch.Tensor
    used: torch.Tensor | None


@dataclass(frozen=True)
class Layout(ABC):
    """How one delta lies in memory.

    Attributes:
        shape: of the parameter.
        bits: of a value: 32 or 16 (floats), or 8, 4, 2, 1 (codes as :mod:`codec` packs them).
        dtype: of the values: float32, bfloat16, float16, or uint8 (codes).
    """

    shape: tuple[int, ...]
    bits: int
    dtype: torch.dtype

    kind: ClassVar[int]

    @property
    def rows(self) -> int:
        """R of the matrix as which the parameter is seen (`mask.matrix_shape`)."""
        return matrix_shape(self.shape)[0]

    @property
    def columns(self) -> int:
        """C of that matrix."""
        return matrix_shape(self.shape)[1]

    @property
    def is_sparse(self) -> bool:
        """Whether :meth:`entries` leaves anything out."""
        return True

    @property
    @abstractmethod
    def width(self) -> int:
        """W: the most slots that a row has."""

    @abstractmethod
    def declare(self) -> dict[str, Declared]:
        """The tensors, by name."""

    @abstractmethod
    def entries(self, tensors: Tensors, rows: Rows) -> Entries:
        """The entries of some rows; never asks an accelerator for a number."""

    @abstractmethod
    def slice_rows(self, tensors: Tensors, start: int, stop: int) -> tuple[Layout, Tensors]:
        """Rows start … stop - 1 alone."""

    @abstractmethod
    def slice_columns(self, tensors: Tensors, start: int, stop: int) -> tuple[Layout, Tensors]:
        """Columns start … stop - 1 alone."""

    @abstractmethod
    def numbers(self) -> tuple[int, ...]:
        """What :meth:`from_numbers` needs beyond shape, bits and dtype: at most three numbers."""

    @classmethod
    @abstractmethod
    def from_numbers(
        cls, shape: tuple[int, int], bits: int, dtype: torch.dtype, numbers: tuple[int, ...]
    ) -> Layout:
        """The inverse of :meth:`numbers`."""

    def matrix(self, tensors: Tensors, rows: Rows) -> torch.Tensor:
        """Some rows made dense, float32 (n, columns)."""
        column, value, used = self.entries(tensors, rows)
        if used is not None:  # what is unused goes to a column that nobody sees
            column = column.masked_fill(~used, self.columns)
        dense = value.new_zeros(len(value), self.columns + (used is not None))
        return dense.scatter_(1, column, value)[:, : self.columns]

    def words(self) -> tuple[int, ...]:
        """The layout as :data:`WORDS` numbers; of `shape`, only the matrix it is seen as."""
        numbers = self.numbers()
        fixed = (self.kind, self.rows, self.columns, self.bits, VALUE_DTYPES.index(self.dtype))
        return (*fixed, *numbers, *[0] * (WORDS - len(fixed) - len(numbers)))

    def decode(self, stored: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
        """Values of (n, …) codes or floats, float32 (n, m); m is rounded up to whole bytes.

        Args:
            scales: (n,), or None for floats.
        """
        if scales is None:
            return stored.to(torch.float32)
        return codec.unpack(stored, self.bits).flatten(1) * scales[:, None]

    def resized(self, rows: int, columns: int) -> tuple[int, ...]:
        """Shape of a slice with so many rows or columns: the parameter's own as far as it goes."""
        if len(self.shape) < 2:
            return (columns,)
        if columns == self.columns and self.shape[0] == self.rows:
            return (rows, *self.shape[1:])
        return self.shape if (rows, columns) == (self.rows, self.columns) else (rows, columns)

    def scale_tensors(self) -> dict[str, Declared]:
        """The scale of each row, where values are codes."""
        return {} if self.bits >= 16 else {"scales": Declared((self.rows,), torch.float32)}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        declared = self.declare().values()
        return sum(math.prod(one.shape) * one.dtype.itemsize for one in declared)


def layout_from_words(words: Sequence[int]) -> Layout | None:
    """The layout that :meth:`Layout.words` wrote; None where all are zero."""
    kind, rows, columns, bits, dtype, *numbers = words
    if not kind:
        return None
    return _kinds()[kind].from_numbers((rows, columns), bits, VALUE_DTYPES[dtype], tuple(numbers))


def _kinds() -> dict[int, type[Layout]]:
    return {layout.kind: layout for layout in Layout.__subclasses__()}


def picked(tensor: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Some rows of a tensor."""
    return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows)
