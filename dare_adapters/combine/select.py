"""The k largest entries of deltas, by selection: no sort, and memory for a few entries only."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from dare_adapters.delta import Delta

__all__ = ["Threshold", "largest"]

_SAMPLE = 1 << 15
# Standard deviations of a sampled quantile that the bracket around it spans.
_MARGIN = 5.0


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
    stored = sum(_stored(delta) for delta in deltas)
    if keep >= stored:
        return [EVERYTHING] * len(deltas)
    if keep <= 0:
        return [NOTHING] * len(deltas)
    low, high = _bracket(deltas, keep / stored)
    while True:
        above, inside = _count(deltas, low, high)
        contested = torch.cat(inside) if inside else torch.zeros(0)
        if above >= keep and high < math.inf:
            low, high = high, math.inf
        elif above + len(contested) < keep and low > 0:
            low, high = 0.0, low
        else:
            break
    wanted = keep - above
    if wanted > len(contested):  # fewer than `keep` entries are stored at all
        return [EVERYTHING] * len(deltas)
    value = float(contested.kthvalue(len(contested) - wanted + 1).values)
    spare = wanted - int((contested > value).sum())
    if spare == int((contested == value).sum()):
        return [Threshold(value)] * len(deltas)
    return _cut_between_equals(deltas, value, spare)


def _stored(delta: Delta) -> int:
    return min(delta.rows * delta.columns, delta.rows * delta.entries_per_row + delta.rows)


def _magnitudes(delta: Delta) -> Iterator[tuple[int, torch.Tensor | None, torch.Tensor]]:
    """Start row, index, |values| of each range; a position that comes twice comes once."""
    for start, stop in delta.row_ranges():
        index, values = delta.read(start, stop)
        if index is not None:
            index, values = _once(index, values)
        yield start, index, values.abs_()


def _once(index: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Without repeated positions, which follow each other."""
    if len(index) < 2:
        return index, values
    repeated = index[1:] == index[:-1]
    if not bool(repeated.any()):
        return index, values
    keep = torch.cat([torch.ones(1, dtype=torch.bool), ~repeated])
    return index[keep], values[keep]


def _bracket(deltas: Sequence[Delta], share: float) -> tuple[float, float]:
    """Magnitudes between which the threshold almost surely lies, from a sample."""
    found = []
    for delta in deltas:
        ranges = list(delta.row_ranges())
        some = ranges[:: max(1, len(ranges) // 4)]
        each = max(64, _SAMPLE // (len(some) * len(deltas)))
        for start, stop in some:
            values = delta.read(start, stop)[1]
            found.append(values[:: max(1, len(values) // each)].abs())
    sample = torch.cat(found).sort().values if found else torch.zeros(0)
    count = len(sample)
    if not count:
        return 0.0, math.inf
    slack = _MARGIN * math.sqrt(max(share * (1 - share), 1 / count) / count)
    low, high = 1 - share - slack, 1 - share + slack
    return (
        float(sample[int(low * count)]) if low > 0 else 0.0,
        float(sample[min(int(high * count) + 1, count - 1)]) if high < 1 else math.inf,
    )


def _count(deltas: Sequence[Delta], low: float, high: float) -> tuple[int, list[torch.Tensor]]:
    """How many magnitudes are above `high`, and those from `low` to `high`."""
    above, inside = 0, []
    for delta in deltas:
        for _, _, magnitudes in _magnitudes(delta):
            reach = magnitudes[magnitudes >= low]
            over = reach > high
            above += int(over.sum())
            inside.append(reach[~over])
    return above, inside


def _cut_between_equals(deltas: Sequence[Delta], value: float, number: int) -> list[Threshold]:
    """Thresholds that keep the first `number` entries of magnitude `value`."""
    found = []
    for delta in deltas:
        last: float = math.inf if number > 0 else -1
        for start, index, magnitudes in _magnitudes(delta) if number > 0 else ():
            equal = (magnitudes == value).nonzero().squeeze(1)
            if len(equal) >= number:
                places = equal if index is None else index[equal].sort().values
                last = start * delta.columns + int(places[number - 1])
                number = 0
                break
            number -= len(equal)
        found.append(Threshold(value, last))
    return found
