"""DARE, then a sum or a sign election (Yu et al., ICML 2024)."""

from __future__ import annotations

from collections.abc import Sequence

from dare_adapters.combine.consensus import disjoint_merge, one_of
from dare_adapters.combine.linear import linear
from dare_adapters.combine.registry import delta_method
from dare_adapters.combine.rescale import rescaled_to_l1
from dare_adapters.combine.sparsify import (
    RandomMasks,
    densities,
    drop_at_random,
)
from dare_adapters.combine.union import Elementwise
from dare_adapters.delta import Delta

__all__ = ["dare_linear", "dare_ties"]

RESCALES = ("density", "l1", "none")


@delta_method("dare_linear")
def dare_linear(
    deltas: Sequence[Delta],
    weights: Sequence[float],
    *,
    density: float | Sequence[float] | None = None,
    rescale: str = "density",
    normalize: bool = False,
    lambda_: float = 1.0,
    masks: RandomMasks,
) -> Delta:
    """Σ wᵢ dare(δᵢ): entries dropped at random, the rest rescaled, summed.

    Args:
        deltas: of one parameter.
        weights: one for each.
        density: share of entries that survive; one or one for each.
        rescale: by exactly 1/"density" (the paper, PEFT, MergeLM), to the "l1" norm that the delta
            had (mergekit), or "none".
        normalize: divide by Σ wᵢ.
        lambda_: factor of the result.
    """
    dropped = _dropped(deltas, density, rescale, masks)
    return linear(dropped, weights, normalize=normalize, lambda_=lambda_)


@delta_method("dare_ties")
def dare_ties(
    deltas: Sequence[Delta],
    weights: Sequence[float],
    *,
    density: float | Sequence[float] | None = None,
    majority_sign_method: str = "total",
    rescale: str = "density",
    vote: str = "unweighted",
    divisor: str = "count",
    lambda_: float = 1.0,
    masks: RandomMasks,
) -> Delta:
    """The sign election of `ties` over dare(δᵢ).

    mergekit's numbers have rescale "l1", vote "weighted", divisor "none".

    Args:
        deltas: of one parameter.
        weights: one for each.
        density, rescale: as `dare_linear`.
        majority_sign_method, vote, divisor, lambda_: as `ties`.
    """
    dropped = _dropped(deltas, density, rescale, masks)
    merge = disjoint_merge(
        weights,
        majority_sign_method=majority_sign_method,
        vote=vote,
        divisor=divisor,
        factor=lambda_,
    )
    if len(dropped) == 1 and dropped[0] is deltas[0] and weights[0] == lambda_ == 1:
        return deltas[0]
    return Elementwise(dropped, merge)


def _dropped(
    deltas: Sequence[Delta],
    density: float | Sequence[float] | None,
    rescale: str,
    masks: RandomMasks,
) -> list[Delta]:
    one_of(rescale, RESCALES, "rescale")
    dropped = []
    for number, (delta, share) in enumerate(
        zip(deltas, densities(density, len(deltas)), strict=True)
    ):
        pruned = drop_at_random(delta, share, masks, number, rescale=rescale == "density")
        dropped.append(rescaled_to_l1(pruned, delta) if rescale == "l1" else pruned)
    return dropped
