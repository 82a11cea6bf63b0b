"""The entries that differ between two mixtures over one base, as replacement values.

Where windows into the running model are known they are written at once, a few rows at a time;
else they are vLLM's patches, which stage a whole tensor for each.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from vllm.model_executor.model_loader.checkpoint_weight_patch import CheckpointWeightPatch

from dare_adapters.delta import Delta, WeightedDelta
from dare_adapters.row_sums import sum_rows
from dare_vllm.hot_swap.windows import Window
from dare_vllm.merged_weights import MergedWeights, plain_torch

__all__ = ["make_patches", "make_whole_patches", "write_entries"]

# Entries of one step.
_STEP = 1 << 20


def write_entries(
    windows: Sequence[Window], target: MergedWeights, other: MergedWeights, name: str
) -> int:
    """Make a parameter of `other` that of `target` where a model holds it.

    Args:
        windows: into the model.
        target, other: of one base, with tensors of the same names and shapes.
        name: of a parameter of the base that either changes.

    Returns:
        How many entries were written.
    """
    base = target.base[name].detach()
    with plain_torch():
        return sum(
            _write(windows, index, values)
            for index, values in _steps(base, target.delta(name), other.delta(name))
        )


def make_patches(
    target: MergedWeights,
    other: MergedWeights,
    pool: ThreadPoolExecutor,
    device: torch.device,
    written: Collection[str] = (),
) -> Iterator[CheckpointWeightPatch]:
    """What `target` has wherever it or `other` differs from the base, computed from the base.

    Written over `other` it makes `target`; the values are those of :class:`MergedWeights`, bit for
    bit.

    Args:
        target, other: of one base, with tensors of the same names and shapes.
        pool: for parameters that are replaced whole.
        device: where the patches are to be.
        written: parameters that have been written already.
    """
    whole = sorted({*target.new, *other.new})
    for name in sorted({*target.changed, *other.changed} - set(whole) - set(written)):
        base = target.base[name]
        with plain_torch():
            index, values = _entries(base, target.delta(name), other.delta(name))
        shape = target.shapes[target.renamed(name)]
        copies = {**other.copies, **target.copies}
        for own in (name, *(head for head, copied in copies.items() if copied == name)):
            yield _patch(target.renamed(own), shape, index, values, device)
    yield from _whole(target, whole, pool, device)


def make_whole_patches(
    target: MergedWeights,
    other: MergedWeights,
    pool: ThreadPoolExecutor,
    device: torch.device,
    written: Collection[str] = (),
) -> Iterator[CheckpointWeightPatch]:
    """All of `target` in every parameter that it or `other` changes; of `other` nothing is read.

    For when it cannot be: what failed while it was computed fails again.

    Args:
        target, other, pool, device, written: as for :func:`make_patches`.
    """
    changed = {*target.changed, *other.changed, *target.copies, *other.copies}
    names = {*changed, *target.new, *other.new} - set(written)
    yield from _whole(target, sorted(names), pool, device)


def _whole(
    target: MergedWeights, names: Sequence[str], pool: ThreadPoolExecutor, device: torch.device
) -> Iterator[CheckpointWeightPatch]:
    for name in names:
        if name in target.new:
            own, value = target.new[name], target.new_value(name)
        else:
            copied = target.copies.get(name, name)
            own, value = target.renamed(name), target.merged(copied, target.base[copied], pool)
        index = torch.arange(value.numel())
        yield _patch(own, tuple(value.shape), index, value.reshape(-1), device)


def _patch(
    name: str,
    shape: tuple[int, ...],
    index: torch.Tensor,
    values: torch.Tensor,
    device: torch.device,
) -> CheckpointWeightPatch:
    return CheckpointWeightPatch(name, shape, values.dtype, values.to(device), index.to(device))


def _write(windows: Sequence[Window], index: torch.Tensor, values: torch.Tensor) -> int:
    for window in windows:
        window.write(index, values)
    return len(index)


def _entries(
    base: torch.Tensor, target: Delta | None, other: Delta | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat positions, int64 (m,), of the union of two supports, and what `target` has there."""
    found = list(_steps(base, target, other))
    return torch.cat([index for index, _ in found]), torch.cat([values for _, values in found])


def _steps(
    base: torch.Tensor, target: Delta | None, other: Delta | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The same, of some rows at a time: what `target` changes, and what `other` alone does."""
    any_delta = target if target is not None else other
    assert any_delta is not None
    rows, columns = any_delta.rows, any_delta.columns
    flat = base.detach().reshape(-1)
    step = max(1, _STEP // max(columns, 1))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        first, part = start * columns, flat[start * columns : stop * columns]
        index: torch.Tensor | None = torch.empty(0, dtype=torch.int64)
        if target is not None:
            index, change = sum_rows([WeightedDelta(target)], start, stop)
            before = part if index is None else part[index]
            made = change.add_(before.to(torch.float32)).to(part.dtype)
            place = torch.arange(len(part)) if index is None else index
            yield place + first, made
        if other is not None and index is not None:
            alone = torch.zeros(len(part), dtype=torch.bool)
            there = other.read(start, stop)[0]
            if there is None:
                place = alone.index_fill_(0, index, True).logical_not_().nonzero().squeeze(1)
            else:
                place = there[~alone.index_fill_(0, index, True)[there]]
            yield place + first, part[place]
    added = target.added_rows if target is not None else None
    if added is not None:
        place = torch.arange(len(flat), len(flat) + added.numel())
        yield place, added.reshape(-1).to(base.dtype)
    for delta in (target, other):
        if delta is not None:
            delta.release()
