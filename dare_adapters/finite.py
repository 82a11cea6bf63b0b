"""Whether all numbers of a tensor are finite."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from dare_adapters.shared_library import load_library

__all__ = ["first_non_finite"]

# Every IEEE format orders its bit patterns: from infinity upwards nothing is finite.
_INFINITY = {
    torch.float16: (np.int16, np.uint16, 0x7C00, 0xFC00),
    torch.bfloat16: (np.int16, np.uint16, 0x7F80, 0xFF80),
    torch.float32: (np.int32, np.uint32, 0x7F800000, 0xFF800000),
    torch.float64: (np.int64, np.uint64, 0x7FF0000000000000, 0xFFF0000000000000),
}


def first_non_finite(flat: torch.Tensor) -> int | None:
    """Position of the first NaN or infinity of a flat float tensor, or None."""
    if not flat.numel() or _all_finite(flat):
        return None
    strange = torch.nonzero(~torch.isfinite(flat))
    return int(strange[0]) if len(strange) else None


def _all_finite(flat: torch.Tensor) -> bool:
    if flat.device.type != "cpu" or flat.dtype not in _INFINITY:
        return bool(torch.isfinite(flat).all())
    signed, unsigned, positive, negative = _INFINITY[flat.dtype]
    size, library = flat.element_size(), _library()
    if library is not None and size in (2, 4) and flat.is_contiguous():
        check = getattr(library, f"dare_all_finite_{size}")
        return bool(check(flat.data_ptr(), flat.numel(), positive))
    bits = flat.detach().view(getattr(torch, signed.__name__)).numpy()
    return int(bits.max()) < positive and int(bits.view(unsigned).max()) < negative


@lru_cache(maxsize=1)
def _library() -> Any:
    return load_library(__file__, "_rows", _declare)


def _declare(library: Any) -> None:
    for size, field in ((2, ctypes.c_uint16), (4, ctypes.c_uint32)):
        function = getattr(library, f"dare_all_finite_{size}")
        function.argtypes = [ctypes.c_void_p, ctypes.c_int64, field]
        function.restype = ctypes.c_int
