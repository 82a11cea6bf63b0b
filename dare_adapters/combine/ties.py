"""TIES: trim, elect signs, merge what agrees."""

from __future__ import annotations

from collections.abc import Sequence

from dare_adapters.combine.consensus import disjoint_merge, one_of
from dare_adapters.combine.registry import delta_method
from dare_adapters.combine.rescale import rescaled_to_l1
from dare_adapters.combine.select import Threshold
from dare_adapters.combine.sparsify import densities, keep_largest
from dare_adapters.combine.union import Elementwise
from dare_adapters.delta import Delta

__all__ = ["ties"]

TRIM_SCOPES = ("parameter", "model")
RESCALES = ("none", "l1")


@delta_method("ties")
def ties(
    deltas: Sequence[Delta],
    weights: Sequence[float],
    *,
    density: float | Sequence[float] | None = None,
    majority_sign_method: str = "total",
    vote: str = "unweighted",
    divisor: str = "count",
    trim_scope: str = "parameter",
    least: int = 0,
    rescale: str = "none",
    lambda_: float = 1.0,
    cutoffs: Sequence[Threshold] | None = None,
) -> Delta:
    """λ · mean of the trimmed wᵢ δᵢ whose sign is the elected one (Yadav et al., NeurIPS 2023).

    | | vote | divisor | trim_scope |
    |---|---|---|---|
    | PEFT (the default) | unweighted | count | parameter |
    | mergekit | weighted | weights | parameter |
    | MergeLM | unweighted | count | model |

    Args:
        deltas: of one parameter.
        weights: one for each.
        density: share of entries that are kept, those of largest magnitude; one or one for each.
        majority_sign_method: "total" (the sign of the sum) or "frequency" (of the sum of signs).
        vote: "unweighted" or "weighted" deltas vote.
        divisor: "count" of those that agree, their "weights", or "none".
        trim_scope: the largest of the "parameter" or of the whole "model".
        least: how many entries stay however low the density (mergekit: 1).
        rescale: "none", or to the "l1" norm that the delta had (mergekit, if asked).
        lambda_: factor of the result.
        cutoffs: thresholds of the whole model, where `trim_scope` is "model".
    """
    one_of(trim_scope, TRIM_SCOPES, "trim_scope")
    one_of(rescale, RESCALES, "rescale")
    trimmed = []
    for number, (delta, share) in enumerate(
        zip(deltas, densities(density, len(deltas)), strict=True)
    ):
        cutoff = None if cutoffs is None else cutoffs[number]
        kept = keep_largest(delta, share, least=least, cutoff=cutoff)
        trimmed.append(rescaled_to_l1(kept, delta) if rescale == "l1" else kept)
    merge = disjoint_merge(
        weights,
        majority_sign_method=majority_sign_method,
        vote=vote,
        divisor=divisor,
        factor=lambda_,
    )
    if len(trimmed) == 1 and trimmed[0] is deltas[0] and weights[0] == lambda_ == 1:
        return deltas[0]
    return Elementwise(trimmed, merge)
