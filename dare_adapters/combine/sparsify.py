"""A delta to a sparser one: the step before methods agree on anything."""

from __future__ import annotations

import math
import threading
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from dare_adapters.combine.select import Threshold, largest
from dare_adapters.delta import Delta, NoChange
from dare_adapters.errors import CombinationError
from dare_adapters.mask import (
    BernoulliSupport,
    BlockedSupport,
    Support,
    block_size,
    parameter_key,
    philox_words,
)

__all__ = [
    "DroppedAtRandom",
    "RandomMasks",
    "Sparsified",
    "densities",
    "drop_at_random",
    "keep_largest",
    "per_delta",
]

Value = TypeVar("Value")


@dataclass(frozen=True)
class RandomMasks:
    """Random supports that depend on seed, adapter and parameter, and on nothing else.

    Attributes:
        name: the parameter's checkpoint name.
        seeds: one for each delta, made of the user's seed and the adapter's content.
        kind: "auto" (blocked wherever 1/density is a whole number), "blocked" or "bernoulli".
    """

    name: str
    seeds: Sequence[int]
    kind: str = "auto"

    def support(self, number: int, delta: Delta, density: float) -> Support:
        """The entries of delta `number` that survive at a density."""
        seed, block = self.seeds[number], block_size(1 - density) if density > 0 else None
        if self.kind == "blocked" and block is None:
            raise CombinationError(
                f"a blocked mask needs a density of 1/B with a whole B (0.5, 0.1, 0.05 …), not "
                f"{density}; use mask='bernoulli'"
            )
        if block is not None and self.kind != "bernoulli":
            return BlockedSupport(seed, self.name, delta.rows, delta.columns, block)
        return BernoulliSupport(seed, self.name, delta.rows, delta.columns, 1 - density)

    def lanes(self, number: int, delta: Delta, start: int, stop: int) -> np.ndarray:
        """32 random bits for each entry of rows start … stop - 1 of delta `number`.

        Those of :class:`BernoulliSupport`, which keeps an entry whose lane is below
        density * 2**32.

        Returns:
            uint32 (stop - start, columns).
        """
        count, stride = stop - start, -(-delta.columns // 8)
        key = parameter_key(self.name)
        words = philox_words(self.seeds[number], key, start * stride, count * stride)
        lanes: np.ndarray = words.view("<u4").reshape(count, stride * 8)[:, : delta.columns]
        return lanes


def per_delta(value: Value | Sequence[Value], count: int, what: str) -> list[Value]:
    """One value for each delta, from one for all or a sequence.

    Raises:
        CombinationError: a sequence of another length.
    """
    if isinstance(value, (list, tuple)):
        if len(value) != count:
            raise CombinationError(f"{what} has {len(value)} values for {count} adapters")
        return list(value)
    return [value] * count  # type: ignore[list-item]


def densities(density: float | Sequence[float] | None, count: int) -> list[float]:
    """One density for each delta.

    Raises:
        CombinationError: there is none, or one is outside 0 … 1.
    """
    if density is None:
        raise CombinationError("density is needed: the share of entries that each adapter keeps")
    found = per_delta(density, count, "density")
    for value in found:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise CombinationError(f"density is {value!r}; it must be a number in 0 … 1")
    return [float(value) for value in found]


class Sparsified(Delta):
    """Some entries of a delta, perhaps changed."""

    def __init__(self, delta: Delta) -> None:
        super().__init__(delta.shape)
        self.delta = delta
        self._lock = threading.Lock()

    @abstractmethod
    def keeps(
        self, index: torch.Tensor | None, values: torch.Tensor, start: int, stop: int
    ) -> torch.Tensor:
        """Which entries of a range stay, bool (m,); `values` must not be changed."""

    def read(self, start: int, stop: int) -> tuple[torch.Tensor | None, torch.Tensor]:
        index, values = self.delta.read(start, stop)
        keep = self.keeps(index, values, start, stop)
        place = keep.nonzero().squeeze(1)
        return (place if index is None else index[place]), values[place]

    @property
    def shows_damage(self) -> bool:
        return self.delta.shows_damage

    def preparations(self) -> list[Callable[[], object]]:
        return self.delta.preparations()

    @property
    def row_cost(self) -> int:
        return self.delta.row_cost

    def release(self) -> None:
        self.delta.release()


class _KeptLargest(Sparsified):
    def __init__(self, delta: Delta, density: float, find: Callable[[], Threshold]) -> None:
        super().__init__(delta)
        self._density, self._find = density, find
        self._found: Threshold | None = None

    @property
    def threshold(self) -> Threshold:
        with self._lock:
            if self._found is None:
                self._found = self._find()
            return self._found

    def preparations(self) -> list[Callable[[], object]]:
        return [*self.delta.preparations(), lambda: self.threshold]

    @property
    def entries_per_row(self) -> int:
        return min(self.delta.entries_per_row, math.ceil(self._density * self.columns) or 1)

    def keeps(
        self, index: torch.Tensor | None, values: torch.Tensor, start: int, stop: int
    ) -> torch.Tensor:
        return self.threshold.keeps(values.abs(), index, start * self.columns)

    def read(self, start: int, stop: int) -> tuple[torch.Tensor | None, torch.Tensor]:
        limit = self.threshold
        if limit.value < 0:
            return self.delta.read(start, stop)
        return self.delta.read_above(limit.value, limit.last - start * self.columns, start, stop)

    def fill(self, out: torch.Tensor, start: int, stop: int) -> None:
        limit = self.threshold
        if limit.value < 0:
            self.delta.fill(out, start, stop)
        else:
            last = limit.last - start * self.columns
            self.delta.fill_above(out, limit.value, last, start, stop)


def keep_largest(
    delta: Delta, density: float, *, least: int = 0, cutoff: Threshold | None = None
) -> Delta:
    """The int(density * n) entries of largest magnitude, as they are; of equal ones, the first.

    Args:
        delta: n entries, those that are dropped already included.
        density: 1 or more keeps all.
        least: how many stay whatever the density.
        cutoff: a threshold to use instead, as of the whole model.
    """
    if density >= 1:
        return delta
    if density <= 0:
        return NoChange(delta.shape)
    keep = max(least, int(density * (delta.rows * delta.columns)))

    def find() -> Threshold:
        return largest([delta], keep)[0] if cutoff is None else cutoff

    return _KeptLargest(delta, density, find)


class DroppedAtRandom(Sparsified):
    """The entries of a delta that a random support keeps, times a factor."""

    def __init__(self, delta: Delta, support: Support, density: float, factor: float) -> None:
        super().__init__(delta)
        self.support, self.density, self.factor = support, density, factor
        self._whole = delta.entries_per_row >= delta.columns

    @property
    def blocked(self) -> tuple[BlockedSupport, float] | None:
        """The support and the factor of what it keeps, where loops can draw it row by row."""
        support = self.support
        if isinstance(support, BlockedSupport) and support.repeatable:
            return support, self.factor
        return None

    @property
    def entries_per_row(self) -> int:
        return max(1, math.ceil(self.delta.entries_per_row * self.density))

    @property
    def row_cost(self) -> int:
        return self.entries_per_row if self._whole else self.delta.row_cost

    @property
    def support_key(self) -> object | None:
        return self.support.key if self._whole else None

    def keeps(
        self, index: torch.Tensor | None, values: torch.Tensor, start: int, stop: int
    ) -> torch.Tensor:
        if index is None:
            index = torch.arange((stop - start) * self.columns)
        return self.support.contains(index, start, stop)

    def read(self, start: int, stop: int) -> tuple[torch.Tensor | None, torch.Tensor]:
        if self._whole:  # of what is dropped nothing is read
            return self.delta.read_support(self.support, self.factor, start, stop)
        return self.delta.read_kept(self.support, self.factor, start, stop)


def drop_at_random(
    delta: Delta, density: float, masks: RandomMasks, number: int, *, rescale: bool = True
) -> Delta:
    """Each entry with probability `density`, then times 1/density (Yu et al. 2024, eq. 2).

    Args:
        delta: number `number` of those that `masks` is of.
        density: 0 keeps nothing, 1 everything.
        rescale: False leaves survivors as they are.
    """
    if density >= 1:
        return delta
    if 1 - density >= 1:  # nothing, or next to it
        return NoChange(delta.shape)
    support = masks.support(number, delta, density)
    return DroppedAtRandom(delta, support, density, 1 / density if rescale else 1.0)
