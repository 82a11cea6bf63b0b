"""SCE: select what differs most, calculate coefficients from it, erase the minority's signs.

Wan et al., "FuseChat: Knowledge Fusion of Chat Models", 2024 (arXiv 2408.07990).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from dare_adapters.combine.arguments import number
from dare_adapters.combine.consensus import one_of
from dare_adapters.combine.registry import delta_method
from dare_adapters.combine.select import Threshold, largest
from dare_adapters.combine.union import Elementwise, read_union
from dare_adapters.delta import Delta, NoChange

__all__ = ["sce"]

MERGED = ("selected", "all")
# Entries that are read at a time, and of those, whose deviation is computed: in the caches.
_ENTRIES, _COLUMNS = 1 << 17, 1 << 14


@delta_method("sce")
def sce(
    deltas: Sequence[Delta],
    weights: Sequence[float],
    *,
    select_topk: float = 1.0,
    merged: str = "selected",
    floor: float = 0.0,
    lambda_: float = 1.0,
) -> Delta:
    """λ Σ wᵢ ηᵢ δ'ᵢ / Σ ηᵢ over the deltas that have an entry's majority sign.

    Select: the entries of largest variance between the deltas, a share `select_topk` of those in
    which they vary at all. Calculate: ηᵢ = mean δᵢ² / Σⱼ mean δⱼ², of the selected entries of the
    whole parameter. Erase: δ' has those values whose sign is that of the sum.

    | | merged | floor | weights |
    |---|---|---|---|
    | the paper (the default) | selected | 0 | 1 |
    | the authors' code | all | 0 | 1 |
    | mergekit | selected | 1e-6 | 1 |

    Args:
        deltas: of one parameter; one alone does not vary: with `select_topk` below 1 nothing of
            it is selected.
        weights: one for each; factors of its values after all else, without a vote.
        select_topk: 1 selects everything.
        merged: whether "selected" entries are merged or "all", with the same coefficients.
        floor: where Σ mean δ² is less, all ηᵢ are equal; no Σ ηᵢ over agreeing deltas counts for
            less.
        lambda_: factor of the result.
    """
    one_of(merged, MERGED, "merged")
    share, floor = number(select_topk, "select_topk", 0, 1), number(floor, "floor", 0)
    if len(deltas) == 1 and share == 1 and weights[0] * lambda_ == 1:
        return deltas[0]
    if share == 0 and merged == "selected":
        return NoChange(deltas[0].shape)
    factors = [float(weight) * lambda_ for weight in weights]
    return _Sce(deltas, factors, share, merged == "selected", floor)


class _Sce(Delta):
    def __init__(
        self,
        deltas: Sequence[Delta],
        factors: Sequence[float],
        select_topk: float,
        selected_only: bool,
        floor: float,
    ) -> None:
        super().__init__(deltas[0].shape)
        self.deltas, self.factors = tuple(deltas), tuple(factors)
        self.select_topk, self.selected_only, self.floor = select_topk, selected_only, floor
        self._spread = Elementwise(self.deltas, _deviation)
        self._lock = threading.Lock()
        self._found: tuple[Threshold | None, list[float]] | None = None

    @property
    def entries_per_row(self) -> int:
        every = self._spread.entries_per_row
        return max(1, math.ceil(every * self.select_topk)) if self.selected_only else every

    def read(self, start: int, stop: int) -> tuple[torch.Tensor | None, torch.Tensor]:
        threshold, coefficients = self._plan
        if not self.selected_only or threshold is None:
            index, values = read_union(self.deltas, start, stop)
            return index, self._erased_mean(values, coefficients)
        places, parts = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0)]
        for first, last in self._steps(start, stop):  # many are read of which few are selected
            index, values = self._select(threshold, first, *read_union(self.deltas, first, last))
            places.append(index.add_((first - start) * self.columns))
            parts.append(self._erased_mean(values, coefficients))
        return torch.cat(places), torch.cat(parts)

    def release(self) -> None:
        self._spread.release()

    @property
    def _plan(self) -> tuple[Threshold | None, list[float]]:
        """What is selected, None: everything; η, one for each delta."""
        with self._lock:
            if self._found is None:
                threshold = None
                if self.select_topk < 1:
                    varying = sum(int(_deviation(v).count_nonzero()) for _, _, v in self._ranges())
                    threshold = largest([self._spread], int(varying * self.select_topk))[0]
                self._found = threshold, self._coefficients(threshold)
            return self._found

    def _coefficients(self, threshold: Threshold | None) -> list[float]:
        squares = np.zeros(len(self.deltas))
        for start, index, every in self._ranges():
            values = every if threshold is None else self._select(threshold, start, index, every)[1]
            # NumPy's sum does not depend on how many threads there are.
            squares += [np.square(row, dtype=np.float64).sum() for row in values.numpy()]
        means = (squares / max(self.rows * self.columns, 1)).tolist()
        total = math.fsum(means)
        if total == 0 or total < self.floor:
            return [1 / len(means)] * len(means)
        return [mean / total for mean in means]

    def _steps(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        step = max(1, _ENTRIES // max(self._spread.entries_per_row, 1))
        for first in range(start, stop, step):
            yield first, min(first + step, stop)

    def _ranges(self) -> Iterator[tuple[int, torch.Tensor | None, torch.Tensor]]:
        """Start row, index and values (k, m) of each range, every position once."""
        for start, stop in self._steps(0, self.rows):
            index, values = read_union(self.deltas, start, stop)
            if index is not None and len(index) > 1:
                once = torch.ones(len(index), dtype=torch.bool)
                torch.ne(index[1:], index[:-1], out=once[1:])
                if not bool(once.all()):
                    index, values = index[once], values[:, once]
            yield start, index, values

    def _select(
        self, threshold: Threshold, start: int, index: torch.Tensor | None, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keep = threshold.keeps(_deviation(values), index, start * self.columns)
        place = keep.nonzero().squeeze(1)
        return (place if index is None else index[place]), values[:, place]

    def _erased_mean(self, values: torch.Tensor, coefficients: Sequence[float]) -> torch.Tensor:
        positive = _sum(values) >= 0
        result, shares = torch.zeros(values.shape[1]), torch.zeros(values.shape[1])
        for row, coefficient, factor in zip(values, coefficients, self.factors, strict=True):
            share = torch.where(positive, row > 0, row < 0) * coefficient
            shares += share
            result += row.mul_(share).mul_(factor)
        return result.div_(shares.clamp_(min=max(self.floor, torch.finfo(torch.float32).tiny)))


def _deviation(values: torch.Tensor) -> torch.Tensor:
    """Standard deviation of each column of (k, m), float32 (m,): in the order of the variance.

    In double precision, so that what is equal comes out equal, and without underflow.
    """
    found = torch.empty(values.shape[1])
    for first in range(0, len(found), _COLUMNS):
        rows = values[:, first : first + _COLUMNS].to(torch.float64)
        rows -= _sum(rows).div_(len(rows))
        variance = _sum(rows.square_()).div_(len(rows))
        found[first : first + _COLUMNS] = variance.sqrt_()
    return found


def _sum(rows: torch.Tensor) -> torch.Tensor:
    """In their order; torch.sum's depends on how many columns there are."""
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return total
