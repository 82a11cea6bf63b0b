"""Breadcrumbs: each delta without its largest and its smallest entries, then a sum or an election.

Davari and Belilovsky, "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks",
ECCV 2024.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dare_adapters.combine.arguments import number
from dare_adapters.combine.consensus import disjoint_merge, one_of
from dare_adapters.combine.linear import linear
from dare_adapters.combine.registry import delta_method
from dare_adapters.combine.rescale import rescaled_to_l1
from dare_adapters.combine.select import Threshold, largest
from dare_adapters.combine.sparsify import (
    Sparsified,
    densities,
    keep_largest,
    per_delta,
)
from dare_adapters.combine.union import Elementwise
from dare_adapters.delta import Delta, NoChange

__all__ = ["breadcrumbs", "breadcrumbs_ties", "keep_middle"]

RESCALES = ("none", "l1")


@delta_method("breadcrumbs")
def breadcrumbs(
    deltas: Sequence[Delta],
    weights: Sequence[float],
    *,
    density: float | Sequence[float] | None = None,
    gamma: float | Sequence[float] = 0.01,
    rescale: str = "none",
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Delta:
    """λ Σ wᵢ mᵢ δᵢ, where mᵢ drops the share γ of largest entries and the share β of smallest.

    `density` is 1 - β - γ. The defaults are the paper's conventions, and mergekit's.

    Args:
        deltas: of one parameter.
        weights: one for each.
        density: share of entries that are kept; one or one for each; 1 keeps all, outliers too.
        gamma: share of entries dropped as outliers; one or one for each. Where density + gamma is
            above 1, only as many as density leaves (mergekit's rule).
        rescale: "none", or to the "l1" norm that the delta had (mergekit's `rescale: true`).
        normalize: divide by Σ wᵢ.
        lambda_: factor of the result.
    """
    kept = _kept(deltas, density, gamma, rescale)
    return linear(kept, weights, normalize=normalize, lambda_=lambda_)


@delta_method("breadcrumbs_ties")
def breadcrumbs_ties(
    deltas: Sequence[Delta],
    weights: Sequence[float],
    *,
    density: float | Sequence[float] | None = None,
    gamma: float | Sequence[float] = 0.01,
    majority_sign_method: str = "total",
    rescale: str = "none",
    vote: str = "unweighted",
    divisor: str = "count",
    lambda_: float = 1.0,
) -> Delta:
    """The sign election of `ties` over the entries that `breadcrumbs` keeps.

    | | vote | divisor |
    |---|---|---|
    | as PEFT's `ties` (the default) | unweighted | count |
    | mergekit | weighted | none |
    | mergekit, `normalize: true` | weighted | weights |

    Args:
        deltas: of one parameter.
        weights: one for each.
        density, gamma, rescale: as `breadcrumbs`.
        majority_sign_method, vote, divisor, lambda_: as `ties`.
    """
    kept = _kept(deltas, density, gamma, rescale)
    merge = disjoint_merge(
        weights,
        majority_sign_method=majority_sign_method,
        vote=vote,
        divisor=divisor,
        factor=lambda_,
    )
    if len(kept) == 1 and kept[0] is deltas[0] and weights[0] == lambda_ == 1:
        return deltas[0]
    return Elementwise(kept, merge)


def keep_middle(delta: Delta, density: float, gamma: float) -> Delta:
    """int(density * n) entries: those next in magnitude to the int(gamma * n) largest.

    Of equal ones the first counts as the larger.

    Args:
        delta: n entries, those that are dropped already included.
        density: 1 keeps all.
        gamma: counts for less where there are not as many entries left to keep.
    """
    if density >= 1:
        return delta
    total = delta.rows * delta.columns
    keep = int(density * total)
    if keep <= 0:
        return NoChange(delta.shape)
    outliers = min(int(gamma * total), total - keep)
    top = keep_largest(delta, (keep + outliers) / total, least=keep + outliers)
    return _Without(top, delta, outliers) if outliers else top


class _Without(Sparsified):
    """A delta's largest entries without the `number` largest of all."""

    def __init__(self, top: Delta, delta: Delta, number: int) -> None:
        super().__init__(top)
        self.whole, self.number = delta, number
        self._found: Threshold | None = None

    @property
    def threshold(self) -> Threshold:
        """What the entries that are left out pass."""
        with self._lock:
            if self._found is None:
                self._found = largest([self.whole], self.number)[0]
            return self._found

    @property
    def entries_per_row(self) -> int:
        return self.delta.entries_per_row

    def keeps(
        self, index: torch.Tensor | None, values: torch.Tensor, start: int, stop: int
    ) -> torch.Tensor:
        return ~self.threshold.keeps(values.abs(), index, start * self.columns)


def _kept(
    deltas: Sequence[Delta],
    density: float | Sequence[float] | None,
    gamma: float | Sequence[float],
    rescale: str,
) -> list[Delta]:
    one_of(rescale, RESCALES, "rescale")
    shares, outliers = densities(density, len(deltas)), per_delta(gamma, len(deltas), "gamma")
    kept = []
    for delta, share, above in zip(deltas, shares, outliers, strict=True):
        middle = keep_middle(delta, share, number(above, "gamma", 0, 1))
        kept.append(rescaled_to_l1(middle, delta) if rescale == "l1" else middle)
    return kept
