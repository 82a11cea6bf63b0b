"""The loops of `_rows.c`, where it was compiled: the same results, several times as fast.

Python threads fight over its lock when operations are short; these hold it not at all.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from dare_adapters.memory_block import MemoryBlock
from dare_adapters.shared_library import load_library

__all__ = [
    "DTYPES",
    "Where",
    "above",
    "abs_sum",
    "accumulate",
    "add",
    "add_at",
    "apply_rows",
    "available",
    "bernoulli_survivors",
    "between",
    "can_read",
    "can_use",
    "elect",
    "kept",
    "positions",
    "read_rows",
    "restore_rows",
    "survivors",
    "union",
    "values_above",
    "values_between",
]

# As `_floats.h` numbers them.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@lru_cache(maxsize=1)
def _library() -> Any:
    return load_library(__file__, "_rows", _declare)


def _declare(library: Any) -> None:
    word, size, place, number = ctypes.c_uint64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
    where = [word, word, size, size, size, size]
    library.dare_positions.argtypes = [*where, place, place]
    library.dare_survivors.argtypes = [
        *where, number, place, number, place, ctypes.c_float, place, place, place,
    ]  # fmt: skip
    library.dare_apply.argtypes = [
        *where, number, place, place, ctypes.c_float, number, place, size, *[place] * 4,
    ]  # fmt: skip
    library.dare_restore.argtypes = [*where, number, place, size, place, place]
    library.dare_read.argtypes = [*where, number, *[place] * 5]
    both = [number, place, number, place, size]
    library.dare_between.argtypes = [*both, ctypes.c_float, ctypes.c_float, place, place]
    library.dare_above.argtypes = [*both, ctypes.c_float, size, place, place]
    library.dare_abs_sum.argtypes = both
    library.dare_union.argtypes = [size, place, place, place, size, place, place, place]
    library.dare_elect.argtypes = [
        size, place, size, size, place, number, number, number, ctypes.c_float, place,
    ]  # fmt: skip
    library.dare_values_between.argtypes = [
        place, place, size, ctypes.c_float, ctypes.c_float, place, place,
    ]  # fmt: skip
    library.dare_values_above.argtypes = [place, place, size, ctypes.c_float, size, place, place]
    library.dare_kept.argtypes = [
        *where[:5], place, place, size, ctypes.c_float, place, place, place,
    ]  # fmt: skip
    for name in ("values_between", "values_above", "kept"):
        getattr(library, f"dare_{name}").restype = size
    library.dare_accumulate.argtypes = [place, place, place, ctypes.c_float, size]
    library.dare_add.argtypes = [number, place, place, size, place]
    library.dare_accumulate.restype = library.dare_add.restype = None
    library.dare_bernoulli.argtypes = [
        word, word, size, word, size, size, number, place, number, place, ctypes.c_float,
        place, place,
    ]  # fmt: skip
    library.dare_bernoulli.restype = size
    library.dare_add_at.argtypes = [number, place, place, place, size, place]
    for name in ("positions", "survivors", "apply", "restore"):
        getattr(library, f"dare_{name}").restype = None
    library.dare_read.restype = library.dare_add_at.restype = None
    library.dare_elect.restype = None
    library.dare_abs_sum.restype = ctypes.c_double
    for name in ("between", "above", "union"):
        getattr(library, f"dare_{name}").restype = size


def available() -> bool:
    """Whether the compiled loops are there."""
    return _library() is not None


Where = tuple[int, int, int, int]
"""Seed, key, columns and block of a blocked support."""


def positions(where: Where, slots: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`Slots.index` (n, slots) and which rows use their last slot, bool (n,)."""
    index = torch.empty(stop - start, slots, dtype=torch.int64)
    valid = torch.empty(stop - start, dtype=torch.bool)
    _library().dare_positions(*where, start, stop, index.data_ptr(), valid.data_ptr())
    return index, valid


def survivors(
    where: Where,
    slots: int,
    base: torch.Tensor,
    finetuned: torch.Tensor,
    factor: float,
    start: int,
    stop: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`positions`, and `factor` times fine-tune minus base there, float32 (n, slots).

    Args:
        base, finetuned: flat and contiguous, of dtypes that :func:`can_use` knows.
    """
    index = torch.empty(stop - start, slots, dtype=torch.int64)
    valid = torch.empty(stop - start, dtype=torch.bool)
    values = torch.empty(stop - start, slots)
    _library().dare_survivors(
        *where, start, stop, DTYPES[base.dtype], base.data_ptr(), DTYPES[finetuned.dtype],
        finetuned.data_ptr(), factor, index.data_ptr(), valid.data_ptr(), values.data_ptr(),
    )  # fmt: skip
    return index, valid, values


def apply_rows(
    where: Where,
    bits: int,
    packed: torch.Tensor,
    scales: torch.Tensor,
    weight: float,
    target: torch.Tensor,
    row_stride: int,
    slots: int,
    start: int,
    stop: int,
    memory: MemoryBlock | None = None,
) -> torch.Tensor:
    """Add a delta to rows of `target` (flat, from the parameter's first entry), in place.

    Returns:
        What was there, (n * slots,), in `memory`.
    """
    count = (stop - start) * slots
    if memory is None:
        originals = torch.empty(count, dtype=target.dtype)
    else:
        originals = memory.take(count, target.dtype)
    room = torch.empty(slots, dtype=torch.int64)
    change, sums = torch.empty(2, slots + 8).unbind()
    _library().dare_apply(
        *where, start, stop, bits, packed.data_ptr(), scales.data_ptr(), weight,
        DTYPES[target.dtype], target.data_ptr(), row_stride, originals.data_ptr(),
        room.data_ptr(), change.data_ptr(), sums.data_ptr(),
    )  # fmt: skip
    return originals


def restore_rows(
    where: Where,
    target: torch.Tensor,
    row_stride: int,
    originals: torch.Tensor,
    slots: int,
    start: int,
    stop: int,
) -> None:
    """Put back what :func:`apply_rows` returned."""
    room = torch.empty(slots, dtype=torch.int64)
    _library().dare_restore(
        *where, start, stop, target.element_size(), target.data_ptr(), row_stride,
        originals.data_ptr(), room.data_ptr(),
    )  # fmt: skip


def read_rows(
    where: Where,
    bits: int,
    packed: torch.Tensor,
    scales: torch.Tensor,
    slots: int,
    start: int,
    stop: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `SparseDelta.read` returns, of packed codes at the survivors of a blocked support."""
    index = torch.empty((stop - start) * slots, dtype=torch.int64)
    values = torch.empty((stop - start) * slots)
    room = torch.empty(slots + 8)
    _library().dare_read(
        *where, start, stop, bits, packed.data_ptr(), scales.data_ptr(), index.data_ptr(),
        values.data_ptr(), room.data_ptr(),
    )  # fmt: skip
    return index, values


def between(
    base: torch.Tensor, finetuned: torch.Tensor, low: float, high: float
) -> tuple[int, torch.Tensor]:
    """How many |fine-tune - base| are above `high`, and those from `low` to `high`.

    Args:
        base, finetuned: as for :func:`survivors`.
    """
    inside, found = torch.empty(len(base) + 1), ctypes.c_int64()
    above = _library().dare_between(
        *_pair(base, finetuned), low, high, inside.data_ptr(), ctypes.addressof(found)
    )
    return int(above), inside[: found.value].clone()


def above(
    base: torch.Tensor, finetuned: torch.Tensor, value: float, last: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and values of fine-tune minus base where their magnitude is above `value`.

    Args:
        base, finetuned: as for :func:`survivors`.
        value: a magnitude.
        last: up to this position magnitudes equal to it are taken too.
    """
    index = torch.empty(len(base) + 1, dtype=torch.int64)
    values = torch.empty(len(base) + 1)
    count = _library().dare_above(
        *_pair(base, finetuned), value, last, index.data_ptr(), values.data_ptr()
    )
    return index[:count], values[:count]


def values_between(
    index: torch.Tensor | None, values: torch.Tensor, low: float, high: float
) -> tuple[int, torch.Tensor]:
    """:func:`between` of entries that were read; one that comes twice counts once."""
    inside, found = torch.empty(len(values) + 1), ctypes.c_int64()
    above = _library().dare_values_between(
        None if index is None else index.data_ptr(), values.data_ptr(), len(values), low, high,
        inside.data_ptr(), ctypes.addressof(found),
    )  # fmt: skip
    return int(above), inside[: found.value].clone()


def values_above(
    index: torch.Tensor | None, values: torch.Tensor, value: float, last: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`above` of entries that were read."""
    places = torch.empty(len(values) + 1, dtype=torch.int64)
    kept = torch.empty(len(values) + 1)
    count = _library().dare_values_above(
        None if index is None else index.data_ptr(), values.data_ptr(), len(values), value, last,
        places.data_ptr(), kept.data_ptr(),
    )  # fmt: skip
    return places[:count], kept[:count]


def kept(
    where: Where,
    slots: int,
    start: int,
    index: torch.Tensor,
    values: torch.Tensor,
    factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of entries at ascending positions those that a blocked support keeps, times `factor`."""
    room = torch.empty(slots, dtype=torch.int64)
    places = torch.empty(len(values) + 1, dtype=torch.int64)
    found = torch.empty(len(values) + 1)
    count = _library().dare_kept(
        *where, start, index.data_ptr(), values.data_ptr(), len(values), factor, room.data_ptr(),
        places.data_ptr(), found.data_ptr(),
    )  # fmt: skip
    return places[:count], found[:count]


def abs_sum(base: torch.Tensor, finetuned: torch.Tensor) -> float:
    """The sum of |fine-tune - base|."""
    return float(_library().dare_abs_sum(*_pair(base, finetuned)))


def union(
    index: Sequence[torch.Tensor], values: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ascending positions with values, made one list of positions and a row of values for each.

    Args:
        index: int64, one for each.
        values: float32, likewise; all contiguous.
    """
    count, room = len(index), sum(len(own) for own in index)
    positions = torch.empty(room, dtype=torch.int64)
    aligned = torch.empty(count, room)
    pointers, sizes = ctypes.c_void_p * count, ctypes.c_int64 * count
    made = _library().dare_union(
        count, pointers(*(own.data_ptr() for own in index)),
        pointers(*(own.data_ptr() for own in values)), sizes(*map(len, index)), room,
        sizes(), positions.data_ptr(), aligned.data_ptr(),
    )  # fmt: skip
    return positions[:made], aligned[:, :made]


def add_at(
    target: torch.Tensor, index: torch.Tensor, change: torch.Tensor, keep: bool
) -> torch.Tensor | None:
    """Add to some entries of `target` (flat), in place; what was there, if it is to be kept."""
    originals = torch.empty(len(index), dtype=target.dtype) if keep else None
    _library().dare_add_at(
        DTYPES[target.dtype], target.data_ptr(), index.data_ptr(), change.data_ptr(), len(index),
        None if originals is None else originals.data_ptr(),
    )  # fmt: skip
    return originals


def accumulate(
    dense: torch.Tensor, index: torch.Tensor, values: torch.Tensor, weight: float
) -> None:
    """dense[index] += values * weight, float32; a repeated position counts once."""
    _library().dare_accumulate(
        dense.data_ptr(), index.data_ptr(), values.data_ptr(), weight, len(index)
    )


def add(base: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """base + change (float32) in float32, rounded once to the dtype of `base` (flat)."""
    total = torch.empty_like(base)
    _library().dare_add(
        DTYPES[base.dtype], base.data_ptr(), change.data_ptr(), len(base), total.data_ptr()
    )
    return total


def bernoulli_survivors(
    seed: int,
    key: int,
    columns: int,
    threshold: int,
    base: torch.Tensor,
    finetuned: torch.Tensor,
    factor: float,
    start: int,
    stop: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of a Bernoulli support and `factor` times fine-tune minus base there.

    Args:
        base, finetuned: as for :func:`survivors`.
    """
    room = (stop - start) * columns + 1
    index, values = torch.empty(room, dtype=torch.int64), torch.empty(room)
    count = _library().dare_bernoulli(
        seed, key, columns, threshold, start, stop, DTYPES[base.dtype], base.data_ptr(),
        DTYPES[finetuned.dtype], finetuned.data_ptr(), factor, index.data_ptr(),
        values.data_ptr(),
    )  # fmt: skip
    return index[:count], values[:count]


def elect(
    values: torch.Tensor,
    weights: torch.Tensor,
    frequency: bool,
    weighted: bool,
    divisor: int,
    factor: float,
) -> torch.Tensor:
    """The disjoint merge of `combine.consensus`.

    Args:
        values: float32 (k, m), rows contiguous.
        weights: float32 (k,).
        divisor: 0 count, 1 weights, 2 none.
    """
    merged = torch.empty(values.shape[1])
    _library().dare_elect(
        len(values), values.data_ptr(), values.stride(0), values.shape[1], weights.data_ptr(),
        frequency, weighted, divisor, factor, merged.data_ptr(),
    )  # fmt: skip
    return merged


def _pair(base: torch.Tensor, finetuned: torch.Tensor) -> tuple[int, int, int, int, int]:
    return (
        DTYPES[base.dtype],
        base.data_ptr(),
        DTYPES[finetuned.dtype],
        finetuned.data_ptr(),
        len(base),
    )


def can_use(tensor: torch.Tensor) -> bool:
    """Whether the loops know the dtype and reach the memory of a tensor."""
    return available() and tensor.device.type == "cpu" and tensor.dtype in DTYPES


def can_read(packed: torch.Tensor) -> bool:
    """Whether they reach packed codes."""
    return available() and packed.device.type == "cpu" and packed.dtype == torch.uint8
