"""Pages of a memory-mapped file that are not needed any more.

A checkpoint that is read through a mapping stays in the process's resident memory until somebody
says otherwise. The kernel keeps the file in its cache all the same.
"""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path

import torch

from dare_adapters.memory_advice import NOT_NEEDED, advise

__all__ = ["MappedFile"]


class MappedFile:
    """A file of which tensors are mapped, all by one mapping that they keep alive.

    The kernel's list of mappings has a thousand lines and takes long to read: where the mapping
    is, is looked up once. Whoever asks keeps a tensor of it for as long.

    Args:
        file: its path.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._start = self._stop = 0

    def release_pages(self, tensor: torch.Tensor) -> None:
        """Let go of the pages of a tensor; reading it brings them back.

        Does nothing where the tensor is not mapped from the file: memory of any other kind would
        lose its contents.
        """
        if not sys.platform.startswith("linux") or not tensor.numel():
            return
        page = mmap.PAGESIZE
        first = -(-tensor.data_ptr() // page) * page
        last = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // page * page
        if last <= first:
            return
        if not (self._start <= first and last <= self._stop):
            found = _mapping_around(first, last, self._file)
            if found is None:
                return
            self._start, self._stop = found
        advise(first, last - first, NOT_NEEDED)


def _mapping_around(first: int, last: int, file: Path) -> tuple[int, int] | None:
    """The mapping of the file that has the addresses first … last, if one has them all."""
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
            return (start, stop) if path == name else None
        found = text.find(name, line_end)
    return None
