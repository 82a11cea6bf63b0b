"""Survivors scaled so that their magnitudes sum to what the delta's did: mergekit's rule."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from dare_adapters.combine import loops
from dare_adapters.combine.sparsify import DroppedAtRandom
from dare_adapters.compiled_merge import KeptRows
from dare_adapters.delta import Delta
from dare_adapters.difference import ParameterDifference
from dare_adapters.sparse_delta import SparseDelta

__all__ = ["rescaled_to_l1"]

# Positions in a parameter of fewer entries are kept in 32 bits.
_INT32_ENTRIES = 1 << 31


def rescaled_to_l1(pruned: Delta, delta: Delta) -> Delta:
    """`pruned` times sum|delta| / sum|pruned|."""
    return pruned if pruned is delta else _RescaledToL1(pruned, delta)


class _RescaledToL1(Delta):
    """Survivors are kept from when their sum is known until they are released."""

    def __init__(self, pruned: Delta, delta: Delta) -> None:
        super().__init__(delta.shape)
        self.pruned, self.delta = pruned, delta
        self._lock = threading.Lock()
        self._survivors: _Survivors | None = None

    @property
    def entries_per_row(self) -> int:
        return self.pruned.entries_per_row

    @property
    def row_cost(self) -> int:
        return self.pruned.row_cost

    @property
    def support_key(self) -> object | None:
        return self.pruned.support_key

    @property
    def shows_damage(self) -> bool:
        whole = self.delta
        summed = isinstance(whole, ParameterDifference) and whole.damaged is not None
        return summed or (whole.shows_damage and self.pruned.shows_damage)

    @property
    def survivors(self) -> _Survivors:
        """What `pruned` keeps, and the factor that belongs to it."""
        with self._lock:
            if self._survivors is None:
                self._survivors = self._found()
            return self._survivors

    def preparations(self) -> list[Callable[[], object]]:
        return [*self.pruned.preparations(), lambda: self.survivors]

    def read(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.survivors.between(start * self.columns, stop * self.columns)

    def fill(self, out: torch.Tensor, start: int, stop: int) -> None:
        if loops.can_fill(out):
            out.fill_(-0.0)
            self.survivors.add_to(out, 1.0, start * self.columns)
        else:
            super().fill(out, start, stop)

    def add_to(self, total: torch.Tensor, weight: float, start: int, stop: int) -> None:
        if loops.can_fill(total):
            self.survivors.add_to(total, weight, start * self.columns)
        else:
            super().add_to(total, weight, start, stop)

    def kept_rows(self, start: int, stop: int) -> KeptRows:
        return self.survivors.kept(start * self.columns, stop * self.columns)

    def release(self) -> None:
        with self._lock:
            self._survivors = None
        self.pruned.release()

    def _found(self) -> _Survivors:
        whole = kept = 0.0
        found = _Survivors(self.rows * self.columns, self.rows * self.entries_per_row)
        for start, stop in self.pruned.row_ranges():
            sums = self._taken(found, start, stop)
            if sums is None:
                of_all = self.delta.l1(start, stop)
                index, values = self.pruned.read(start, stop)
                sums = found.append(index, values, start * self.columns), of_all
            kept, whole = kept + sums[0], whole + sums[1]
        found.factor = whole / kept if kept > 0 else 1.0
        return found

    def _taken(self, found: _Survivors, start: int, stop: int) -> tuple[float, float] | None:
        """Take in some rows at once: Σ|kept| and Σ|all|; None: they have to be read first."""
        pruned, delta, rows = self.pruned, self.delta, (start, stop)
        if not isinstance(pruned, DroppedAtRandom) or pruned.blocked is None:
            return None
        support, factor = pruned.blocked
        if not loops.available():
            return None
        if isinstance(delta, ParameterDifference) and delta.compiled:
            places, values = found.room((stop - start) * support.slots_per_row)
            count, sum_kept, sum_all = loops.keep_differences(
                support.where, delta.base, delta.finetuned, factor, rows, places, values
            )
            delta.check_sum(sum_all)
        elif isinstance(delta, SparseDelta) and delta.packed_support is not None:
            own = delta.packed_support
            slots = min(own.slots_per_row, support.slots_per_row)
            places, values = found.room((stop - start) * slots + 1)
            count, sum_kept = loops.keep_codes(
                own.where, delta.bits, delta.values, delta.row_scales, support.where, factor, rows,
                places, values,
            )  # fmt: skip
            sum_all = delta.l1(start, stop)
        else:
            return None
        found.taken(count)
        return sum_kept, sum_all


class _Survivors:
    """Flat positions in a parameter, ascending, and values that are still to be multiplied.

    Args:
        size: entries of the parameter.
        expected: how many there will be, about.
    """

    def __init__(self, size: int, expected: int) -> None:
        dtype = torch.int32 if size < _INT32_ENTRIES else torch.int64
        # Room that is not used costs nothing: its pages are never touched.
        self._places = torch.empty(expected, dtype=dtype)
        self._values = torch.empty(expected)
        self._count = 0
        self.factor = 1.0

    def append(self, index: torch.Tensor | None, values: torch.Tensor, offset: int) -> float:
        """Take in what `Delta.read` gave of rows that begin at flat position `offset`.

        Returns:
            Σ|values|, of which one that comes twice counts once.
        """
        places, kept = self.room(len(values))
        self.taken(len(values))
        if loops.available():
            return loops.gather(index, values.contiguous(), offset, places, kept)
        if index is None:
            index = torch.arange(len(values))
        places.copy_(index + offset)
        kept.copy_(values)
        return _sum_once(index, values)

    def room(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the next `count` positions and values belong."""
        stop = self._count + count
        if stop > len(self._values):
            more = max(stop, len(self._values) * 3 // 2) - len(self._values)
            self._places = torch.cat([self._places, self._places.new_empty(more)])
            self._values = torch.cat([self._values, self._values.new_empty(more)])
        return self._places[self._count : stop], self._values[self._count : stop]

    def taken(self, count: int) -> None:
        """So many were put there."""
        self._count += count

    def between(self, low: int, high: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Those at low … high - 1: int64 positions relative to `low`, and values."""
        first, last = self._bounds(low, high)
        places = self._places[first:last].to(torch.int64).sub_(low)
        return places, self._values[first:last] * self.factor

    def add_to(self, total: torch.Tensor, weight: float, low: int) -> None:
        """Add `weight` times those from `low` on to the entries of `total`, which begins there."""
        first, last = self._bounds(low, low + len(total))
        loops.add_to(
            total, self._places[first:last], self._values[first:last], low, self.factor, weight
        )

    def kept(self, low: int, high: int) -> KeptRows:
        """Those at low … high - 1, as they lie here."""
        first, last = self._bounds(low, high)
        return KeptRows(self._places[first:last], self._values[first:last], self.factor)

    def _bounds(self, low: int, high: int) -> tuple[int, int]:
        ends = torch.tensor([low, high], dtype=self._places.dtype)
        first, last = torch.searchsorted(self._places[: self._count], ends).tolist()
        return int(first), int(last)


def _sum_once(index: torch.Tensor, values: torch.Tensor) -> float:
    """Σ|values| of entries of which one that comes twice counts once."""
    size = values.abs()
    total = float(size.sum(dtype=torch.float64))
    if len(index) > 1:
        total -= float(size[1:][index[1:] == index[:-1]].sum(dtype=torch.float64))
    return total
