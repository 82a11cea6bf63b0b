"""Reinforced Agent Merging: what one adapter alone changes stays whole, the rest is averaged.

"Behavior Knowledge Merge in Reinforced Agentic Models", arXiv 2601.13572; as in mergekit 0.1.5,
which looks at one parameter at a time ("tensor-local").
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dare_adapters.combine.arguments import number, unweighted
from dare_adapters.combine.registry import parameter_method
from dare_adapters.combine.vectors import stretches

__all__ = ["ram", "ramplus_tl"]


@parameter_method("ram")
def ram(
    parameters: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    epsilon: float = 1e-5,
    base: torch.Tensor,
) -> torch.Tensor:
    """base + the mean of those δᵢ that are not nearly zero, entry by entry.

    Args:
        parameters: any number.
        weights: each 1.
        epsilon: |δ| up to which an entry counts as unchanged, and is left out.

    Raises:
        CombinationError: a weight is not 1, or `epsilon` is negative.
    """
    unweighted(weights, "ram")
    return _merge(parameters, base, number(epsilon, "epsilon", 0), [1.0] * len(parameters))


@parameter_method("ramplus_tl")
def ramplus_tl(
    parameters: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    r: float = 0.1,
    alpha: float = 0.2,
    epsilon: float = 1e-5,
    base: torch.Tensor,
) -> torch.Tensor:
    """ram, with entries that adapter i alone changes times 1 + r · min(ρᵢ, alpha).

    ρᵢ is how many entries it changes along with others, over how many it changes alone.

    Args:
        parameters: any number.
        weights: each 1.
        r: strength, any number.
        alpha: the largest ρ, at least 0.
        epsilon: |δ| up to which an entry counts as unchanged, and is left out.

    Raises:
        CombinationError: a weight is not 1, or an option is out of range.
    """
    unweighted(weights, "ramplus_tl")
    r, alpha = number(r, "r"), number(alpha, "alpha", 0)
    epsilon = number(epsilon, "epsilon", 0)
    shared, alone = _counts(parameters, base, epsilon)
    factors = [
        1 + r * min(both / one if one else alpha, alpha)
        for both, one in zip(shared, alone, strict=True)
    ]
    return _merge(parameters, base, epsilon, factors)


def _merge(
    parameters: Sequence[torch.Tensor],
    base: torch.Tensor,
    epsilon: float,
    alone_factors: Sequence[float],
) -> torch.Tensor:
    merged = torch.empty(base.shape)
    factors = torch.tensor(alone_factors, dtype=torch.float64)[:, None]
    for out, start, *own in stretches(merged, base, *parameters):
        deltas, changed = _changes(own, start, epsilon)
        count = changed.sum(dim=0)
        alone = (deltas * factors).sum(dim=0)
        total = torch.where(count == 1, alone, deltas.sum(dim=0) / count.clamp(min=1))
        out.copy_(total.add_(start))
    return merged


def _counts(
    parameters: Sequence[torch.Tensor], base: torch.Tensor, epsilon: float
) -> tuple[list[int], list[int]]:
    """How many entries each adapter changes along with others, and alone."""
    shared = torch.zeros(len(parameters), dtype=torch.int64)
    alone = torch.zeros_like(shared)
    for start, *own in stretches(base, *parameters):
        changed = _changes(own, start, epsilon)[1]
        count = changed.sum(dim=0)
        shared += (changed & (count > 1)).sum(dim=1)
        alone += (changed & (count == 1)).sum(dim=1)
    return shared.tolist(), alone.tolist()


def _changes(
    own: Sequence[torch.Tensor], start: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Deltas (k, m) float64, zero where nearly so, and where they are not."""
    deltas = torch.stack(list(own)).sub_(start)
    changed = deltas.abs() > epsilon
    return deltas.mul_(changed).to(torch.float64), changed
