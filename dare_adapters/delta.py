"""How one parameter changes, read a range of rows at a time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from dare_adapters import compiled, compiled_selection
from dare_adapters.compiled_merge import KeptRows
from dare_adapters.mask import BlockedSupport, Support, matrix_shape
from dare_adapters.matrix import MatrixView
from dare_adapters.memory_block import MemoryBlock

__all__ = [
    "Delta",
    "DenseDelta",
    "NewParameter",
    "NoChange",
    "WeightedDelta",
    "WholeDelta",
    "join_added_rows",
]

# Entries that one step works on: small enough for the caches, large enough to hide dispatch.
STEP_ENTRIES = 1 << 18


class Delta(ABC):
    """Fine-tune minus base of one parameter.

    Attributes:
        shape: shape of the base parameter.
        rows, columns: the matrix it is seen as (`mask.matrix_shape`).
        added_rows: values of vocabulary rows that the base does not have, or None;
            (m, *shape[1:]), the fine-tune's dtype.
    """

    def __init__(self, shape: tuple[int, ...], added_rows: torch.Tensor | None = None) -> None:
        self.shape = tuple(shape)
        self.rows, self.columns = matrix_shape(self.shape)
        self.added_rows = added_rows

    @property
    @abstractmethod
    def entries_per_row(self) -> int:
        """About how many entries of a row change."""

    @abstractmethod
    def read(self, start: int, stop: int) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The change of rows start … stop - 1.

        Returns:
            index: int64 (m,), flat positions `(row - start) * columns + column`, ascending, or
                None: all. A position may come twice, one after the other, with the same value.
            values: float32 (m,), the caller's own.
        """

    def positions(self, start: int, stop: int) -> torch.Tensor | None:
        """The index that :meth:`read` returns."""
        return self.read(start, stop)[0]

    def at(self, index: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The change at positions relative to row `start`, float32, shape of `index`."""
        own, values = self.read(start, stop)
        if own is None:
            return values[index]
        dense = torch.zeros((stop - start) * self.columns)
        dense[own] = values
        return dense[index]

    def read_support(
        self, support: Support, factor: float, start: int, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`read` of a support's entries alone, times `factor`."""
        slots = support.slots(start, stop)
        index = slots.index.view(-1) if slots.repeatable else slots.compact(slots.index)
        values = self.at(index, start, stop)
        return index, values if factor == 1.0 else values.mul_(factor)

    def read_above(
        self, value: float, last: float, start: int, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`read` of the entries that are above `value` in magnitude.

        Args:
            last: up to this flat position, relative to row `start`, those equal to it are too.
        """
        index, values = self.read(start, stop)
        if compiled.available():
            every = (stop - start) * self.columns
            limit = every if last == math.inf else max(int(last), -1)
            return compiled.values_above(index, values, value, limit)
        size = values.abs()
        keep = size >= value if last == math.inf else size > value
        if 0 <= last < math.inf:
            equal = size == value
            if index is None:
                equal[int(last) + 1 :] = False
            else:
                equal &= index <= int(last)
            keep |= equal
        place = keep.nonzero().squeeze(1)
        return (place if index is None else index[place]), values[place]

    def between(self, low: float, high: float, start: int, stop: int) -> tuple[int, torch.Tensor]:
        """How many magnitudes of some rows are above `high`, and those from `low` to `high`."""
        index, values = self.read(start, stop)
        if compiled.available():
            return compiled.values_between(index, values, low, high)
        size = values.abs()
        if index is not None and len(index) > 1:  # what comes twice counts once
            size = size[torch.cat([torch.ones(1, dtype=torch.bool), index[1:] != index[:-1]])]
        reach = size[size >= low]
        over = reach > high
        return int(over.sum()), reach[~over]

    def count_around(self, value: float, start: int, stop: int) -> tuple[int, int]:
        """How many magnitudes of some rows are above `value`, and how many equal it."""
        above, equal = self.between(value, value, start, stop)
        return above, len(equal)

    def equal_to(self, value: float, wanted: int, start: int, stop: int) -> tuple[int, int | None]:
        """How many magnitudes of some rows are `value`, and where the last wanted one is.

        Args:
            wanted: 1 or more; nothing is counted beyond.

        Returns:
            Their number, and a flat position relative to row `start`, or None: there are fewer.
        """
        index, values = self.read(start, stop)
        if compiled_selection.available():
            return compiled_selection.values_equal(index, values.contiguous(), value, wanted)
        equal = values.abs() == value
        if index is not None and len(index) > 1:  # what comes twice counts once
            equal[1:] &= index[1:] != index[:-1]
        places = equal.nonzero().squeeze(1)
        if len(places) < wanted:
            return len(places), None
        place = places[wanted - 1]
        return wanted, int(place if index is None else index[place])

    def read_kept(
        self, support: Support, factor: float, start: int, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`read` of those entries that a support has too, times `factor`."""
        index, values = self.read(start, stop)
        if index is None:
            index = torch.arange((stop - start) * self.columns)
        if isinstance(support, BlockedSupport) and compiled.available():
            where, slots = support.where, support.slots_per_row
            return compiled.kept(where, slots, start, index, values.contiguous(), factor)
        place = support.contains(index, start, stop).nonzero().squeeze(1)
        return index[place], values[place] * factor

    def fill(self, out: torch.Tensor, start: int, stop: int) -> None:
        """The change of some rows where it is, float32 (n * columns,); -0 where there is none."""
        _fill(out, *self.read(start, stop))

    def add_to(self, total: torch.Tensor, weight: float, start: int, stop: int) -> None:
        """Add `weight` times some rows to `total`, float32 (n * columns,), contiguous."""
        index, values = self.read(start, stop)
        if index is None:
            total.add_(values.mul_(weight))
        elif compiled.can_use(total):
            compiled.accumulate(total, index, values.contiguous(), weight)
        else:
            total[index] += values * weight  # assigns: a position that comes twice counts once

    def fill_above(
        self, out: torch.Tensor, value: float, last: float, start: int, stop: int
    ) -> None:
        """:meth:`read_above`, as :meth:`fill`."""
        _fill(out, *self.read_above(value, last, start, stop))

    def read_dense(self, start: int, stop: int) -> torch.Tensor | None:
        """As :meth:`fill`, where that is sooner made than positions are; else None."""
        return None

    def kept_rows(self, start: int, stop: int) -> KeptRows | None:
        """:meth:`read` as it is kept in memory; None: it is not."""
        return None

    def merged_onto(self, base: torch.Tensor, start: int, stop: int) -> torch.Tensor | None:
        """`base` plus some rows, rounded once, made in one pass; None: it cannot be.

        Args:
            base: those rows, flat (n * columns,).
        """
        return None

    def l1(self, start: int, stop: int) -> float:
        """The sum of the magnitudes of some rows."""
        index, values = self.read(start, stop)
        total = values.abs_().sum(dtype=torch.float64)
        if index is not None and len(index) > 1:  # what comes twice counts once
            total -= values[1:][index[1:] == index[:-1]].sum(dtype=torch.float64)
        return float(total)

    @property
    def shows_damage(self) -> bool:
        """Whether NaN and infinity in a checkpoint that it is read from cannot be lost.

        Either :meth:`preparations` find them, or it is read from none.
        """
        return False

    @property
    def recalls_positions(self) -> bool:
        """Whether :meth:`positions` is cheap, so that nobody need remember them."""
        return False

    @property
    def support_key(self) -> object | None:
        """Equal for deltas that change the same positions in the same order; None: unknown."""
        return None

    def preparations(self) -> list[Callable[[], object]]:
        """What finds out ahead of reading what it needs to know of the whole: thresholds, sums."""
        return []

    def terms(self) -> Sequence[WeightedDelta] | None:
        """What this delta is the weighted sum of, added in this order; None: it is no sum."""
        return None

    def release(self) -> None:  # noqa: B027 (most deltas compute nothing that they keep)
        """Forget what was computed for reading; it is computed again if it is read again."""

    def apply_compiled(
        self,
        target: MatrixView,
        weight: float,
        start: int,
        stop: int,
        memory: MemoryBlock | None = None,
    ) -> torch.Tensor | None:
        """Add the change in place without Python's lock; what was there, or None: it cannot be.

        Args:
            memory: where what was there is kept.
        """
        return None

    @property
    def kept_entries(self) -> int:
        """How many entries :meth:`apply_compiled` keeps of all rows together; 0: it cannot be."""
        return 0

    def restore_compiled(
        self, target: MatrixView, originals: torch.Tensor, start: int, stop: int
    ) -> bool:
        """Undo `row_sums.apply_rows` of this delta alone; False: it cannot be done so."""
        return False

    @property
    def row_cost(self) -> int:
        """About how many entries are looked at to read a row."""
        return self.entries_per_row

    def row_ranges(self) -> Iterator[tuple[int, int]]:
        """Ranges of rows, in order, to read each of which about `STEP_ENTRIES` are looked at."""
        step = max(1, STEP_ENTRIES // max(self.row_cost, 1))
        for start in range(0, self.rows, step):
            yield start, min(start + step, self.rows)

    def dense(self) -> torch.Tensor:
        """The whole change, float32 of `shape`; dropped entries are zero."""
        flat = torch.zeros(self.rows * self.columns)
        for start, stop in self.row_ranges():
            index, values = self.read(start, stop)
            part = flat[start * self.columns : stop * self.columns]
            if index is None:
                part.copy_(values)
            else:
                part[index] = values
        return flat.view(self.shape)


class NoChange(Delta):
    """A change of no entry."""

    @property
    def entries_per_row(self) -> int:
        return 0

    @property
    def shows_damage(self) -> bool:
        return True

    def read(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0)


class WholeDelta(Delta):
    """A change of every entry, of which a subclass reads the values."""

    @property
    def entries_per_row(self) -> int:
        return self.columns

    @property
    def recalls_positions(self) -> bool:
        return True

    def positions(self, start: int, stop: int) -> None:
        return None


class DenseDelta(WholeDelta):
    """A change of every entry.

    Args:
        values: any float dtype, shape of the parameter.
    """

    def __init__(self, values: torch.Tensor, added_rows: torch.Tensor | None = None) -> None:
        super().__init__(tuple(values.shape), added_rows)
        self.values = values

    def read(self, start: int, stop: int) -> tuple[None, torch.Tensor]:
        flat = self.values.reshape(-1)
        part = flat[start * self.columns : stop * self.columns]
        return None, part.to(torch.float32, copy=True)


@dataclass(frozen=True)
class NewParameter:
    """A parameter that the base does not have, such as a task head: its value, whole."""

    value: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)


@dataclass(frozen=True)
class WeightedDelta:
    """A delta and the factor that it is added with."""

    delta: Delta
    weight: float = 1.0

    def read(self, start: int, stop: int) -> tuple[torch.Tensor | None, torch.Tensor]:
        index, values = self.delta.read(start, stop)
        return index, values if self.weight == 1.0 else values * self.weight


def join_added_rows(given: Iterable[torch.Tensor | None]) -> torch.Tensor | None:
    """Vocabulary rows of several deltas as one: the first's, and of others what is beyond.

    They are values and no differences, so that weights of the deltas do not apply to them.

    Args:
        given: `added_rows` of each, in their order.
    """
    rows: torch.Tensor | None = None
    for more in given:
        if more is None:
            continue
        if rows is None:
            rows = more
        elif len(more) > len(rows):
            rows = torch.cat([rows, more[len(rows) :].to(rows.dtype)])
    return rows


def _fill(out: torch.Tensor, index: torch.Tensor | None, values: torch.Tensor) -> None:
    if index is None:
        out.copy_(values)
        return
    out.fill_(-0.0)
    if compiled.can_use(out) and out.is_contiguous():
        compiled.accumulate(out, index, values.contiguous(), 1.0)
    else:
        out[index] = values
