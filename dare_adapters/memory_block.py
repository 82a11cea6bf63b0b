"""CPU memory in one piece, of large pages where the kernel has them, given out in parts."""

from __future__ import annotations

import threading

import torch

from dare_adapters.memory_advice import LARGE_PAGES, advise

__all__ = ["MemoryBlock"]

_LARGE_PAGE = 1 << 21
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
        advise(
            self._bytes.data_ptr() + self._used,
            (self._bytes.numel() - self._used) // _LARGE_PAGE * _LARGE_PAGE,
            LARGE_PAGES,
        )

    def take(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor (count,) of the block; where that is full, one of its own."""
        nbytes = count * dtype.itemsize
        with self._lock:
            first = self._used
            if not nbytes or first + nbytes > self._bytes.numel():
                return torch.empty(count, dtype=dtype)
            self._used = -(-(first + nbytes) // _ALIGNMENT) * _ALIGNMENT
        return self._bytes[first : first + nbytes].view(dtype)
