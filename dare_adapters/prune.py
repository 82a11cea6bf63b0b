"""A delta to its survivors: DARE, drop-only, magnitude.

dare       random support, survivors times 1/(1-p)   (Yu et al. 2024, eq. 2: unbiased)
drop_only  random support, survivors as they are     (the paper's ablation)
magnitude  the largest |delta| of the parameter, as they are
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dare_adapters import compiled
from dare_adapters.difference import ParameterDifference
from dare_adapters.mask import (
    MAX_DROP_RATE,
    BernoulliSupport,
    BlockedSupport,
    Slots,
    Support,
    block_size,
)
from dare_adapters.stored_support import StoredSupport

__all__ = ["MASKS", "METHODS", "PruneRule", "largest_entries"]

METHODS = ("dare", "drop_only", "magnitude")
MASKS = ("auto", "blocked", "bernoulli")
_HISTOGRAM_SHIFT = 15  # of float32 bit patterns: 65536 bins, in order of magnitude
_STEP = 1 << 20


@dataclass(frozen=True)
class PruneRule:
    """How one parameter is pruned.

    Attributes:
        method: "dare", "drop_only" or "magnitude".
        drop_rate: p, in [0, 1).
        mask: "blocked", "bernoulli", or "auto": blocked wherever 1/(1-p) is a whole number.
    """

    method: str = "dare"
    drop_rate: float = 0.9
    mask: str = "auto"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}; there are {', '.join(METHODS)}")
        if self.mask not in MASKS:
            raise ValueError(f"mask is {self.mask!r}; there are {', '.join(MASKS)}")
        if not 0 <= self.drop_rate < 1:
            raise ValueError(f"drop_rate is {self.drop_rate}; it must be at least 0 and below 1")
        if self.drop_rate > MAX_DROP_RATE:
            raise ValueError(
                f"drop_rate is {self.drop_rate}; it must be at most 1 - 1/65536: no adapter keeps "
                "fewer than one entry in 65536"
            )
        if self.method == "magnitude" and self.mask != "auto" and self.drop_rate > 0:
            raise ValueError("magnitude pruning draws no mask: leave mask at 'auto'")
        if self.mask == "blocked" and self.block is None:
            raise ValueError(
                f"a blocked mask needs drop_rate = 1 - 1/B with a whole B up to 65536 (0.5, 0.75, "
                f"0.9, 0.95, 0.99 …), not {self.drop_rate}; use mask='bernoulli'"
            )

    @property
    def block(self) -> int | None:
        """B of a blocked mask, None where the mask is another."""
        if self.method == "magnitude" and self.drop_rate > 0:
            return None
        return None if self.mask == "bernoulli" else block_size(self.drop_rate)

    @property
    def factor(self) -> float:
        """What survivors are multiplied with."""
        return 1 / (1 - self.drop_rate) if self.method == "dare" else 1.0

    @property
    def drop_error(self) -> float | None:
        """Expected squared error of dropping over the squared delta; None: it depends on the data.

        p/(1-p) with rescaling, p without.
        """
        if self.method == "magnitude" and self.drop_rate > 0:
            return None
        return self.drop_rate * self.factor

    def support(self, difference: ParameterDifference, seed: int) -> Support:
        """The entries of one parameter that survive."""
        rows, columns = difference.rows, difference.columns
        if self.block is not None:
            return BlockedSupport(seed, difference.name, rows, columns, self.block)
        if self.method == "magnitude":
            keep = round((1 - self.drop_rate) * rows * columns)
            return largest_entries(difference, keep)
        return BernoulliSupport(seed, difference.name, rows, columns, self.drop_rate)

    def survivors(
        self, difference: ParameterDifference, support: Support, start: int, stop: int
    ) -> tuple[Slots, torch.Tensor]:
        """Slots of some rows and their rescaled values, float32 (n, K); zero where unused."""
        if isinstance(support, BlockedSupport) and difference.compiled:
            index, valid, values = compiled.survivors(
                support.where,
                support.slots_per_row,
                difference.base,
                difference.finetuned,
                self.factor,
                start,
                stop,
            )
            return Slots(index, valid if support.ragged else None), values
        slots = support.slots(start, stop).to(difference.base.device)
        values = difference.at(slots.index, start, stop)
        if self.factor != 1.0:
            values *= self.factor
        return slots, slots.clear_unused(values)


def largest_entries(difference: ParameterDifference, keep: int) -> StoredSupport:
    """The `keep` entries of largest magnitude; of equal ones, the first.

    A histogram of the bit patterns finds the threshold: two passes, no sort of the parameter.
    """
    rows, columns = difference.rows, difference.columns
    step = max(1, _STEP // max(columns, 1))
    ranges = [(start, min(start + step, rows)) for start in range(0, rows, step)]
    histogram = np.zeros(1 << (31 - _HISTOGRAM_SHIFT), dtype=np.int64)
    for start, stop in ranges:
        bins = _magnitude_bits(difference, start, stop) >> _HISTOGRAM_SHIFT
        histogram += np.bincount(bins, minlength=len(histogram))
    # Entries in bins above `edge` all survive; those in `edge` compete for what is left.
    above = np.cumsum(histogram[::-1])[::-1]
    edge = int(np.searchsorted(-above, -keep, side="right")) - 1
    places, contested_bits, contested = [], [], []
    for start, stop in ranges:
        bits = _magnitude_bits(difference, start, stop)
        bins = bits >> _HISTOGRAM_SHIFT
        places.append(np.flatnonzero(bins > edge) + start * columns)
        close = np.flatnonzero(bins == edge)
        contested.append(close + start * columns)
        contested_bits.append(bits[close])
    if edge >= 0 and places:
        certain = sum(len(part) for part in places)
        bits, where = np.concatenate(contested_bits), np.concatenate(contested)
        order = np.argsort(-bits.astype(np.int64), kind="stable")
        places.append(where[order[: keep - certain]])
    positions = np.concatenate(places) if places else np.zeros(0, dtype=np.int64)
    return StoredSupport.from_positions(positions, rows, columns)


def _magnitude_bits(difference: ParameterDifference, start: int, stop: int) -> np.ndarray:
    """|delta| as integers in the same order, (n * columns,)."""
    delta = difference.rows_between(start, stop).abs_()
    return delta.view(torch.int32).numpy()
