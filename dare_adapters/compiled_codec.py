"""The loops of `_quantise.c`, where it was compiled: rows to codes and scales, bit for bit as
:mod:`dare_adapters.codec` makes them."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch

from dare_adapters.compiled import DTYPES, Where
from dare_adapters.shared_library import load_library

__all__ = ["available", "encode", "quantise"]


def available() -> bool:
    """Whether the compiled loops are there."""
    return _library() is not None


def quantise(
    values: torch.Tensor, used: torch.Tensor | None, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes int8 (n, K), scales, Σv² and rounding error, float32 (n,) each.

    Args:
        values: float32 (n, K), contiguous, on the CPU.
        used: int64 (n,), or None where every slot counts.
        bits: 8, 4, 2 or 1.

    Raises:
        MemoryError: no room for a row.
    """
    codes = torch.empty(values.shape, dtype=torch.int8)
    scales, signal, rounding = torch.empty(3, len(values)).unbind()
    failed = _library().dare_quantise(
        values.data_ptr(), *values.shape, None if used is None else used.data_ptr(), bits,
        codes.data_ptr(), scales.data_ptr(), signal.data_ptr(), rounding.data_ptr(),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"no room for a row of {values.shape[1]} numbers")
    return codes, scales, signal, rounding


def encode(
    where: Where,
    row_bytes: int,
    base: torch.Tensor,
    finetuned: torch.Tensor,
    factor: float,
    bits: int,
    start: int,
    stop: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int] | None:
    """The survivors of a blocked support, quantised, if all entries of these rows are finite.

    Returns:
        Packed codes, uint8 (n, row_bytes); scales, Σv² and rounding error, float32 (n,); how many
        survivors there are. None where an entry is not finite.

    Args:
        base, finetuned: flat and contiguous, of dtypes that `compiled.can_use` knows.

    Raises:
        MemoryError: no room for a row.
    """
    packed = torch.empty(stop - start, row_bytes, dtype=torch.uint8)
    scales, signal, rounding = torch.empty(3, stop - start).unbind()
    used = ctypes.c_int64()
    outcome = _library().dare_encode(
        *where, start, stop, DTYPES[base.dtype], base.data_ptr(), DTYPES[finetuned.dtype],
        finetuned.data_ptr(), factor, bits, packed.data_ptr(), scales.data_ptr(),
        signal.data_ptr(), rounding.data_ptr(), ctypes.addressof(used),
    )  # fmt: skip
    if outcome < 0:
        raise MemoryError(f"no room for a row of {where[2]} numbers")
    return None if outcome else (packed, scales, signal, rounding, used.value)


@lru_cache(maxsize=1)
def _library() -> Any:
    return load_library(__file__, "_rows", _declare)


def _declare(library: Any) -> None:
    word, size, place, number = ctypes.c_uint64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
    library.dare_quantise.argtypes = [place, size, size, place, number, *[place] * 4]
    library.dare_encode.argtypes = [
        word, word, size, size, size, size, number, place, number, place, ctypes.c_float, number,
        *[place] * 5,
    ]  # fmt: skip
    for name in ("quantise", "encode"):
        getattr(library, f"dare_{name}").restype = number
