"""What the kernel is told of a range of memory (madvise), where it is Linux's."""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from typing import Any

__all__ = ["LARGE_PAGES", "NOT_NEEDED", "advise"]

NOT_NEEDED, LARGE_PAGES = 4, 14  # MADV_DONTNEED, MADV_HUGEPAGE


def advise(address: int, nbytes: int, advice: int) -> None:
    """Give the advice; a kernel that cannot follow it does nothing.

    Args:
        address: where the range begins, a page's beginning.
        nbytes: of the range.
        advice: one of those above.
    """
    if sys.platform.startswith("linux") and nbytes > 0:
        _libc().madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), ctypes.c_int(advice))


@lru_cache(maxsize=1)
def _libc() -> Any:
    return ctypes.CDLL(None)
