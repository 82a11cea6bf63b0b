"""Weighted sums: task arithmetic and its kin."""

from __future__ import annotations

from collections.abc import Sequence

from dare_adapters.combine.registry import delta_method
from dare_adapters.combine.sparsify import densities, keep_largest
from dare_adapters.combine.union import WeightedSum
from dare_adapters.delta import Delta
from dare_adapters.errors import CombinationError

__all__ = ["average", "linear", "magnitude_prune"]


@delta_method("linear", "task_arithmetic", "cat")
def linear(
    deltas: Sequence[Delta],
    weights: Sequence[float],
    *,
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Delta:
    """Σ wᵢ δᵢ (task arithmetic, Ilharco et al., ICLR 2023; PEFT's `linear` and `cat`).

    Args:
        deltas: of one parameter.
        weights: one for each.
        normalize: divide by Σ wᵢ.
        lambda_: factor of the result.
    """
    factor = lambda_ / _total(weights) if normalize else lambda_
    if len(deltas) == 1 and weights[0] * factor == 1:
        return deltas[0]
    return WeightedSum(deltas, [weight * factor for weight in weights])


@delta_method("average")
def average(deltas: Sequence[Delta], weights: Sequence[float]) -> Delta:
    """Σ wᵢ δᵢ / Σ wᵢ; with equal weights the mean of the models (Wortsman et al., ICML 2022)."""
    return linear(deltas, weights, normalize=True)


@delta_method("magnitude_prune")
def magnitude_prune(
    deltas: Sequence[Delta],
    weights: Sequence[float],
    *,
    density: float | Sequence[float] | None = None,
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Delta:
    """Σ wᵢ trim(δᵢ): each delta's `density` entries of largest magnitude, summed (PEFT)."""
    trimmed = [
        keep_largest(delta, share)
        for delta, share in zip(deltas, densities(density, len(deltas)), strict=True)
    ]
    return linear(trimmed, weights, normalize=normalize, lambda_=lambda_)


def _total(weights: Sequence[float]) -> float:
    total = float(sum(weights))
    if total == 0:
        raise CombinationError(
            f"the weights {list(weights)} sum to zero, by which nothing can be divided"
        )
    return total
