"""Several deltas of one parameter at every position that any of them changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from dare_adapters import compiled
from dare_adapters.combine import loops
from dare_adapters.combine.consensus import DisjointMerge
from dare_adapters.compiled_merge import merge_rows
from dare_adapters.delta import Delta, WeightedDelta

__all__ = ["Elementwise", "WeightedSum", "read_union"]

# Where one entry in so many changes, all are gone through sooner than positions are aligned.
_DENSE_BLOCK = 8


def read_union(
    deltas: Sequence[Delta], start: int, stop: int
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The changes of rows start … stop - 1, aligned.

    Returns:
        index: int64 (m,), positions relative to row `start`, or None: all.
        values: float32 (k, m), a row for each delta; 0 where a delta does not change an entry.
    """
    parts = [delta.read(start, stop) for delta in deltas]
    if len(parts) == 1:
        return parts[0][0], parts[0][1][None]
    if _share_support(deltas):
        return parts[0][0], torch.stack([values for _, values in parts])
    size = (stop - start) * deltas[0].columns
    sparse = [index for index, _ in parts if index is not None]
    if len(sparse) < len(parts):
        dense = torch.zeros(len(parts), size)
        for row, (index, values) in zip(dense, parts, strict=True):
            if index is None:
                row.copy_(values)
            else:
                row[index] = values
        return None, dense
    if compiled.available():
        lists = [index for index, _ in parts if index is not None]
        return compiled.union(lists, [values.contiguous() for _, values in parts])
    touched = torch.zeros(size, dtype=torch.bool)
    for index in sparse:
        touched[index] = True
    union = touched.nonzero().squeeze(1)
    place = torch.empty(size, dtype=torch.int32)
    place[union] = torch.arange(len(union), dtype=torch.int32)
    values = torch.zeros(len(parts), len(union))
    for row, (index, own) in zip(values, parts, strict=True):
        row[place[index].to(torch.int64)] = own
    return union, values


def _share_support(deltas: Sequence[Delta]) -> bool:
    first = deltas[0].support_key
    return first is not None and all(delta.support_key == first for delta in deltas[1:])


class Elementwise(Delta):
    """A delta each entry of which depends on the same entry of other deltas alone.

    Args:
        deltas: k of one shape.
        function: values float32 (k, m) -> (m,); 0 wherever all values are 0. It may use the
            values' memory.
    """

    def __init__(
        self, deltas: Sequence[Delta], function: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        super().__init__(deltas[0].shape)
        self.deltas, self.function = tuple(deltas), function

    @property
    def entries_per_row(self) -> int:
        return min(self.columns, sum(delta.entries_per_row for delta in self.deltas))

    @property
    def row_cost(self) -> int:
        return sum(delta.row_cost for delta in self.deltas)

    @property
    def support_key(self) -> object | None:
        return self.deltas[0].support_key if _share_support(self.deltas) else None

    def read(self, start: int, stop: int) -> tuple[torch.Tensor | None, torch.Tensor]:
        index, values = read_union(self.deltas, start, stop)
        return index, self.function(values)

    def read_dense(self, start: int, stop: int) -> torch.Tensor | None:
        if self.entries_per_row * _DENSE_BLOCK < self.columns or not loops.available():
            return None
        values = torch.empty(len(self.deltas), (stop - start) * self.columns)
        for row, delta in zip(values, self.deltas, strict=True):
            delta.fill(row, start, stop)
        signs = loops.untouched(values)
        merged = self.function(values)
        merged.view(torch.int32).bitwise_or_(signs)  # 0 there, which becomes -0
        return merged

    def merged_onto(self, base: torch.Tensor, start: int, stop: int) -> torch.Tensor | None:
        if not isinstance(self.function, DisjointMerge):
            return None
        kept = []
        for delta in self.deltas:
            own = delta.kept_rows(start, stop)
            if own is None:
                return None
            kept.append(own)
        offset, ones = start * self.columns, [1.0] * len(kept)
        return merge_rows(base, kept, ones, offset, self.function.election)

    @property
    def shows_damage(self) -> bool:
        return all(delta.shows_damage for delta in self.deltas)

    def preparations(self) -> list[Callable[[], object]]:
        return [one for delta in self.deltas for one in delta.preparations()]

    def release(self) -> None:
        for delta in self.deltas:
            delta.release()


class WeightedSum(Elementwise):
    """Σ wᵢ δᵢ, added in this order.

    Args:
        deltas: of one shape.
        weights: one for each.
    """

    def __init__(self, deltas: Sequence[Delta], weights: Sequence[float]) -> None:
        super().__init__(deltas, self._sum)
        self.weights = [float(weight) for weight in weights]

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(values.shape[1])
        for row, weight in zip(values, self.weights, strict=True):
            total += row * weight
        return total

    def terms(self) -> list[WeightedDelta]:
        pairs = zip(self.deltas, self.weights, strict=True)
        return [WeightedDelta(delta, weight) for delta, weight in pairs]
