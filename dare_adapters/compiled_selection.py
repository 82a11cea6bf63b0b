"""The loops of `_selection.c`, where it was compiled: choosing among entries.

The same results as the Python beside their callers, and no lock meanwhile.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch

from dare_adapters.compiled import DTYPES, Where, can_use
from dare_adapters.shared_library import load_library

__all__ = [
    "available",
    "can_compare",
    "code_counts",
    "count",
    "difference",
    "equal",
    "read_kept",
    "trimmed",
    "values_equal",
]


@lru_cache(maxsize=1)
def _library() -> Any:
    return load_library(__file__, "_selection", _declare)


def _declare(library: Any) -> None:
    word, size, place, number = ctypes.c_uint64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
    both, blocked = [number, place, number, place, size], [word, word, size, size, size, size]
    library.dare_difference.argtypes = [*both, place]
    library.dare_trimmed.argtypes = [*both, ctypes.c_float, size, place]
    library.dare_count.argtypes = [*both, ctypes.c_float, place]
    library.dare_equal.argtypes = [*both, ctypes.c_float, size, place]
    library.dare_values_equal.argtypes = [place, place, size, ctypes.c_float, size, place]
    library.dare_code_counts.argtypes = [*blocked, number, place, place]
    library.dare_read_kept.argtypes = [
        *blocked, number, place, place, word, word, size, ctypes.c_float, *[place] * 5,
    ]  # fmt: skip
    for name in ("difference", "trimmed", "code_counts"):
        getattr(library, f"dare_{name}").restype = None
    for name in ("count", "equal", "values_equal", "read_kept"):
        getattr(library, f"dare_{name}").restype = size


def available() -> bool:
    """Whether the compiled loops are there."""
    return _library() is not None


def can_compare(base: torch.Tensor, finetuned: torch.Tensor) -> bool:
    """Whether the loops know the dtypes and reach the memory of both."""
    both = (base, finetuned)
    return available() and all(can_use(flat) and flat.is_contiguous() for flat in both)


def difference(base: torch.Tensor, finetuned: torch.Tensor) -> torch.Tensor:
    """Fine-tune minus base, float32.

    Args:
        base, finetuned: flat, of which :func:`can_compare` is true; here and below.
    """
    delta = torch.empty(len(base))
    _library().dare_difference(*_pair(base, finetuned), delta.data_ptr())
    return delta


def trimmed(
    base: torch.Tensor, finetuned: torch.Tensor, value: float, last: int, out: torch.Tensor
) -> None:
    """The differences above `value` in magnitude where they are, -0 elsewhere.

    Args:
        last: up to this position magnitudes equal to it are taken too.
        out: float32 (n,), contiguous.
    """
    _library().dare_trimmed(*_pair(base, finetuned), value, last, out.data_ptr())


def count(base: torch.Tensor, finetuned: torch.Tensor, value: float) -> tuple[int, int]:
    """How many magnitudes are above a value, and how many equal it."""
    same = ctypes.c_int64()
    above = _library().dare_count(*_pair(base, finetuned), value, ctypes.addressof(same))
    return int(above), same.value


def equal(
    base: torch.Tensor, finetuned: torch.Tensor, value: float, wanted: int
) -> tuple[int, int | None]:
    """How many magnitudes are `value`, up to `wanted`, and where the last wanted one is."""
    place = ctypes.c_int64(-1)
    seen = _library().dare_equal(*_pair(base, finetuned), value, wanted, ctypes.addressof(place))
    return int(seen), None if place.value < 0 else place.value


def values_equal(
    index: torch.Tensor | None, values: torch.Tensor, value: float, wanted: int
) -> tuple[int, int | None]:
    """:func:`equal` of entries that were read; one that comes twice counts once."""
    place = ctypes.c_int64(-1)
    seen = _library().dare_values_equal(
        None if index is None else index.data_ptr(), values.data_ptr(), len(values), value,
        wanted, ctypes.addressof(place),
    )  # fmt: skip
    return int(seen), None if place.value < 0 else place.value


def code_counts(
    where: Where, bits: int, packed: torch.Tensor, start: int, stop: int
) -> torch.Tensor:
    """How often each |code| occurs in each row, int32 (n, 2^(bits-1) + 1)."""
    counts = torch.empty(stop - start, (1 << (bits - 1)) + 1, dtype=torch.int32)
    _library().dare_code_counts(*where, start, stop, bits, packed.data_ptr(), counts.data_ptr())
    return counts


def read_kept(
    where: Where,
    bits: int,
    packed: torch.Tensor,
    scales: torch.Tensor,
    other: Where,
    factor: float,
    start: int,
    stop: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of packed survivors of one blocked support those that another keeps, times `factor`."""
    columns, block = where[2], where[3]
    slots, others = -(-columns // block), -(-columns // other[3])
    room = (stop - start) * min(slots, others) + 1
    index, values = torch.empty(room, dtype=torch.int64), torch.empty(room)
    column = torch.empty(slots + others, dtype=torch.int64)
    change = torch.empty(slots + 8)
    count = _library().dare_read_kept(
        *where, start, stop, bits, packed.data_ptr(), scales.data_ptr(), other[0], other[1],
        other[3], factor, column.data_ptr(), column[slots:].data_ptr(), change.data_ptr(),
        index.data_ptr(), values.data_ptr(),
    )  # fmt: skip
    return index[:count], values[:count]


def _pair(base: torch.Tensor, finetuned: torch.Tensor) -> tuple[int, int, int, int, int]:
    return (
        DTYPES[base.dtype],
        base.data_ptr(),
        DTYPES[finetuned.dtype],
        finetuned.data_ptr(),
        len(base),
    )
