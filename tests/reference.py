"""The published rules in plain Python, slow and obvious: what the fast paths are compared with.

Written from the format's description (the docstrings of mask.py, codec.py, stored_support.py and
config.py) and from Salmon et al. 2011; nothing of the library is used here.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

WORD = 1 << 64
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "U8": 1, "I64": 8, "I8": 1}


def philox4x64(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x64-10: four 64-bit words for one counter, lowest word of the counter first."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        left, right = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (
            (right >> 64) ^ c1 ^ k0,
            right % WORD,
            (left >> 64) ^ c3 ^ k1,
            left % WORD,
        )
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) % WORD, (k1 + 0xBB67AE8584CAA73B) % WORD
    return c0, c1, c2, c3


def words_of(seed: int, key: int, counter: int, blocks: int) -> list[int]:
    """The words of `blocks` counters from `counter` on, a 256-bit number that wraps around."""
    found: list[int] = []
    for number in range(counter, counter + blocks):
        parts = tuple((number >> shift) % WORD for shift in (0, 64, 128, 192))
        found += philox4x64(parts, (seed, key))  # type: ignore[arg-type]
    return found


def name_key(name: str) -> int:
    """First eight bytes of the name's SHA-256, little-endian."""
    return struct.unpack("<Q", hashlib.sha256(name.encode("utf-8")).digest()[:8])[0]


def row_lanes(seed: int, name: str, row: int, count: int, lane_bits: int) -> list[int]:
    """The first `count` lanes of one row."""
    blocks = math.ceil(count / (256 // lane_bits))
    words = words_of(seed, name_key(name), row * blocks, blocks)
    lanes = [
        (word >> shift) % (1 << lane_bits) for word in words for shift in range(0, 64, lane_bits)
    ]
    return lanes[:count]


def blocked_row(seed: int, name: str, row: int, columns: int, block: int) -> list[int | None]:
    """The surviving column of each block of a row; None where the draw fell outside the row."""
    slots = math.ceil(columns / block)
    if block == 1:
        return list(range(columns))
    drawn = [
        slot * block + (lane * block >> 16)
        for slot, lane in enumerate(row_lanes(seed, name, row, slots, 16))
    ]
    return [column if column < columns else None for column in drawn]


def bernoulli_row(seed: int, name: str, row: int, columns: int, drop_rate: float) -> list[int]:
    """The surviving columns of a row."""
    threshold = round((1 - drop_rate) * 2**32)
    lanes = row_lanes(seed, name, row, columns, 32)
    return [column for column, lane in enumerate(lanes) if lane < threshold]


def matrix_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns): trailing dimensions are folded until a row has 128 entries."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    folded = [shape[-1]]
    lead = list(shape[:-1])
    while len(lead) > 1 and math.prod(folded) < 128:
        folded.append(lead.pop())
    return math.prod(lead), math.prod(folded)


def gap_positions(stream: bytes) -> list[int]:
    """Flat positions from skipped counts; 255 skips 255 and names nobody."""
    found, place = [], 0
    for byte in stream:
        place += byte
        if byte != 255:
            found.append(place)
            place += 1
    return found


def bitmap_positions(data: bytes, rows: int, columns: int) -> list[int]:
    """Flat positions from one bit an entry, each row starting at a byte."""
    width = math.ceil(columns / 8)
    return [
        row * columns + column
        for row in range(rows)
        for column in range(columns)
        if data[row * width + column // 8] >> (column % 8) & 1
    ]


def unpack_codes(data: bytes, bits: int, count: int) -> list[int]:
    """The first `count` codes of one row, lowest bits first."""
    per_byte = 8 // bits
    plain = [
        data[i // per_byte] >> (bits * (i % per_byte)) & ((1 << bits) - 1) for i in range(count)
    ]
    return [2 * c - 1 if bits == 1 else c - (1 << (bits - 1)) for c in plain]


class RawTensor(NamedTuple):
    """A tensor as a safetensors file holds it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def numbers(self) -> list[float]:
        """Its values."""
        if self.dtype == "BF16":
            halves = struct.unpack(f"<{len(self.data) // 2}H", self.data)
            return [struct.unpack("<f", struct.pack("<I", half << 16))[0] for half in halves]
        code = {"F64": "d", "F32": "f", "F16": "e", "U8": "B", "I64": "q", "I8": "b"}[self.dtype]
        return list(struct.unpack(f"<{len(self.data) // struct.calcsize(code)}{code}", self.data))


def read_safetensors(path: Path) -> dict[str, RawTensor]:
    """Header length, JSON header, bytes."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    data = raw[8 + length :]
    header.pop("__metadata__", None)
    return {
        key: RawTensor(entry["dtype"], tuple(entry["shape"]), data[slice(*entry["data_offsets"])])
        for key, entry in header.items()
    }


def write_safetensors(path: Path, tensors: Mapping[str, RawTensor]) -> None:
    """In the order given, without padding."""
    header: dict[str, Any] = {}
    offset = 0
    for key, tensor in tensors.items():
        end = offset + len(tensor.data)
        header[key] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    path.write_bytes(
        struct.pack("<Q", len(text)) + text + b"".join(t.data for t in tensors.values())
    )


def decode_adapter(directory: Path) -> dict[str, np.ndarray]:
    """Every delta of an adapter dense, every new value and added row, by name.

    Added rows come under `name + "+rows"`.
    """
    config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = read_safetensors(directory / "adapter_model.safetensors")
    found: dict[str, np.ndarray] = {}
    for name, entry in config["parameters"].items():
        module, _, last = name.rpartition(".")
        stem = f"base_model.model.{module + '.' if module else ''}dare_{last}_"
        shape = tuple(entry["shape"])
        if entry["kind"] == "sparse":
            values = _decode_sparse(entry, stem, tensors, config["seed"], name)
        else:
            part = "delta" if entry["kind"] == "dense" else "value"
            values = tensors[stem + part].numbers()
        found[name] = np.array(values, dtype=np.float64).reshape(shape)
        if entry.get("added_rows"):
            rows = tensors[stem + "rows"]
            found[name + "+rows"] = np.array(rows.numbers(), dtype=np.float64).reshape(rows.shape)
    return found


def scale_of(stored: float, exponent: int, bits: int) -> float:
    """A row's scale from what is stored: a float16, or at 4 and 2 bits a byte."""
    if bits in (8, 1):
        return stored * 2.0**exponent
    if stored == 255:
        return 0.0
    octaves, step = divmod(int(stored), 8)
    mantissa = (2048, 1878, 1722, 1579, 1448, 1328, 1218, 1117)[step]
    return mantissa / 2048 * 2.0 ** (exponent - octaves)


def _decode_sparse(
    entry: dict[str, Any], stem: str, tensors: dict[str, RawTensor], seed: int, name: str
) -> list[float]:
    rows, columns = matrix_of(tuple(entry["shape"]))
    bits, mask = entry["bits"], entry["mask"]
    stored = tensors[stem + "values"]
    dense = [0.0] * (rows * columns)
    support: list[int] = []
    if mask == "gaps":
        support = gap_positions(tensors[stem + "support"].data)
    elif mask == "bitmap":
        support = bitmap_positions(tensors[stem + "support"].data, rows, columns)
    by_row: list[list[int | None]] = [[] for _ in range(rows)]
    for row in range(rows):
        if mask == "blocked":
            by_row[row] = blocked_row(seed, name, row, columns, entry["block"])
        elif mask == "bernoulli":
            by_row[row] = list(bernoulli_row(seed, name, row, columns, entry["drop_rate"]))
    for place in support:
        by_row[place // columns].append(place % columns)
    numbers = stored.numbers() if bits >= 16 else []
    scales = tensors[stem + "scales"].numbers() if bits < 16 else []
    first = 0
    for row, kept in enumerate(by_row):
        if bits >= 16:
            values = numbers[first : first + len(kept)]
            first += len(kept)
        else:
            size = math.ceil(len(kept) * bits / 8)
            scale = scale_of(scales[row], entry.get("exponent", 0), bits)
            codes = unpack_codes(stored.data[first : first + size], bits, len(kept))
            values = [code * scale for code in codes]
            first += size
        for column, value in zip(kept, values, strict=True):
            if column is not None:
                dense[row * columns + column] = value
    return dense
