"""DELLA: entries dropped at random, small ones more often, then a sign election or a sum.

Deep, Bhardwaj and Poria, "DELLA-Merging: Reducing Interference in Model Merging through
Magnitude-Based Sampling", 2024 (arXiv 2406.11617).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch

from dare_adapters.combine import loops
from dare_adapters.combine.arguments import number
from dare_adapters.combine.consensus import disjoint_merge, one_of
from dare_adapters.combine.linear import linear
from dare_adapters.combine.registry import delta_method
from dare_adapters.combine.rescale import rescaled_to_l1
from dare_adapters.combine.sparsify import RandomMasks, densities, per_delta
from dare_adapters.combine.union import Elementwise
from dare_adapters.delta import Delta, NoChange
from dare_adapters.errors import CombinationError
from dare_adapters.mask import parameter_key

__all__ = ["della", "della_linear", "magprune"]

RESCALES = ("probability", "l1", "none")
# Entries ranked at a time: their 64-bit keys and random bits stay in the second-level cache.
_RANKED_ENTRIES = 1 << 17


@delta_method("della")
def della(
    deltas: Sequence[Delta],
    weights: Sequence[float],
    *,
    density: float | Sequence[float] | None = None,
    epsilon: float | Sequence[float] = 0.15,
    majority_sign_method: str = "total",
    rescale: str = "probability",
    vote: str = "unweighted",
    divisor: str = "count",
    lambda_: float = 1.0,
    masks: RandomMasks,
) -> Delta:
    """Drop by MAGPRUNE, elect a sign, fuse: λ · mean of the wᵢ magprune(δᵢ) that have that sign.

    | | rescale | vote | divisor |
    |---|---|---|---|
    | the paper, conventions of PEFT (the default) | probability | unweighted | count |
    | the authors' code | probability | weighted | weights |
    | mergekit | l1 | weighted | weights |

    The paper's epsilon and its code's `window_size` are twice this one, which is mergekit's.

    Args:
        deltas: of one parameter.
        weights: one for each.
        density: share of entries that survive on average; one or one for each.
        epsilon: how far the survival probability of a row's largest entry is above the density,
            and of its smallest below; one or one for each. 0 is DARE.
        majority_sign_method, vote, divisor, lambda_: as `ties`.
        rescale: each survivor by 1/its own survival "probability" (the paper), all to the "l1"
            norm that the delta had (mergekit), or "none".

    Raises:
        CombinationError: density ± epsilon is not between 0 and 1, or the mask is "blocked".
    """
    pruned = _pruned(deltas, density, epsilon, rescale, masks)
    merge = disjoint_merge(
        weights,
        majority_sign_method=majority_sign_method,
        vote=vote,
        divisor=divisor,
        factor=lambda_,
    )
    if len(pruned) == 1 and pruned[0] is deltas[0] and weights[0] == lambda_ == 1:
        return deltas[0]
    return Elementwise(pruned, merge)


@delta_method("della_linear")
def della_linear(
    deltas: Sequence[Delta],
    weights: Sequence[float],
    *,
    density: float | Sequence[float] | None = None,
    epsilon: float | Sequence[float] = 0.15,
    rescale: str = "probability",
    normalize: bool = False,
    lambda_: float = 1.0,
    masks: RandomMasks,
) -> Delta:
    """λ Σ wᵢ magprune(δᵢ). mergekit's numbers have rescale "l1".

    Args:
        deltas: of one parameter.
        weights: one for each.
        density, epsilon, rescale: as `della`.
        normalize: divide by Σ wᵢ.
        lambda_: factor of the result.
    """
    pruned = _pruned(deltas, density, epsilon, rescale, masks)
    return linear(pruned, weights, normalize=normalize, lambda_=lambda_)


def magprune(
    delta: Delta,
    density: float,
    epsilon: float,
    masks: RandomMasks,
    place: int,
    *,
    rescale: bool = True,
) -> Delta:
    """Each entry with a probability by its rank in its row, then times 1/probability.

    The entry of rank r of L, 0 the smallest, survives with probability
    density - epsilon + 2 * epsilon * r / (L - 1). Of equal magnitudes the later one ranks higher.

    Args:
        delta: number `place` of those that `masks` is of; dropped entries rank lowest.
        density: 0 keeps nothing, 1 everything.
        rescale: False leaves survivors as they are.
    """
    if density >= 1:
        return delta
    if density <= 0:
        return NoChange(delta.shape)
    if not (density - epsilon > 0 and density + epsilon <= 1):
        raise CombinationError(
            f"density {density} ± epsilon {epsilon} must stay above 0 and at most 1: choose an "
            f"epsilon below {min(density, 1 - density):.4g}"
        )
    if masks.kind == "blocked":
        raise CombinationError(
            "a blocked mask keeps one entry of each block, large or small; use mask='bernoulli'"
        )
    return _Magpruned(delta, density, epsilon, masks, place, rescale)


class _Magpruned(Delta):
    def __init__(
        self,
        delta: Delta,
        density: float,
        epsilon: float,
        masks: RandomMasks,
        place: int,
        rescale: bool,
    ) -> None:
        super().__init__(delta.shape)
        self.delta, self.density, self.epsilon = delta, density, epsilon
        self.masks, self.place, self.rescale = masks, place, rescale

    @property
    def entries_per_row(self) -> int:
        return max(1, math.ceil(self.delta.entries_per_row * self.density))

    @property
    def row_cost(self) -> int:
        return self.delta.row_cost

    @property
    def shows_damage(self) -> bool:
        return self.delta.shows_damage

    def preparations(self) -> list[Callable[[], object]]:
        return self.delta.preparations()

    def read(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        if loops.available():
            index, values = self.delta.read(start, stop)
            limits, probabilities = self._by_rank
            return loops.magprune(
                self.masks.seeds[self.place], parameter_key(self.masks.name), self.columns,
                start, stop, index, values.contiguous(), limits, probabilities,
            )  # fmt: skip
        step = max(1, _RANKED_ENTRIES // max(self.columns, 1))
        parts = []
        for first in range(start, stop, step):
            index, values = self._read_ranked(first, min(first + step, stop))
            parts.append((index + (first - start) * self.columns, values))
        if not parts:
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0)
        indices, values_of = zip(*parts, strict=True)
        return torch.cat(indices), torch.cat(values_of)

    def release(self) -> None:
        self.delta.release()

    @cached_property
    def _by_rank(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Limits of random bits, and what survivors are divided by, of every rank of a row."""
        probabilities = self._probabilities(self.columns)
        limits = torch.from_numpy(np.rint(probabilities * (1 << 32)).astype(np.int64))
        factors = torch.from_numpy(probabilities.astype(np.float32)) if self.rescale else None
        return limits, factors

    def _read_ranked(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        lanes = self.masks.lanes(self.place, self.delta, start, stop)
        index, values = self.delta.read(start, stop)
        columns: np.ndarray | None = None
        if index is None:
            matrix = values.numpy().reshape(stop - start, self.columns)
        else:
            columns, matrix = _rows(index.numpy(), values.numpy(), stop - start, self.columns)
            lanes = np.take_along_axis(lanes, columns, axis=1)
        probabilities = self._probabilities(matrix.shape[1])
        place, rank = _survivors(matrix, lanes, np.rint(probabilities * (1 << 32)))
        survivors = matrix.reshape(-1)[place]
        if self.rescale:
            survivors /= probabilities.astype(np.float32)[rank]
        if columns is None:
            return torch.from_numpy(place), torch.from_numpy(survivors)
        column = columns.reshape(-1)[place]
        real = column >= 0
        positions = place // max(matrix.shape[1], 1) * self.columns + column
        return torch.from_numpy(positions[real]), torch.from_numpy(survivors[real])

    def _probabilities(self, width: int) -> np.ndarray:
        """Survival probability of a row's `width` largest entries, ascending, float64."""
        if self.columns == 1:
            return np.full(width, self.density)
        rank = np.arange(self.columns - width, self.columns)
        return (self.density - self.epsilon) + rank * (2 * self.epsilon / (self.columns - 1))


def _survivors(
    matrix: np.ndarray, lanes: np.ndarray, limits: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Where the random bits of an entry are below the limit of its rank in its row.

    Args:
        matrix: float32 (n, K).
        lanes: uint32 (n, K).
        limits: float64 (K,), ascending.

    Returns:
        place: int64 (m,), ascending flat positions.
        rank: int32 (m,), of the entry there; 0 the smallest of its row.
    """
    count, width = matrix.shape
    if not matrix.size:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int32)
    # One sort gives the rank of every entry that can survive at all: a key is the magnitude, whose
    # bits as an integer are in the same order, above the column, above whether it can.
    keys = np.empty((count, width), dtype="<u8")
    halves = keys.view("<u4").reshape(count, width, 2)
    np.bitwise_and(matrix.view("<u4"), 0x7FFFFFFF, out=halves[:, :, 1])
    np.add(np.arange(width, dtype="<u4") * 2, lanes < int(limits[-1]), out=halves[:, :, 0])
    keys.sort(axis=1)
    contested = (keys.view("u1")[:, ::8] & 1).view(bool).reshape(-1).nonzero()[0]
    row_start = contested // width * width
    rank = contested - row_start
    place = (halves[:, :, 0].reshape(-1)[contested] >> 1) + row_start
    # Back in the order of the positions, by writing each decision to where it belongs.
    stays, rank_of = np.zeros(matrix.size, dtype=bool), np.empty(matrix.size, dtype=np.int32)
    stays[place] = lanes.reshape(-1)[place] < limits[rank]
    rank_of[place] = rank
    place = stays.nonzero()[0]
    return place, rank_of[place]


def _rows(
    index: np.ndarray, values: np.ndarray, count: int, columns: int
) -> tuple[np.ndarray, np.ndarray]:
    """Entries as a matrix with a row for each row of the parameter, each entry once.

    Returns:
        columns: int64 (count, K), of each entry; -1 where a row has fewer than K.
        matrix: float32 (count, K); 0 there.
    """
    once = np.ones(len(index), dtype=bool)
    np.not_equal(index[1:], index[:-1], out=once[1:])
    if not once.all():
        index, values = index[once], values[once]
    row = index // columns
    per_row = np.bincount(row, minlength=count)
    width = int(per_row.max(initial=0))
    # From the left, zeros first: what is not there ranks lowest, and equals keep their order.
    slot = np.arange(len(index)) + (width - np.cumsum(per_row))[row]
    column_of = np.full((count, width), -1)
    matrix = np.zeros((count, width), dtype=np.float32)
    column_of[row, slot], matrix[row, slot] = index - row * columns, values
    return column_of, matrix


def _pruned(
    deltas: Sequence[Delta],
    density: float | Sequence[float] | None,
    epsilon: float | Sequence[float],
    rescale: str,
    masks: RandomMasks,
) -> list[Delta]:
    one_of(rescale, RESCALES, "rescale")
    shares = densities(density, len(deltas))
    windows = per_delta(epsilon, len(deltas), "epsilon")
    pruned = []
    for place, (delta, share, half) in enumerate(zip(deltas, shares, windows, strict=True)):
        own = rescale == "probability"
        epsilon_of = number(half, "epsilon", 0)
        sparse = magprune(delta, share, epsilon_of, masks, place, rescale=own)
        pruned.append(rescaled_to_l1(sparse, delta) if rescale == "l1" else sparse)
    return pruned
