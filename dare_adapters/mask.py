"""Which entries of a parameter survive.

A parameter is seen as a matrix (:func:`matrix_shape`). A random support is never stored: it is
regenerated from the adapter's seed and the parameter's name, row by row, with Philox4x64-10
(Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011):

    key      = (seed, first 8 bytes of SHA-256 of the name, little-endian)
    counter  = r * S + t       t-th block of row r; S blocks a row, four 64-bit words a block
    lanes    = the words cut into 16 bit (blocked) or 32 bit (bernoulli), lowest bits first

    blocked    lane j of a row keeps column j * B + (lane * B >> 16), if there is such a column
    bernoulli  lane c of a row keeps column c if lane < round((1 - p) * 2**32)

The stream is part of the file format: it must never change.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch

from dare_adapters import compiled

__all__ = [
    "BernoulliSupport",
    "BlockedKey",
    "BlockedSupport",
    "Slots",
    "Support",
    "block_size",
    "count_rows",
    "matrix_shape",
    "padded_slots",
    "parameter_key",
    "philox_words",
]

WORDS_PER_COUNTER = 4
MAX_BLOCK = 1 << 16
MAX_DROP_RATE = 1 - 1 / MAX_BLOCK
# A matrix row should hold enough entries to deserve a scale of its own.
MIN_COLUMNS = 128


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """The (rows, columns) under which a parameter is pruned and stored.

    Two dimensions stay as they are. With more, trailing dimensions are folded into the columns
    until a row has at least 128 entries: a convolution keeps a row for each output channel, a
    stack of experts a row for each row of each expert. Fewer than two make one row.
    """
    if len(shape) < 2:
        return 1, math.prod(shape)
    split = len(shape) - 1
    while len(shape) > 2 and split > 1 and math.prod(shape[split:]) < MIN_COLUMNS:
        split -= 1
    return math.prod(shape[:split]), math.prod(shape[split:])


def block_size(drop_rate: float) -> int | None:
    """B with drop_rate = 1 - 1/B, or None where 1/(1-p) is not a whole number in 1 … 65536."""
    block = round(1 / (1 - drop_rate))
    fits = block <= MAX_BLOCK and abs((1 - 1 / block) - drop_rate) < 1e-9
    return block if fits else None


@lru_cache(maxsize=1 << 14)
def parameter_key(name: str) -> int:
    """The 64-bit word that stands for a parameter's name in the generator's key."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def philox_words(seed: int, key: int, counter: int, blocks: int) -> np.ndarray:
    """`4 * blocks` raw words (uint64) of Philox4x64-10, from counter `counter` on."""
    # NumPy increments the counter before it draws; NEP 19 freezes this integer stream.
    generator = np.random.Philox(
        key=np.array([seed, key], dtype=np.uint64), counter=(counter - 1) % (1 << 256)
    )
    return generator.random_raw(blocks * WORDS_PER_COUNTER).astype("<u8", copy=False)


@dataclass(frozen=True)
class Slots:
    """Where the survivors of a range of rows lie: one slot for each entry that may be stored.

    index: int64 (n, K), flat position `(row - first) * columns + column`; where unused, the
        position of the slot before, or 0 where there is none
    valid: which slots are used: None (all), bool (n,) for the last slot alone, or bool (n, K)
    """

    index: torch.Tensor
    valid: torch.Tensor | None

    @property
    def repeatable(self) -> bool:
        """Whether every unused slot has a slot before it that it can repeat."""
        return self.valid is None or (self.valid.dim() == 1 and self.index.shape[1] > 1)

    def to(self, device: torch.device) -> Slots:
        """The same on a device."""
        valid = None if self.valid is None else self.valid.to(device)
        return Slots(self.index.to(device), valid)

    def repeat_before(self, matrix: torch.Tensor) -> torch.Tensor:
        """Set an unused last entry to the one before it, in place; 0 where there is none.

        Writing a position twice with one value is cheaper than leaving the second out.
        """
        if self.valid is not None:
            before = matrix[:, -2] if self.repeatable else torch.zeros_like(matrix[:, -1])
            matrix[:, -1] = torch.where(self.valid, matrix[:, -1], before)
        return matrix

    def compact(self, matrix: torch.Tensor) -> torch.Tensor:
        """The used entries of a (n, K) matrix as one vector; the same order for every matrix."""
        if self.valid is None:
            return matrix.reshape(-1)
        if self.valid.dim() == 1:
            return torch.cat([matrix[:, :-1].reshape(-1), matrix[:, -1][self.valid]])
        return matrix[self.valid]

    def used_per_row(self) -> torch.Tensor:
        """How many slots of each row are used, int64 (n,)."""
        count, width = self.index.shape
        if self.valid is None:
            return torch.full((count,), width, device=self.index.device)
        if self.valid.dim() == 1:
            return self.valid.to(torch.int64) + (width - 1)
        return self.valid.sum(dim=1)

    def clear_unused(self, matrix: torch.Tensor) -> torch.Tensor:
        """Set the unused entries of a (n, K) matrix to zero, in place."""
        if self.valid is not None:
            unused = ~self.valid
            if self.valid.dim() == 1:
                matrix[:, -1].masked_fill_(unused, 0)
            else:
                matrix.masked_fill_(unused, 0)
        return matrix


class Support(ABC):
    """The positions of one parameter's survivors, addressable by row."""

    rows: int
    columns: int

    @abstractmethod
    def slots(self, start: int, stop: int) -> Slots:
        """The slots of rows start … stop - 1."""

    @abstractmethod
    def contains(self, index: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Whether positions relative to row `start` survive, bool, shape of `index`."""

    @property
    def key(self) -> object | None:
        """Equal for supports of the same positions; None: not known without comparing them."""
        return None

    @property
    @abstractmethod
    def row_counts(self) -> np.ndarray | None:
        """Slots of each row (int64), or None where every row has `slots_per_row`."""

    @property
    @abstractmethod
    def slots_per_row(self) -> int:
        """The largest number of slots any row can have; exact where `row_counts` is None."""

    @property
    def slot_count(self) -> int:
        """Slots of the whole parameter: what storage must hold."""
        counts = self.row_counts
        return self.rows * self.slots_per_row if counts is None else int(counts.sum())


@dataclass(frozen=True)
class BlockedKey:
    """What a blocked support is made of."""

    seed: int
    name: str
    rows: int
    columns: int
    block: int

    @property
    def support(self) -> BlockedSupport:
        """The support."""
        return BlockedSupport(self.seed, self.name, self.rows, self.columns, self.block)


class BlockedSupport(Support):
    """Exactly one survivor in each block of B columns, drawn uniformly: p = 1 - 1/B.

    Args:
        seed, name: what the random stream is keyed with.
        rows, columns: the matrix shape.
        block: B, 1 … 65536.
    """

    def __init__(self, seed: int, name: str, rows: int, columns: int, block: int) -> None:
        if not 1 <= block <= MAX_BLOCK:
            raise ValueError(f"block must be 1 … {MAX_BLOCK}, got {block}")
        self.rows, self.columns, self.block = rows, columns, block
        self._seed, self._name, self._key = seed, name, parameter_key(name)
        self._slots = -(-columns // block)
        self._stride = -(-self._slots // 16)
        self.ragged = columns % block != 0

    @property
    def slots_per_row(self) -> int:
        return self._slots

    @property
    def row_counts(self) -> None:
        return None

    @property
    def where(self) -> compiled.Where:
        """What the compiled loops need to know of it."""
        return self._seed, self._key, self.columns, self.block

    @property
    def repeatable(self) -> bool:
        """Whether an unused last slot has a slot before it that it can repeat."""
        return self._slots > 1 or not self.ragged

    @property
    def key(self) -> BlockedKey:
        return BlockedKey(self._seed, self._name, self.rows, self.columns, self.block)

    def contains(self, index: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        slots = self.slots(start, stop)
        row = index // self.columns
        block = (index - row * self.columns) // self.block
        found = slots.index[row, block] == index
        if slots.valid is not None:
            found &= (block < self._slots - 1) | slots.valid[row]
        return found

    def slots(self, start: int, stop: int) -> Slots:
        if not compiled.available():
            return self._drawn_slots(start, stop)
        index, valid = compiled.positions(self.where, self._slots, start, stop)
        return Slots(index, valid if self.ragged else None)

    def _drawn_slots(self, start: int, stop: int) -> Slots:
        """The same in NumPy."""
        count = stop - start
        if self.block == 1:
            offset = np.zeros((count, self._slots), dtype=np.uint32)
        else:
            words = philox_words(self._seed, self._key, start * self._stride, count * self._stride)
            offset = words.view("<u2").reshape(count, -1).astype(np.uint32)
            offset *= np.uint32(self.block)
            offset >>= np.uint32(16)
        valid = None
        if self.ragged:
            tail = self.columns - (self._slots - 1) * self.block
            valid = torch.from_numpy(offset[:, self._slots - 1] < tail)
        # 32 bits are twice as fast, and enough for every range but one of gigantic rows.
        if count * self.columns + offset.shape[1] * self.block < 1 << 32:
            offset += _block_starts(count, self.columns, offset.shape[1], self.block)
            index = offset[:, : self._slots].astype(np.int64)
        else:
            index = offset[:, : self._slots].astype(np.int64)
            index += np.arange(count, dtype=np.int64)[:, None] * self.columns
            index += np.arange(self._slots, dtype=np.int64) * self.block
        slots = Slots(torch.from_numpy(index), valid)
        slots.repeat_before(slots.index)
        return slots


@lru_cache(maxsize=8)
def _block_starts(count: int, columns: int, slots: int, block: int) -> np.ndarray:
    """Flat position of the first column of each block, uint32 (count, slots)."""
    row_starts = np.arange(count, dtype=np.uint32)[:, None] * np.uint32(columns)
    starts: np.ndarray = row_starts + np.arange(slots, dtype=np.uint32) * np.uint32(block)
    return starts


class BernoulliSupport(Support):
    """Every entry survives on its own with probability 1 - p: the paper's mask, the reference.

    Lanes have 32 bits so that the probability is 1 - p to a relative 1e-9 even at p = 0.999.
    """

    def __init__(self, seed: int, name: str, rows: int, columns: int, drop_rate: float) -> None:
        if not 0 <= drop_rate < 1:
            raise ValueError(f"drop_rate must be in [0, 1), got {drop_rate}")
        self.rows, self.columns = rows, columns
        self._seed, self._key = seed, parameter_key(name)
        self._threshold = round((1 - drop_rate) * (1 << 32))
        self._stride = -(-columns // 8)

    @property
    def key(self) -> object:
        return "bernoulli", self.rows, self.columns, self._seed, self._key, self._threshold

    @property
    def where(self) -> tuple[int, int, int, int]:
        """Seed, key, columns and threshold: what the compiled loop needs to know of it."""
        return self._seed, self._key, self.columns, self._threshold

    def contains(self, index: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        kept: torch.Tensor = torch.from_numpy(self._kept(start, stop).reshape(-1))[index]
        return kept

    def _kept(self, start: int, stop: int) -> np.ndarray:
        count = stop - start
        words = philox_words(self._seed, self._key, start * self._stride, count * self._stride)
        lanes = words.view("<u4").reshape(count, -1)[:, : self.columns]
        return lanes < self._threshold

    @cached_property
    def row_counts(self) -> np.ndarray:
        return count_rows(self._kept, self.rows, self.columns)

    @property
    def slots_per_row(self) -> int:
        return self.columns

    def slots(self, start: int, stop: int) -> Slots:
        return padded_slots(self._kept(start, stop))


def padded_slots(kept: np.ndarray) -> Slots:
    """Slots of a boolean (n, columns) mask, padded to the fullest row."""
    count, columns = kept.shape
    row, column = np.nonzero(kept)
    per_row = np.bincount(row, minlength=count)
    width = int(per_row.max(initial=0))
    valid = np.arange(width) < per_row[:, None]
    index = np.zeros((count, width), dtype=np.int64)
    index[valid] = row * columns + column
    return Slots(torch.from_numpy(index), torch.from_numpy(valid))


def count_rows(kept: Callable[[int, int], np.ndarray], rows: int, columns: int) -> np.ndarray:
    """Survivors of each row (int64), from `kept(start, stop)`, a boolean mask of some rows."""
    counts = np.empty(rows, dtype=np.int64)
    step = max(1, (1 << 20) // max(columns, 1))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        counts[start:stop] = np.count_nonzero(kept(start, stop), axis=1)
    return counts
