"""The loops of combining alone, where they were compiled (see `setup.py`).

Each gives what the Python beside its caller gives, bit for bit, and holds no lock meanwhile.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch

from dare_adapters import compiled
from dare_adapters.compiled import Where
from dare_adapters.shared_library import load_library

__all__ = [
    "add_to",
    "available",
    "can_fill",
    "gather",
    "keep_codes",
    "keep_differences",
    "magprune",
    "untouched",
]


@lru_cache(maxsize=1)
def _library() -> Any:
    return load_library(__file__, "_loops", _declare)


def _declare(library: Any) -> None:
    word, size, place = ctypes.c_uint64, ctypes.c_int64, ctypes.c_void_p
    library.dare_magprune.argtypes = [
        word, word, size, size, size, place, place, size, *[place] * 11,
    ]  # fmt: skip
    library.dare_magprune.restype = size
    library.dare_gather.argtypes = [place, place, size, size, ctypes.c_int, place, place]
    library.dare_gather.restype = ctypes.c_double
    number, factor = ctypes.c_int, ctypes.c_float
    where = [word, word, size, size, size, size]
    library.dare_keep_differences.argtypes = [
        *where, number, place, number, place, factor, number, *[place] * 4,
    ]  # fmt: skip
    library.dare_keep_codes.argtypes = [
        *where, number, place, place, word, word, size, factor, number, *[place] * 6,
    ]  # fmt: skip
    library.dare_keep_differences.restype = library.dare_keep_codes.restype = size
    library.dare_add_to.argtypes = [
        place, place, ctypes.c_int, place, size, size, ctypes.c_float, ctypes.c_float,
    ]  # fmt: skip
    library.dare_add_to.restype = None
    library.dare_untouched.argtypes = [size, place, size, size, place]
    library.dare_untouched.restype = None


def available() -> bool:
    """Whether the compiled loops are there."""
    return _library() is not None


def magprune(
    seed: int,
    key: int,
    columns: int,
    start: int,
    stop: int,
    index: torch.Tensor | None,
    values: torch.Tensor,
    limits: torch.Tensor,
    probabilities: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries whose random bits are below the limit of their rank in their row.

    Args:
        seed, key: of the random bits, those of `RandomMasks.lanes`.
        index, values: rows start … stop - 1, as `Delta.read` returns them.
        limits: int64 (columns,), by rank, ascending.
        probabilities: float32 (columns,), by rank: survivors are divided by them.
    """
    if not len(values):  # without an address, as no index
        return torch.empty(0, dtype=torch.int64), torch.empty(0)
    places = torch.empty(len(values) + 1, dtype=torch.int64)
    kept = torch.empty(len(values) + 1)
    ranked, spare = torch.empty(2, columns, dtype=torch.int64).unbind()
    lanes = torch.empty(-(-columns // 8) * 8, dtype=torch.int32)
    heads = torch.empty(columns + 2 * (_MOST_BUCKETS + 2), dtype=torch.int32)
    rank = torch.empty(columns, dtype=torch.int32)
    column, own = torch.empty(columns, dtype=torch.int64), torch.empty(columns)
    count = _library().dare_magprune(
        seed, key, columns, start, stop, None if index is None else index.data_ptr(),
        values.data_ptr(), len(values), limits.data_ptr(),
        None if probabilities is None else probabilities.data_ptr(), ranked.data_ptr(),
        spare.data_ptr(), lanes.data_ptr(), heads.data_ptr(), rank.data_ptr(), column.data_ptr(),
        own.data_ptr(), places.data_ptr(), kept.data_ptr(),
    )  # fmt: skip
    return places[:count], kept[:count]


def gather(
    index: torch.Tensor | None,
    values: torch.Tensor,
    offset: int,
    places: torch.Tensor,
    kept: torch.Tensor,
) -> float:
    """Positions `offset` further on to `places`, values to `kept`.

    Args:
        index, values: as `Delta.read` returns them.
        places: int32 or int64, of their length; `kept` float32.

    Returns:
        Σ|values|, of which one that comes twice counts once.
    """
    total = _library().dare_gather(
        None if index is None else index.data_ptr(), values.data_ptr(), len(values), offset,
        places.dtype == torch.int64, places.data_ptr(), kept.data_ptr(),
    )  # fmt: skip
    return float(total)


def keep_differences(
    where: Where,
    base: torch.Tensor,
    finetuned: torch.Tensor,
    factor: float,
    rows: tuple[int, int],
    places: torch.Tensor,
    values: torch.Tensor,
) -> tuple[int, float, float]:
    """What a blocked support keeps of some rows of fine-tune minus base, times `factor`.

    Args:
        base, finetuned: flat and contiguous, of dtypes that `compiled.can_use` knows.
        rows: the first, and the one after the last.
        places: int32 or int64, room for every slot: flat positions in the parameter.
        values: float32, room for as many.

    Returns:
        How many they are, the sum of their magnitudes, and that of all differences' magnitudes.
    """
    column, sums = torch.empty(-(-where[2] // where[3]), dtype=torch.int64), (ctypes.c_double * 2)()
    count = _library().dare_keep_differences(
        *where, *rows, compiled.DTYPES[base.dtype], base.data_ptr(),
        compiled.DTYPES[finetuned.dtype], finetuned.data_ptr(), factor,
        places.dtype == torch.int64, places.data_ptr(), values.data_ptr(),
        ctypes.addressof(sums), column.data_ptr(),
    )  # fmt: skip
    return int(count), sums[0], sums[1]


def keep_codes(
    where: Where,
    bits: int,
    packed: torch.Tensor,
    scales: torch.Tensor,
    other: Where,
    factor: float,
    rows: tuple[int, int],
    places: torch.Tensor,
    values: torch.Tensor,
) -> tuple[int, float]:
    """What a blocked support keeps of some rows of packed survivors of another, times `factor`.

    Args:
        places, values: as :func:`keep_differences`, room for one more.

    Returns:
        How many they are, and the sum of their magnitudes.
    """
    columns, block = where[2], where[3]
    slots, others = -(-columns // block), -(-columns // other[3])
    column = torch.empty(slots + others, dtype=torch.int64)
    change, total = torch.empty(slots + 8), ctypes.c_double()
    count = _library().dare_keep_codes(
        *where, *rows, bits, packed.data_ptr(), scales.data_ptr(), other[0], other[1], other[3],
        factor, places.dtype == torch.int64, places.data_ptr(), values.data_ptr(),
        ctypes.addressof(total), column.data_ptr(), column[slots:].data_ptr(), change.data_ptr(),
    )  # fmt: skip
    return int(count), total.value


def can_fill(out: torch.Tensor) -> bool:
    """Whether :func:`add_to` reaches the memory of a tensor."""
    return available() and compiled.can_use(out) and out.is_contiguous()


def add_to(
    total: torch.Tensor,
    places: torch.Tensor,
    values: torch.Tensor,
    offset: int,
    factor: float,
    weight: float,
) -> None:
    """total[places - offset] += values * factor * weight; a repeated position counts once.

    Args:
        total: float32, contiguous.
        places: int32 or int64, ascending.
    """
    _library().dare_add_to(
        total.data_ptr(), places.data_ptr(), places.dtype == torch.int64, values.data_ptr(),
        len(values), offset, factor, weight,
    )  # fmt: skip


def untouched(values: torch.Tensor) -> torch.Tensor:
    """The sign bit where every value is -0, else 0, int32 (m,).

    Args:
        values: float32 (k, m), rows contiguous.
    """
    signs = torch.empty(values.shape[1], dtype=torch.int32)
    _library().dare_untouched(
        len(values), values.data_ptr(), values.stride(0), values.shape[1], signs.data_ptr()
    )
    return signs


# As `_magprune.c` has it.
_MOST_BUCKETS = 4096
