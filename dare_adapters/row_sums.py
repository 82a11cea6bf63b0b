"""Deltas summed, and added to rows of a base.

A live model and an exported checkpoint agree bit for bit because all deltas are summed in float32,
added to the base in float32, and rounded once, here and nowhere else. `_rows.c` repeats that for
the commonest case, and tests hold the two equal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dare_adapters import compiled
from dare_adapters.compiled_merge import can_merge, merge_rows
from dare_adapters.delta import WeightedDelta
from dare_adapters.matrix import MatrixView
from dare_adapters.memory_block import MemoryBlock

__all__ = ["add_rows", "apply_rows", "flat_terms", "sum_rows"]


def apply_rows(
    target: MatrixView,
    deltas: Sequence[WeightedDelta],
    start: int,
    stop: int,
    memory: MemoryBlock | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Add the deltas to rows start … stop - 1 of `target`, which holds base values, in place.

    Args:
        memory: where what was there is kept, as far as it is made for that.

    Returns:
        index: where was written, int64 (m,) relative to row `start`; None: everywhere, or where
            the one delta's :meth:`Delta.positions` say.
        originals: what was there, (m,) in the dtype of `target`.
    """
    deltas = flat_terms(deltas)
    if len(deltas) == 1:
        kept = deltas[0].delta.apply_compiled(target, deltas[0].weight, start, stop, memory)
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
    merged = _merged_onto(base, deltas, start, stop)
    if merged is not None:
        return merged
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


def _merged_onto(
    base: torch.Tensor, deltas: Sequence[WeightedDelta], start: int, stop: int
) -> torch.Tensor | None:
    """:func:`add_rows` in one pass, where what the deltas keep lies in memory; else None."""
    if not can_merge(base):
        return None
    if len(deltas) == 1 and deltas[0].weight == 1.0:
        return deltas[0].delta.merged_onto(base, start, stop)
    kept = []
    for weighted in deltas:
        own = weighted.delta.kept_rows(start, stop)
        if own is None:
            return None
        kept.append(own)
    weights = [weighted.weight for weighted in deltas]
    return merge_rows(base, kept, weights, start * deltas[0].delta.columns)


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
