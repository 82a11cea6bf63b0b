"""How one parameter changes: sparse or dense, read and applied a range of rows at a time.

A live model and an exported checkpoint agree bit for bit because both go through
:func:`apply_rows`: all deltas are summed in float32, added to the base in float32, and rounded
once. `_rows.c` repeats that for the commonest case, and tests hold the two equal.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from dare_adapters import codec, compiled, compiled_selection
from dare_adapters.errors import AdapterFormatError
from dare_adapters.mask import BlockedSupport, Slots, Support, matrix_shape
from dare_adapters.matrix import MatrixView
from dare_adapters.scales import largest_scale, load_scales

__all__ = [
    "Delta",
    "DenseDelta",
    "NewParameter",
    "NoChange",
    "SparseDelta",
    "WeightedDelta",
    "add_rows",
    "apply_rows",
    "flat_terms",
    "sum_rows",
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

    def l1(self, start: int, stop: int) -> float:
        """The sum of the magnitudes of some rows."""
        index, values = self.read(start, stop)
        total = values.abs_().sum(dtype=torch.float64)
        if index is not None and len(index) > 1:  # what comes twice counts once
            total -= values[1:][index[1:] == index[:-1]].sum(dtype=torch.float64)
        return float(total)

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
        self, target: MatrixView, weight: float, start: int, stop: int
    ) -> torch.Tensor | None:
        """Add the change in place without Python's lock; what was there, or None: it cannot be."""
        return None

    def restore_compiled(
        self, target: MatrixView, originals: torch.Tensor, start: int, stop: int
    ) -> bool:
        """Undo :meth:`apply_rows` of this delta alone; False: it cannot be done so."""
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

    def read(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0)


class DenseDelta(Delta):
    """A change of every entry.

    Args:
        values: any float dtype, shape of the parameter.
    """

    def __init__(self, values: torch.Tensor, added_rows: torch.Tensor | None = None) -> None:
        super().__init__(tuple(values.shape), added_rows)
        self.values = values

    @property
    def entries_per_row(self) -> int:
        return self.columns

    @property
    def recalls_positions(self) -> bool:
        return True

    def positions(self, start: int, stop: int) -> None:
        return None

    def read(self, start: int, stop: int) -> tuple[None, torch.Tensor]:
        flat = self.values.reshape(-1)
        part = flat[start * self.columns : stop * self.columns]
        return None, part.to(torch.float32, copy=True)


class SparseDelta(Delta):
    """A change of the entries of a support, stored as :mod:`dare_adapters.codec` describes.

    Args:
        shape: of the parameter.
        support: which entries change.
        bits: 32 or 16 (float values), or 8, 4, 2, 1 (packed codes).
        values: float (slots,) or packed uint8 (bytes,), rows one after the other.
        scales: stored scales (rows,), with `exponent`; None at 32 and 16 bits.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        support: Support,
        bits: int,
        values: torch.Tensor,
        scales: torch.Tensor | None = None,
        exponent: int = 0,
        added_rows: torch.Tensor | None = None,
    ) -> None:
        super().__init__(shape, added_rows)
        self.support, self.bits = support, bits
        self.values, self.scales, self.exponent = values, scales, exponent

    @property
    def entries_per_row(self) -> int:
        if self.support.row_counts is None:
            return self.support.slots_per_row
        return max(1, self.support.slot_count // max(self.rows, 1))

    @property
    def recalls_positions(self) -> bool:
        return True

    @property
    def support_key(self) -> object | None:
        return self.support.key

    def read(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        support = self.support
        packed = self.bits < 16 and compiled.can_read(self.values)
        if packed and isinstance(support, BlockedSupport) and support.repeatable:
            width, scales = support.slots_per_row, self._row_scales
            return compiled.read_rows(
                support.where, self.bits, self.values, scales, width, start, stop
            )
        slots = self.support.slots(start, stop)
        matrix = self._read_values(start, stop, slots)
        if slots.repeatable:
            return slots.index.view(-1), slots.repeat_before(matrix).view(-1)
        return slots.compact(slots.index), slots.compact(matrix)

    def survivors(self, start: int, stop: int) -> tuple[Slots, torch.Tensor]:
        """The slots of rows start … stop - 1 and their values, float32 (n, K); 0 where unused."""
        slots = self.support.slots(start, stop)
        return slots, slots.clear_unused(self._read_values(start, stop, slots))

    def positions(self, start: int, stop: int) -> torch.Tensor:
        slots = self.support.slots(start, stop)
        return slots.index.view(-1) if slots.repeatable else slots.compact(slots.index)

    def apply_compiled(
        self, target: MatrixView, weight: float, start: int, stop: int
    ) -> torch.Tensor | None:
        if target.device.type != "cpu":
            return self._apply_on_device(target, weight, start, stop)
        where = self._compiled_support(target)
        if where is None or self.bits >= 16:
            return None
        originals = compiled.apply_rows(
            where,
            self.bits,
            self.values,
            self._row_scales,
            weight,
            target.storage[target.offset :],
            target.row_stride,
            self.support.slots_per_row,
            start,
            stop,
        )
        target.mark_written()
        return originals

    def restore_compiled(
        self, target: MatrixView, originals: torch.Tensor, start: int, stop: int
    ) -> bool:
        if originals.dtype != target.dtype or originals.device != target.device:
            return False
        on_device = target.device.type != "cpu"
        where = self._device_support(target) if on_device else self._compiled_support(target)
        if where is None:
            return False
        storage, slots = target.storage[target.offset :], self.support.slots_per_row
        if on_device:
            from dare_adapters.kernels.gpu.change import restore_on_device

            restore_on_device(where, storage, target.row_stride, originals, slots, start, stop)
        else:
            compiled.restore_rows(where, storage, target.row_stride, originals, slots, start, stop)
        target.mark_written()
        return True

    def _apply_on_device(
        self, target: MatrixView, weight: float, start: int, stop: int
    ) -> torch.Tensor | None:
        """:meth:`apply_compiled` where the parameter is; only what is stored goes there."""
        where = self._device_support(target)
        if where is None:
            return None
        from dare_adapters.kernels.gpu.change import apply_on_device

        originals = apply_on_device(
            where,
            self.bits,
            self.values.to(target.device, non_blocking=True),
            None if self.scales is None else self._row_scales.to(target.device),
            weight,
            target.storage[target.offset :],
            target.row_stride,
            self.support.slots_per_row,
            start,
            stop,
        )
        target.mark_written()
        return originals

    def _device_support(self, target: MatrixView) -> compiled.Where | None:
        from dare_adapters.kernels.gpu.available import can_compile

        support = self.support
        if not isinstance(support, BlockedSupport) or not support.repeatable:
            return None
        straight = target.positions is None and target.column_stride == 1
        known = straight and target.dtype in compiled.DTYPES and can_compile(target.device)
        return support.where if known else None

    def read_kept(
        self, support: Support, factor: float, start: int, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        own = self._packed_support
        if own is None or not isinstance(support, BlockedSupport):
            return super().read_kept(support, factor, start, stop)
        return compiled_selection.read_kept(
            own.where, self.bits, self.values, self._row_scales, support.where, factor, start, stop
        )

    def l1(self, start: int, stop: int) -> float:
        if self._packed_support is None:
            return super().l1(start, stop)
        magnitudes, counts = self.magnitude_counts(start, stop)
        return float((magnitudes.to(torch.float64) * counts).sum())

    @property
    def counts_magnitudes(self) -> bool:
        """Whether :meth:`magnitude_counts` is sooner made than entries are read."""
        few = (1 << (self.bits - 1)) < self.support.slots_per_row // 2
        return self._packed_support is not None and few

    def magnitude_counts(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The magnitudes that occur in each row, float32 (n, k), and how often, int32 (n, k)."""
        support = self._packed_support
        assert support is not None
        counts = compiled_selection.code_counts(support.where, self.bits, self.values, start, stop)
        levels = torch.arange(counts.shape[1], dtype=torch.float32)
        return levels * self._row_scales[start:stop, None], counts

    @property
    def _packed_support(self) -> BlockedSupport | None:
        """The support, where the loops that choose among packed survivors can use it."""
        support = self.support
        if not isinstance(support, BlockedSupport) or not support.repeatable or self.bits >= 16:
            return None
        usable = compiled_selection.available() and compiled.can_read(self.values)
        return support if usable else None

    def _compiled_support(self, target: MatrixView) -> compiled.Where | None:
        support = self.support
        if not isinstance(support, BlockedSupport) or not support.repeatable:
            return None
        straight = target.positions is None and target.column_stride == 1
        return support.where if straight and compiled.can_use(target.storage) else None

    def check_sizes(self, name: str) -> None:
        """Compare the values with the support, and look at the scales as they will be used.

        Raises:
            AdapterFormatError: there are more or fewer values than survivors where the support
                alone says how many there are; a scale is too large for float32.
        """
        if self.scales is not None:
            limit = torch.finfo(torch.float32).max / (1 << (self.bits - 1))
            suspect = largest_scale(self.scales.dtype, self.exponent) > limit
            if suspect and bool((self._row_scales.to(torch.float64) > limit).any()):
                raise AdapterFormatError(
                    f"{name}: its scales times 2**{self.exponent} are beyond float32"
                )
        offsets = self._row_offsets
        if offsets is not None and int(offsets[-1]) != self.values.numel():
            raise AdapterFormatError(
                f"{name}: its support needs {int(offsets[-1])} units of values, "
                f"{self.values.numel()} are stored"
            )

    def _read_values(self, start: int, stop: int, slots: Slots) -> torch.Tensor:
        """float32 (n, K), anything where a slot is unused."""
        count, width = slots.index.shape
        offsets = self._row_offsets
        if offsets is None:
            size = self._row_size
            stored = self.values[start * size : stop * size].view(count, size)
            if self.bits >= 16:
                return stored.to(torch.float32, copy=True)
            codes = codec.unpack(stored, self.bits).reshape(count, -1)
            codes = codes[:, :width]
        else:
            first, last = int(offsets[start]), int(offsets[stop])
            stored = self.values[first:last]
            per_unit = 1 if self.bits >= 16 else 8 // self.bits
            row_start = torch.from_numpy((offsets[start:stop] - first) * per_unit)
            place = (row_start[:, None] + torch.arange(width)).masked_fill_(~_full(slots), 0)
            flat = stored if self.bits >= 16 else codec.unpack(stored, self.bits).reshape(-1)
            codes = flat[place].to(torch.float32) if flat.numel() else place.to(torch.float32)
            if self.bits >= 16:
                return codes
        return codes * self._row_scales[start:stop, None]

    @cached_property
    def _row_scales(self) -> torch.Tensor:
        assert self.scales is not None
        return load_scales(self.scales, self.exponent)

    @cached_property
    def _row_size(self) -> int:
        """Units of `values` (floats or bytes) of each row, where all rows have the same."""
        slots = self.support.slots_per_row
        return slots if self.bits >= 16 else codec.bytes_per_row(slots, self.bits)

    @cached_property
    def _row_offsets(self) -> np.ndarray | None:
        """Where each row starts in `values` (rows + 1,), or None where all are of one size."""
        counts = self.support.row_counts
        if counts is None:
            return None
        units = counts if self.bits >= 16 else -(-counts * self.bits // 8)
        return np.concatenate([[0], np.cumsum(units)])


def _fill(out: torch.Tensor, index: torch.Tensor | None, values: torch.Tensor) -> None:
    if index is None:
        out.copy_(values)
        return
    out.fill_(-0.0)
    if compiled.can_use(out) and out.is_contiguous():
        compiled.accumulate(out, index, values.contiguous(), 1.0)
    else:
        out[index] = values


def _full(slots: Slots) -> torch.Tensor:
    assert slots.valid is not None
    return slots.valid


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


def apply_rows(
    target: MatrixView, deltas: Sequence[WeightedDelta], start: int, stop: int
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Add the deltas to rows start … stop - 1 of `target`, which holds base values, in place.

    Returns:
        index: where was written, int64 (m,) relative to row `start`; None: everywhere, or where
            the one delta's :meth:`Delta.positions` say.
        originals: what was there, (m,) in the dtype of `target`.
    """
    deltas = flat_terms(deltas)
    if len(deltas) == 1:
        kept = deltas[0].delta.apply_compiled(target, deltas[0].weight, start, stop)
        if kept is not None:
            return None, kept
    index, change = sum_rows(deltas, start, stop)
    place = None if index is None else target.flat_places(index, start)
    if place is not None and compiled.can_use(target.storage):
        kept = compiled.add_at(target.storage, place, change, keep=True)
        target.mark_written()
        assert kept is not None
        return index, kept
    index, change = target.on_device(index), change.to(target.device)
    originals = target.take(start, stop, index)
    target.put(start, stop, index, change.add_(originals).to(originals.dtype))
    return index, originals


def sum_rows(
    deltas: Sequence[WeightedDelta], start: int, stop: int
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The weighted sum of deltas of one shape, rows start … stop - 1, as :meth:`Delta.read`."""
    deltas = flat_terms(deltas)
    if len(deltas) == 1:
        return deltas[0].read(start, stop)
    parts = [weighted.delta.read(start, stop) for weighted in deltas]
    lists = [index for index, _ in parts if index is not None]
    if len(lists) == len(parts) and compiled.available():
        index, aligned = compiled.union(lists, [values.contiguous() for _, values in parts])
        total = torch.zeros(len(index))
        for row, weighted in zip(aligned, deltas, strict=True):
            total += row * weighted.weight
        return index, total
    size = (stop - start) * deltas[0].delta.columns
    total = torch.zeros(size)
    touched: torch.Tensor | None = torch.zeros(size, dtype=torch.bool)
    for (places, values), weighted in zip(parts, deltas, strict=True):
        values.mul_(weighted.weight)
        if places is None:
            total += values
            touched = None
        else:
            total[places] += values  # assigns: a position that comes twice counts once
            if touched is not None:
                touched[places] = True
    if touched is None:
        return None, total
    index = touched.nonzero().squeeze(1)
    return index, total[index]


def add_rows(
    base: torch.Tensor, deltas: Sequence[WeightedDelta], start: int, stop: int
) -> torch.Tensor:
    """Rows start … stop - 1 of base plus deltas, flat, rounded once to the dtype of `base`.

    The same as :func:`apply_rows` on a copy.

    Args:
        base: those rows, (n * columns,).
    """
    deltas = flat_terms(deltas)
    usable = compiled.can_use(base) and base.is_contiguous()
    if len(deltas) > 1 and usable:
        # What nobody changes has -0.0 added to it, which leaves every bit of it alone.
        total = torch.full((len(base),), -0.0)
        for weighted in deltas:
            weighted.delta.add_to(total, weighted.weight, start, stop)
        return compiled.add(base, total)
    if usable and deltas[0].weight == 1.0:
        dense = deltas[0].delta.read_dense(start, stop)
        if dense is not None:
            return compiled.add(base, dense)
    index, change = sum_rows(deltas, start, stop)
    if index is None and usable:
        return compiled.add(base, change.contiguous())
    if index is None:
        return change.add_(base.to(torch.float32)).to(base.dtype)
    made = base.clone()
    if usable:
        compiled.add_at(made, index, change, keep=False)
    else:
        made[index] = change.add_(base[index].to(torch.float32)).to(base.dtype)
    return made


def flat_terms(deltas: Sequence[WeightedDelta]) -> list[WeightedDelta]:
    """With every sum replaced by what it sums."""
    found: list[WeightedDelta] = []
    for weighted in deltas:
        terms = weighted.delta.terms()
        if terms is None:
            found.append(weighted)
        else:
            found += flat_terms(
                [WeightedDelta(term.delta, term.weight * weighted.weight) for term in terms]
            )
    return found
