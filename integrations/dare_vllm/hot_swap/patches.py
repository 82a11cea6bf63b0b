"""The entries that differ between two mixtures over one base, as replacement values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from vllm.model_executor.model_loader.checkpoint_weight_patch import CheckpointWeightPatch

from dare_adapters.delta import Delta, WeightedDelta
from dare_adapters.row_sums import sum_rows
from dare_vllm.merged_weights import MergedWeights, plain_torch

__all__ = ["make_patches", "make_whole_patches"]

# Entries of one step.
_STEP = 1 << 20


def make_patches(
    target: MergedWeights, other: MergedWeights, pool: ThreadPoolExecutor, device: torch.device
) -> Iterator[CheckpointWeightPatch]:
    """What `target` has wherever it or `other` differs from the base, computed from the base.

    Written over `other` it makes `target`; the values are those of :class:`MergedWeights`, bit for
    bit.

    Args:
        target, other: of one base, with tensors of the same names and shapes.
        pool: for parameters that are replaced whole.
        device: where the patches are to be.
    """
    whole = sorted({*target.new, *other.new})
    for name in sorted({*target.changed, *other.changed} - set(whole)):
        base = target.base[name]
        with plain_torch():
            index, values = _entries(base, target.delta(name), other.delta(name))
        shape = target.shapes[target.renamed(name)]
        copies = {**other.copies, **target.copies}
        for own in (name, *(head for head, copied in copies.items() if copied == name)):
            yield _patch(target.renamed(own), shape, index, values, device)
    yield from _whole(target, whole, pool, device)


def make_whole_patches(
    target: MergedWeights, other: MergedWeights, pool: ThreadPoolExecutor, device: torch.device
) -> Iterator[CheckpointWeightPatch]:
    """All of `target` in every parameter that it or `other` changes; of `other` nothing is read.

    For when it cannot be: what failed while it was computed fails again.

    Args:
        target, other, pool, device: as for :func:`make_patches`.
    """
    changed = {*target.changed, *other.changed, *target.copies, *other.copies}
    yield from _whole(target, sorted({*changed, *target.new, *other.new}), pool, device)


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


def _entries(
    base: torch.Tensor, target: Delta | None, other: Delta | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat positions, int64 (m,), of the union of two supports, and what `target` has there."""
    any_delta = target if target is not None else other
    assert any_delta is not None
    rows, columns = any_delta.rows, any_delta.columns
    flat = base.detach().reshape(-1)
    found, values = [], []
    step = max(1, _STEP // max(columns, 1))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        part = flat[start * columns : stop * columns].clone()
        touched = torch.zeros(len(part), dtype=torch.bool)
        if other is not None:
            _mark(touched, other.read(start, stop)[0])
        if target is not None:
            index, change = sum_rows([WeightedDelta(target)], start, stop)
            _mark(touched, index)
            if index is None:
                part = change.add_(part.to(torch.float32)).to(part.dtype)
            else:
                part[index] = change.add_(part[index].to(torch.float32)).to(part.dtype)
        places = touched.nonzero().squeeze(1)
        found.append(places + start * columns)
        values.append(part[places])
    added = target.added_rows if target is not None else None
    if added is not None:
        found.append(torch.arange(len(flat), len(flat) + added.numel()))
        values.append(added.reshape(-1).to(base.dtype))
    for delta in (target, other):
        if delta is not None:
            delta.release()
    return torch.cat(found), torch.cat(values)


def _mark(touched: torch.Tensor, index: torch.Tensor | None) -> None:
    if index is None:
        touched.fill_(True)
    else:
        touched[index] = True
