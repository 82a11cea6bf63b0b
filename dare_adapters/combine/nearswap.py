"""Nearswap: entries that two models have nearly alike become the other's (Alpindale, mergekit)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dare_adapters.combine.arguments import number, unweighted
from dare_adapters.combine.registry import parameter_method
from dare_adapters.combine.vectors import stretches

__all__ = ["nearswap"]

NEAREST = 1e-6


@parameter_method("nearswap", most=2)
def nearswap(
    parameters: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    t: float,
    base: torch.Tensor,
) -> torch.Tensor:
    """(1−w) a + w b, entry by entry, with w = min(1, t / max(|a − b|, 1e-6)).

    Entries nearer than t are b's, those far apart almost a's.

    Args:
        parameters: a and b, or b alone: then a is the base. mergekit's `base_model` is a.
        weights: each 1.
        t: a difference of entries, at least 0.

    Raises:
        CombinationError: a weight is not 1, or `t` is negative.
    """
    unweighted(weights, "nearswap", "say with t how near is near")
    t = number(t, "t", 0)
    start, other = parameters if len(parameters) == 2 else (base, parameters[0])
    merged = torch.empty(start.shape)
    for out, a, b in stretches(merged, start, other):
        apart = b.to(torch.float64) - a
        share = (t / apart.abs().clamp_(min=NEAREST)).clamp_(max=1)
        out.copy_(apart.mul_(share).add_(a))
    return merged
