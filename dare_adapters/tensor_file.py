"""A safetensors file written a tensor at a time, without holding the tensors in memory.

The format wants every tensor aligned to its element size and no holes, so tensors are spooled by
dtype and joined when the last one has come, in the order of the safetensors library: largest
elements first, then by name. Whoever reads the tensors and writes them again gets the same bytes.
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
# As the safetensors library has them, from last to first.
_ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "I8", "U8", "BOOL")
_CHUNK = 1 << 22


class TensorFileWriter:
    """Collects tensors and writes `path` on :meth:`finish`; nothing is there before.

    Args:
        path: of the file to write; spools lie beside it meanwhile.
        metadata: for the header's `__metadata__`.
    """

    def __init__(self, path: Path, metadata: dict[str, str]) -> None:
        self._path, self._metadata = path, metadata
        self._spools: dict[str, BinaryIO] = {}
        self._placed: dict[str, list[tuple[str, list[int], int, int]]] = {}

    def add(self, key: str, tensor: torch.Tensor) -> None:
        """Append a CPU tensor."""
        dtype = DTYPE_NAMES[tensor.dtype]
        if dtype not in self._spools:
            self._spools[dtype] = self._path.with_name(f"{self._path.name}.spool{dtype}").open(
                "w+b"
            )
            self._placed[dtype] = []
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        spool = self._spools[dtype]
        self._placed[dtype].append((key, list(tensor.shape), spool.tell(), data.nbytes))
        spool.write(data.data)

    def finish(self) -> str:
        """Write the file; its SHA-256 in hex."""
        header: dict[str, object] = {"__metadata__": self._metadata}
        offset = 0
        order = [dtype for dtype in _ORDER if dtype in self._spools]
        for dtype in order:
            self._placed[dtype].sort()
            for key, shape, _, nbytes in self._placed[dtype]:
                offsets = [offset, offset + nbytes]
                header[key] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
                offset += nbytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        digest = hashlib.sha256()
        with self._path.open("xb") as file:
            for piece in (len(text).to_bytes(8, "little"), text):
                digest.update(piece)
                file.write(piece)
            for dtype in order:
                spool = self._spools[dtype]
                for _, _, start, nbytes in self._placed[dtype]:
                    spool.seek(start)
                    for done in range(0, nbytes, _CHUNK):
                        chunk = spool.read(min(nbytes - done, _CHUNK))
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
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
