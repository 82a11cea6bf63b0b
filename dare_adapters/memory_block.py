"""CPU memory in one piece, of large pages where the kernel has them, given out in parts."""

from __future__ import annotations

import ctypes
import sys
import threading
from functools import lru_cache
from typing import Any

import torch

__all__ = ["MemoryBlock"]

_LARGE_PAGE = 1 << 21
_HUGEPAGE = 14  # MADV_HUGEPAGE
_ALIGNMENT = 64


class MemoryBlock:
    """Room for many tensors that live and die together.

    The kernel hands out memory a page at a time, when it is first written; with small pages that
    takes longer than much of what is written. Nothing is taken before it is used, so a block may
    be larger than what comes. The parts keep it alive.

    Args:
        nbytes: of all parts together.
    """

    def __init__(self, nbytes: int) -> None:
        self._lock = threading.Lock()
        self._used = 0
        if nbytes < _LARGE_PAGE:  # the allocator has that at hand
            self._bytes = torch.empty(0, dtype=torch.uint8)
            return
        self._bytes = torch.empty(nbytes + _LARGE_PAGE, dtype=torch.uint8)
        self._used = -self._bytes.data_ptr() % _LARGE_PAGE
        _ask_for_large_pages(self._bytes[self._used :])

    def take(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor (count,) of the block; where that is full, one of its own."""
        nbytes = count * dtype.itemsize
        with self._lock:
            first = self._used
            if not nbytes or first + nbytes > self._bytes.numel():
                return torch.empty(count, dtype=dtype)
            self._used = -(-(first + nbytes) // _ALIGNMENT) * _ALIGNMENT
        return self._bytes[first : first + nbytes].view(dtype)


def _ask_for_large_pages(memory: torch.Tensor) -> None:
    """Of whole ones only; a kernel that has none says so, and small ones come as ever."""
    size = memory.numel() // _LARGE_PAGE * _LARGE_PAGE
    if sys.platform.startswith("linux") and size:
        _libc().madvise(
            ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(size), ctypes.c_int(_HUGEPAGE)
        )


@lru_cache(maxsize=1)
def _libc() -> Any:
    return ctypes.CDLL(None)
