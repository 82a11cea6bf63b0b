"""Pages of a memory-mapped file that are not needed any more.

A checkpoint that is read through a mapping stays in the process's resident memory until somebody
says otherwise. The kernel keeps the file in its cache all the same.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

__all__ = ["release_pages"]

_DONTNEED = 4


def release_pages(tensor: torch.Tensor, file: Path) -> None:
    """Let go of the pages of a tensor that is mapped from `file`; reading it brings them back.

    Does nothing where the tensor is not mapped from that file: memory of any other kind would
    lose its contents.
    """
    if not sys.platform.startswith("linux") or not tensor.numel():
        return
    page = mmap.PAGESIZE
    first = -(-tensor.data_ptr() // page) * page
    last = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // page * page
    if last > first and _is_mapped_from(first, last, file):
        _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _DONTNEED)


def _is_mapped_from(first: int, last: int, file: Path) -> bool:
    """Whether addresses first … last are one mapping of the file, unwritten."""
    name = os.fsencode(os.path.realpath(file))
    with open("/proc/self/maps", "rb") as maps:
        text = maps.read()
    found = text.find(name)
    while found >= 0:  # only lines that hold the name: a process has a thousand others
        line_start = text.rfind(b"\n", 0, found) + 1
        line_end = text.find(b"\n", found)
        place, _, _, _, _, path = text[line_start:line_end].split(maxsplit=5)
        start, stop = (int(part, 16) for part in place.split(b"-"))
        if start <= first and last <= stop:
            return path == name
        found = text.find(name, line_end)
    return False


@lru_cache(maxsize=1)
def _libc() -> Any:
    return ctypes.CDLL(None)
