"""The loops of `_rows.c`, where it was compiled: the same results, several times as fast.

Python threads fight over its lock when operations are short; these hold it not at all.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

__all__ = ["Where", "apply_rows", "available", "can_use", "positions", "restore_rows", "survivors"]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@lru_cache(maxsize=1)
def _library() -> Any:
    """The shared library, or None where there is none or DARE_ADAPTERS_COMPILED=0 forbids it."""
    if os.environ.get("DARE_ADAPTERS_COMPILED") == "0":
        return None
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        file = Path(__file__).with_name(f"_rows{suffix}")
        if file.is_file():
            try:
                library = ctypes.CDLL(str(file))
                return _declare(library)
            except (OSError, AttributeError):  # of another platform, or an older version
                return None
    return None


def _declare(library: Any) -> Any:
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
    for name in ("positions", "survivors", "apply", "restore"):
        getattr(library, f"dare_{name}").restype = None
    return library


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
        *where, start, stop, _DTYPES[base.dtype], base.data_ptr(), _DTYPES[finetuned.dtype],
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
) -> torch.Tensor:
    """Add a delta to rows of `target` (flat, from the parameter's first entry), in place.

    Returns:
        What was there, (n * slots,).
    """
    originals = torch.empty((stop - start) * slots, dtype=target.dtype)
    room = torch.empty(slots, dtype=torch.int64)
    change, sums = torch.empty(2, slots + 8).unbind()
    _library().dare_apply(
        *where, start, stop, bits, packed.data_ptr(), scales.data_ptr(), weight,
        _DTYPES[target.dtype], target.data_ptr(), row_stride, originals.data_ptr(),
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


def can_use(tensor: torch.Tensor) -> bool:
    """Whether the loops know the dtype and reach the memory of a tensor."""
    return available() and tensor.device.type == "cpu" and tensor.dtype in _DTYPES
