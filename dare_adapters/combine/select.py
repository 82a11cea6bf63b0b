"""The k largest entries of deltas, by selection: no sort, and memory for a few entries only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dare_adapters.delta import Delta, NoChange
from dare_adapters.sparse_delta import SparseDelta

__all__ = ["Threshold", "largest"]

_SAMPLE = 1 << 15
# Standard deviations of a sampled quantile that the bracket around it spans.
_MARGIN = 5.0
# A magnitude that one entry of a sample in so many has is counted before others are sought.
_HEAVY = 256
# How much further it reaches each time that it turns out not to hold the threshold.
_WIDEN = 4.0


@dataclass(frozen=True)
class Threshold:
    """Which entries of one delta are among the largest.

    All whose magnitude is above `value`, and of those equal to it the first ones: up to position
    `last`.

    Attributes:
        value: a magnitude; negative: every entry, infinite: none.
        last: flat position of the last equal entry kept; `math.inf`: all are, -1: none is.
    """

    value: float
    last: float = math.inf

    def keeps(
        self, magnitudes: torch.Tensor, index: torch.Tensor | None, offset: int
    ) -> torch.Tensor:
        """Which of some entries are kept, bool (m,).

        Args:
            magnitudes: float32 (m,).
            index: their positions, (m,), or None: consecutive.
            offset: flat position in the parameter of index 0.
        """
        if self.last == math.inf:
            return magnitudes >= self.value
        keep = magnitudes > self.value
        limit = int(self.last) - offset
        if limit < 0:
            return keep
        equal = magnitudes == self.value
        if index is None:
            equal[limit + 1 :] = False
        else:
            equal &= index <= limit
        return keep.logical_or_(equal)


EVERYTHING, NOTHING = Threshold(-1.0), Threshold(math.inf, -1)


def largest(deltas: Sequence[Delta], keep: int) -> list[Threshold]:
    """The thresholds, one for each delta, that leave the `keep` entries of largest magnitude.

    Exactly as many, of equal ones the first. Entries that no delta stores are zeros and count for
    nothing: where fewer than `keep` are stored, all of them stay.

    Args:
        deltas: one, or all of a model in an order that is always the same.
    """
    if keep >= sum(_at_most(delta) for delta in deltas):
        return [EVERYTHING] * len(deltas)
    if keep <= 0:
        return [NOTHING] * len(deltas)
    coded = [delta for delta in deltas if isinstance(delta, SparseDelta)]
    if len(coded) == len(deltas) and all(delta.counts_magnitudes for delta in coded):
        return _largest_codes(coded, keep)
    return _selected(deltas, keep)


def _selected(deltas: Sequence[Delta], keep: int) -> list[Threshold]:
    """:func:`largest` where magnitudes have to be compared: in a bracket from a sample."""
    about = max(1, sum(delta.rows * delta.entries_per_row for delta in deltas))
    sample, share = _sample(deltas, about), min(1.0, keep / about)
    found = _heavy(deltas, sample, share, keep)
    if found is not None:
        return found
    slack = _MARGIN * math.sqrt(max(share * (1 - share), 1e-4) / max(len(sample), 1))
    low, high = _quantile(sample, 1 - share - slack), _quantile(sample, 1 - share + slack)
    while True:
        above, inside = _count(deltas, low, high)
        held = sum(len(part) for part in inside)
        slack *= _WIDEN
        if above >= keep:  # the sample misled
            low, high = high, _quantile(sample, 1 - share + slack)
        elif above + held >= keep:
            break
        elif low > 0:
            low, high = _quantile(sample, 1 - share - slack), low
        else:  # fewer than `keep` entries are stored at all
            return [EVERYTHING] * len(deltas)
    contested, wanted = torch.cat(inside), keep - above
    value = float(contested.kthvalue(len(contested) - wanted + 1).values)
    spare = wanted - int((contested > value).sum())
    if spare == int((contested == value).sum()):
        return [Threshold(value)] * len(deltas)
    return _cut_between_equals(deltas, value, spare)


def _heavy(
    deltas: Sequence[Delta], sample: torch.Tensor, share: float, keep: int
) -> list[Threshold] | None:
    """Thresholds at a magnitude that many entries share, or None: it is another one.

    Differences of 16-bit weights have few magnitudes; then counting takes the place of selecting.
    """
    value = _quantile(sample, 1 - share)
    if not 0 < value < math.inf or int((sample == value).sum()) * _HEAVY < len(sample):
        return None
    counts = [[delta.count_around(value, *rows) for rows in delta.row_ranges()] for delta in deltas]
    above = sum(more for of_delta in counts for more, _ in of_delta)
    equal = sum(same for of_delta in counts for _, same in of_delta)
    number = keep - above
    if not 0 < number <= equal:
        return None
    if number == equal:
        return [Threshold(value)] * len(deltas)
    found = []
    for delta, of_delta in zip(deltas, counts, strict=True):
        last: float = math.inf if number > 0 else -1
        for (start, stop), (_, same) in zip(delta.row_ranges(), of_delta, strict=True):
            if 0 < number <= same:
                place = delta.equal_to(value, number, start, stop)[1]
                assert place is not None
                last = start * delta.columns + place
            number -= same
        found.append(Threshold(value, last))
    return found


def _at_most(delta: Delta) -> int:
    """A bound of how many entries are stored; `entries_per_row` is none."""
    if isinstance(delta, NoChange):
        return 0
    if isinstance(delta, SparseDelta):
        return delta.support.slot_count
    return delta.rows * delta.columns


def _sample(deltas: Sequence[Delta], stored: int) -> torch.Tensor:
    """Magnitudes of one entry in so many of every delta, sorted."""
    found = [torch.zeros(0)]
    for delta in deltas:
        ranges = list(delta.row_ranges())
        some = ranges[:: max(1, len(ranges) // 4)]
        step = max(1, stored * len(some) // (_SAMPLE * max(len(ranges), 1)))
        found += [delta.read(start, stop)[1][::step].abs() for start, stop in some]
    return torch.cat(found).sort().values


def _quantile(sample: torch.Tensor, share: float) -> float:
    """The magnitude below which about a share of a sorted sample lies."""
    if share <= 0:
        return 0.0
    place = math.ceil(share * len(sample))
    return float(sample[place]) if place < len(sample) else math.inf


def _count(deltas: Sequence[Delta], low: float, high: float) -> tuple[int, list[torch.Tensor]]:
    """How many magnitudes are above `high`, and those from `low` to `high`."""
    above, inside = 0, []
    for delta in deltas:
        for start, stop in delta.row_ranges():
            more, reach = delta.between(low, high, start, stop)
            above += more
            inside.append(reach)
    return above, inside


def _cut_between_equals(deltas: Sequence[Delta], value: float, number: int) -> list[Threshold]:
    """Thresholds that keep the first `number` entries of magnitude `value`."""
    found = []
    for delta in deltas:
        last: float = math.inf if number > 0 else -1
        for start, stop in delta.row_ranges() if number > 0 else ():
            equal, place = delta.equal_to(value, number, start, stop)
            number -= equal
            if place is not None:
                last = start * delta.columns + place
                break
        found.append(Threshold(value, last))
    return found


def _largest_codes(deltas: Sequence[SparseDelta], keep: int) -> list[Threshold]:
    """:func:`largest` of packed codes, of which a row has few: they are counted."""
    counted = [delta.magnitude_counts(0, delta.rows) for delta in deltas]
    magnitudes = torch.cat([sizes.reshape(-1) for sizes, _ in counted])
    counts = torch.cat([numbers.reshape(-1) for _, numbers in counted])
    value, above, equal = _weighted_largest(magnitudes.numpy(), counts.numpy(), keep)
    if value < 0:
        return [EVERYTHING] * len(deltas)
    number = keep - above
    if number == equal:
        return [Threshold(value)] * len(deltas)
    found = []
    for delta, (sizes, numbers) in zip(deltas, counted, strict=True):
        last: float = math.inf if number > 0 else -1
        if number > 0:
            of_row = (numbers * (sizes == value)).sum(dim=1, dtype=torch.int64).cumsum(0)
            row = int(torch.searchsorted(of_row, number))
            if row < delta.rows:
                before = int(of_row[row - 1]) if row else 0
                place = delta.equal_to(value, number - before, row, row + 1)[1]
                assert place is not None
                last, number = row * delta.columns + place, 0
            elif delta.rows:
                number -= int(of_row[-1])
        found.append(Threshold(value, last))
    return found


def _weighted_largest(
    magnitudes: np.ndarray, counts: np.ndarray, keep: int
) -> tuple[float, int, int]:
    """The magnitude of number `keep` from the top, how many are above it, and how many equal it.

    Args:
        magnitudes: float32 (n,), not negative.
        counts: how often each occurs.

    Returns:
        The first is -1 where there are not so many.
    """
    # The upper half of a float's bits is in its order; only among equal ones is anything sorted.
    upper = (magnitudes.view(np.uint32) >> 16).astype(np.int64)
    reached = np.bincount(upper, counts, minlength=1)[::-1].cumsum()
    if not len(reached) or reached[-1] < keep:
        return -1.0, 0, 0
    bucket = int(np.searchsorted(reached, keep))
    above = int(reached[bucket - 1]) if bucket else 0
    inside = upper == len(reached) - 1 - bucket
    sizes, numbers = magnitudes[inside], counts[inside]
    order = np.argsort(-sizes, kind="stable")
    number = int(np.searchsorted(above + numbers[order].cumsum(), keep))
    value = sizes[order[number]]
    above += int(numbers[sizes > value].sum())
    return float(value), above, int(numbers[sizes == value].sum())
