"""A safetensors file written a tensor at a time, without holding the tensors in memory.

The format wants every tensor aligned to its element size and no holes, so tensors are spooled by
element size and joined, largest elements first, when the last one has come.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import BinaryIO

import torch

from dare_adapters.checkpoint import DTYPES

__all__ = ["DTYPE_NAMES", "TensorFileWriter", "file_sha256"]

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CHUNK = 1 << 22
_HASHED = 1 << 18


class TensorFileWriter:
    """Collects tensors and writes `path` on :meth:`finish`; nothing is there before.

    Args:
        path: of the file to write; spools lie beside it meanwhile.
        metadata: for the header's `__metadata__`.
    """

    def __init__(self, path: Path, metadata: dict[str, str]) -> None:
        self._path, self._metadata = path, metadata
        self._spools: dict[int, BinaryIO] = {}
        self._placed: dict[int, list[tuple[str, str, list[int], int]]] = {}

    def add(self, key: str, tensor: torch.Tensor) -> None:
        """Append a CPU tensor."""
        size = tensor.element_size()
        if size not in self._spools:
            self._spools[size] = self._path.with_name(f"{self._path.name}.spool{size}").open("w+b")
            self._placed[size] = []
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        self._spools[size].write(data.data)
        entry = (key, DTYPE_NAMES[tensor.dtype], list(tensor.shape), data.nbytes)
        self._placed[size].append(entry)

    def finish(self) -> str:
        """Write the file; its SHA-256 in hex."""
        header: dict[str, object] = {"__metadata__": self._metadata}
        offset = 0
        order = sorted(self._spools, reverse=True)
        for size in order:
            for key, dtype, shape, nbytes in self._placed[size]:
                offsets = [offset, offset + nbytes]
                header[key] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
                offset += nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        digest = hashlib.sha256()
        with self._path.open("xb") as file:
            for piece in (len(text).to_bytes(8, "little"), text):
                digest.update(piece)
                file.write(piece)
            for size in order:
                spool = self._spools[size]
                spool.seek(0)
                while chunk := spool.read(_CHUNK):
                    digest.update(chunk)
                    file.write(chunk)
        self.close()
        return digest.hexdigest()

    def close(self) -> None:
        """Remove the spools."""
        for spool in self._spools.values():
            spool.close()
            Path(spool.name).unlink(missing_ok=True)
        self._spools = {}


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    room = memoryview(bytearray(_HASHED))  # reused: fresh memory costs as much as the hashing
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(room):
            digest.update(room[:count])
    return digest.hexdigest()
