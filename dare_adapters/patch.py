"""A live model's weights: patched in place where deltas touch them, restored bit for bit.

Attaching swaps the touched entries and remembers what was there, so it costs survivors and not
parameters, adds no modules, and leaves inference as fast as the base's. Nothing is ever added
and subtracted again: detaching puts the remembered bits back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from dare_adapters.delta import Delta, WeightedDelta
from dare_adapters.errors import ArchitectureMismatchError
from dare_adapters.live import LiveParameter, check_patchable
from dare_adapters.memory_block import MemoryBlock
from dare_adapters.parallel import worker_pool
from dare_adapters.row_sums import apply_rows
from dare_adapters.vocabulary import Resized, grow_rows, shrink_rows

__all__ = ["Change", "Patch", "check"]

Index = torch.Tensor | None
# Positions in a range of fewer entries are kept in 32 bits.
_INT32_ENTRIES = 1 << 31
# Where a step allocates nothing, its overhead is what makes many of them slow.
_STEPS_AT_ONCE = 4


@dataclass
class Change:
    """What is to become of one live parameter.

    Attributes:
        name: the checkpoint name, for messages.
        target: where it is.
        deltas: what is added, in this order.
        value: what replaces it instead (a task head).
        added_rows: vocabulary rows to append.
    """

    name: str
    target: LiveParameter
    deltas: list[WeightedDelta] = field(default_factory=list)
    value: torch.Tensor | None = None
    added_rows: torch.Tensor | None = None


@dataclass
class _Restorable:
    """How one change is undone: the original values of each range of rows, where they were."""

    change: Change
    shape: tuple[int, ...]
    ranges: list[tuple[int, int]]
    # One delta's support may tell the positions again; otherwise they are kept.
    written: list[tuple[Index, torch.Tensor] | None]
    recall: Delta | None = None
    resized: Resized | None = None
    original: torch.Tensor | None = None
    memory: MemoryBlock | None = None


class Patch:
    """All changes that are in a live model's weights at the moment."""

    def __init__(self) -> None:
        self._done: list[_Restorable] = []

    def __bool__(self) -> bool:
        return bool(self._done)

    def apply(self, model: nn.Module, changes: Sequence[Change]) -> None:
        """Make the changes, all or none. The weights must be the base's.

        Raises:
            UnsupportedParameterError: a parameter cannot be changed where it is.
            ArchitectureMismatchError: a parameter has another shape than its change.
        """
        assert not self._done, "restore before applying"
        for change in changes:
            check(model, change)
        try:
            for change in changes:
                self._done.append(self._prepare(model, change))
            memory = MemoryBlock(sum(_kept_bytes(model, item) for item in self._done))
            for item in self._done:
                item.memory = memory
            self._each_range(model, self._done, _write)
            for item in self._done:
                item.memory = None  # what was taken of it stays
        except BaseException:
            self.restore(model)
            raise

    def restore(self, model: nn.Module) -> None:
        """Put every original bit back."""
        self._each_range(model, self._done, _put_back)
        for item in self._done:
            owner = item.change.target.tensor(model)
            with _mode(owner):
                if item.original is not None:
                    owner.detach().copy_(item.original)
                if item.resized is not None:
                    shrink_rows(model, item.resized)
        self._done = []

    def forget(self) -> None:
        """Keep the changes as the model's own weights: nothing is left to restore."""
        self._done = []

    @property
    def owners(self) -> list[str]:
        """The parameters that are changed."""
        return list(dict.fromkeys(item.change.target.owner for item in self._done))

    def rows_before(self, owner: str) -> int | None:
        """How many rows a parameter had that has grown; None: none were added to it."""
        for item in self._done:
            if item.change.target.owner == owner and item.resized is not None:
                return item.resized.rows
        return None

    @property
    def nbytes(self) -> int:
        """Bytes held to restore the base."""
        total = 0
        for item in self._done:
            for part in item.written:
                if part is not None:
                    total += part[1].nbytes + (0 if part[0] is None else part[0].nbytes)
            total += 0 if item.original is None else item.original.nbytes
            total += 0 if item.resized is None else item.resized.overwritten.nbytes
        return total

    def _prepare(self, model: nn.Module, change: Change) -> _Restorable:
        """Grow what grows and replace what is replaced; entries are left to :func:`_write`."""
        owner = change.target.tensor(model)
        shape = change.deltas[0].delta.shape if change.deltas else tuple(owner.shape)
        ranges = list(change.deltas[0].delta.row_ranges()) if change.deltas else []
        if owner.device.type != "cpu" and ranges:
            ranges = [(0, ranges[-1][1])]  # launches cost more than memory there
        recall = None
        if len(change.deltas) == 1 and change.deltas[0].delta.recalls_positions:
            recall = change.deltas[0].delta
            if recall.kept_entries:  # nothing is computed beside the rows themselves
                ranges = _joined(ranges, _STEPS_AT_ONCE)
        item = _Restorable(change, shape, ranges, [None] * len(ranges), recall)
        with _mode(owner):
            if change.value is not None:
                item.original = owner.detach().clone()
                owner.detach().copy_(change.value)
            elif change.added_rows is not None:
                item.resized = grow_rows(model, change.target.owner, shape[0], change.added_rows)
        return item

    @staticmethod
    def _each_range(
        model: nn.Module,
        items: Iterable[_Restorable],
        work: Callable[[nn.Module, _Restorable, int], None],
    ) -> None:
        tasks: list[Callable[[], object]] = []
        items = list(items)
        for place, item in enumerate(items):
            if work is _write:  # thresholds of the next one, while this one is written
                for weighted in [w for i in items[place + 1 : place + 2] for w in i.change.deltas]:
                    tasks += weighted.delta.preparations()
            tasks += [partial(work, model, item, number) for number in range(len(item.ranges))]
        if not tasks:
            return
        with torch.no_grad(), worker_pool() as pool:
            _run(pool, tasks)


def _joined(ranges: Sequence[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """Each `count` consecutive ranges as one."""
    groups = [ranges[first : first + count] for first in range(0, len(ranges), count)]
    return [(group[0][0], group[-1][1]) for group in groups]


def _run(pool: ThreadPoolExecutor, tasks: Sequence[Callable[[], object]]) -> None:
    futures = [pool.submit(task) for task in tasks]
    wait(futures)  # at once: to be woken for each takes the workers' time
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise errors[0]


def _mode(owner: torch.Tensor) -> torch.inference_mode:
    """Inference mode for a parameter that was made in it, and for no other.

    Worker threads do not inherit the caller's mode, and a vocabulary that grew in it could not be
    changed outside it any more.
    """
    return torch.inference_mode(owner.is_inference())


def _write(model: nn.Module, item: _Restorable, number: int) -> None:
    start, stop = item.ranges[number]
    deltas = item.change.deltas
    view = item.change.target.view(model, item.shape)
    with _mode(view.storage):
        index, originals = apply_rows(view, deltas, start, stop, item.memory)
    keep = None
    if index is not None and item.recall is None:
        small = (stop - start) * view.columns < _INT32_ENTRIES
        keep = index.to(torch.int32) if small else index
    item.written[number] = (keep, originals)
    if all(part is not None for part in item.written):
        for weighted in deltas:
            weighted.delta.release()
        item.change.deltas = []  # what was computed is not needed again


def _kept_bytes(model: nn.Module, item: _Restorable) -> int:
    """What :func:`_write` will keep, as far as that is known ahead."""
    owner = item.change.target.tensor(model)
    if item.recall is None or owner.device.type != "cpu":
        return 0
    return item.recall.kept_entries * owner.element_size()


def _put_back(model: nn.Module, item: _Restorable, number: int) -> None:
    written = item.written[number]
    if written is None:
        return
    start, stop = item.ranges[number]
    view = item.change.target.view(model, item.shape)
    index, originals = written
    if index is not None:
        index = index.to(torch.int64)
    elif item.recall is not None:
        if item.recall.restore_compiled(view, originals, start, stop):
            item.written[number] = None
            return
        index = item.recall.positions(start, stop)
    values = originals.to(view.device, view.dtype)
    with _mode(view.storage):
        view.put(start, stop, view.on_device(index), values)
    item.written[number] = None


def check(model: nn.Module, change: Change) -> None:
    """Refuse a change that the model cannot take.

    Raises:
        UnsupportedParameterError: the parameter cannot be changed where it is.
        ArchitectureMismatchError: it has another shape than its change.
    """
    target = change.target
    owner = target.tensor(model)
    if change.value is None or change.value.is_floating_point():
        check_patchable(target.owner, owner)
    if change.value is not None:
        if change.value.shape != owner.shape or not target.whole:
            raise ArchitectureMismatchError(
                f"{target.owner} has the shape {list(owner.shape)}, the adapter's {change.name} "
                f"{list(change.value.shape)}; load the base with the fine-tune's head (num_labels, "
                "or the class that finetuned_config.json names)"
            )
        return
    shapes = {weighted.delta.shape for weighted in change.deltas}
    if len(shapes) > 1:
        listed = " and ".join(str(list(shape)) for shape in sorted(shapes))
        raise ArchitectureMismatchError(
            f"the active adapters change {target.owner} as one of {listed}; they were made for "
            "different bases and cannot be active together"
        )
    for shape in shapes - {target.shape}:
        # A vocabulary that was padded or resized still begins with the base's rows.
        longer = len(shape) > 0 and shape[1:] == target.shape[1:] and shape[0] < target.shape[0]
        if not (longer and target.whole and re.search(r"embed|wte|shared|head", target.owner)):
            raise ArchitectureMismatchError(
                f"{target.owner} has the shape {list(target.shape)}, the adapter's {change.name} "
                f"changes one of {list(shape)}; it was made for another architecture"
            )
