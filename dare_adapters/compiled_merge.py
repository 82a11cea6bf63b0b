"""The loop of `_merge.c`, where it was compiled: what deltas keep, added to rows of a base.

The same results as the Python beside its callers, and no lock meanwhile.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from dare_adapters import compiled
from dare_adapters.shared_library import load_library

__all__ = ["Election", "KeptRows", "can_merge", "merge_rows"]

# As `_strip.h` has it.
_STRIP = 1024


@dataclass(frozen=True)
class KeptRows:
    """What a delta keeps of a range of rows.

    Attributes:
        places: int32 or int64 (m,), flat positions in the parameter, ascending; one that comes
            twice, one after the other, counts once.
        values: float32 (m,).
        factor: of all values.
    """

    places: torch.Tensor
    values: torch.Tensor
    factor: float


@dataclass(frozen=True)
class Election:
    """A disjoint merge, as `combine.consensus` describes it.

    Attributes:
        weights: float32 (k,).
        divisor: 0 count, 1 weights, 2 none.
        factor: of the result.
    """

    weights: torch.Tensor
    frequency: bool
    weighted: bool
    divisor: int
    factor: float


class _KeptRows(ctypes.Structure):
    _fields_ = (
        ("places", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("factor", ctypes.c_float),
        ("weight", ctypes.c_float),
    )


@lru_cache(maxsize=1)
def _library() -> Any:
    return load_library(__file__, "_rows", _declare)


def _declare(library: Any) -> None:
    size, place, number = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
    library.dare_merge_rows.argtypes = [
        size, place, number, size, number, place, number, number, number, ctypes.c_float,
        number, place, size, place, place, place,
    ]  # fmt: skip
    library.dare_merge_rows.restype = None


def can_merge(base: torch.Tensor) -> bool:
    """Whether the loop knows the dtype and reaches the memory of a base."""
    return _library() is not None and compiled.can_use(base) and base.is_contiguous()


def merge_rows(
    base: torch.Tensor,
    kept: Sequence[KeptRows],
    weights: Sequence[float],
    offset: int,
    election: Election | None = None,
) -> torch.Tensor:
    """base + Σ weight * factor * values, or + an election's merge of what is kept, rounded once.

    Args:
        base: flat, of which :func:`can_merge` is true.
        kept: of one or more deltas, positions all int32 or all int64.
        weights: of the sum; an election has its own.
        offset: flat position in the parameter of the base's first entry.
    """
    lists = len(kept)
    rows = (_KeptRows * lists)(
        *(
            _KeptRows(
                one.places.data_ptr(), one.values.data_ptr(), len(one.values), one.factor, weight
            )
            for one, weight in zip(kept, weights, strict=True)
        )
    )
    how = election or Election(torch.empty(0), False, False, 0, 1.0)
    room, cursor = torch.empty((2 * lists + 2) * _STRIP), torch.empty(lists, dtype=torch.int64)
    made = torch.empty_like(base)
    _library().dare_merge_rows(
        lists, ctypes.addressof(rows), kept[0].places.dtype == torch.int64, offset,
        election is not None, how.weights.data_ptr(), how.frequency, how.weighted, how.divisor,
        how.factor, compiled.DTYPES[base.dtype], base.data_ptr(), len(base), room.data_ptr(),
        cursor.data_ptr(), made.data_ptr(),
    )  # fmt: skip
    return made
