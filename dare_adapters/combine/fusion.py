"""Arcee Fusion: of two models, the entries of the second that matter most, over the first.

Importance and threshold are mergekit 0.1.5's; there is no paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from dare_adapters.combine.arguments import unweighted
from dare_adapters.combine.registry import parameter_method
from dare_adapters.delta import STEP_ENTRIES

__all__ = ["arcee_fusion"]

LEAST_PROBABILITY = 1e-8


@parameter_method("arcee_fusion", most=2)
def arcee_fusion(
    parameters: Sequence[torch.Tensor], weights: Sequence[float], *, base: torch.Tensor
) -> torch.Tensor:
    """b where |b − a| · KL(softmax b ‖ softmax a) ≥ Q₂ + 1.5 (Q₃ − Q₁), elsewhere a.

    KL is that of the entry's row (the last dimension), with 1e-8 added to every probability; the
    Q are quartiles of the importance over the parameter. They are exact: mergekit samples them
    from a million entries where there are more, and so gives other numbers at each seed.

    Args:
        parameters: a and b, or b alone: then a is the base. mergekit's `base_model` is a.
        weights: each 1.

    Raises:
        CombinationError: a weight is not 1.
    """
    unweighted(weights, "arcee_fusion")
    start, other = parameters if len(parameters) == 2 else (base, parameters[0])
    if not start.numel():
        return other
    importance = _importance(start, other)
    threshold = _threshold(importance)
    return torch.where(importance >= threshold, other, start)


def _importance(start: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """float32, shape of the parameter."""
    length = start.shape[-1] if start.dim() else 1
    a, b = start.reshape(-1, length), other.reshape(-1, length)
    importance = torch.empty(a.shape)
    step = max(1, STEP_ENTRIES // length)
    for top in range(0, len(a), step):
        p, q = (_probabilities(matrix[top : top + step]) for matrix in (b, a))
        divergence = (p * (p / q).log_()).sum(dim=1, keepdim=True)
        apart = b[top : top + step].to(torch.float64) - a[top : top + step]
        importance[top : top + step] = apart.abs_().mul_(divergence)
    return importance.view(start.shape)


def _probabilities(rows: torch.Tensor) -> torch.Tensor:
    return torch.softmax(rows, dim=1, dtype=torch.float64).add_(LEAST_PROBABILITY)


def _threshold(importance: torch.Tensor) -> float:
    values = importance.flatten().numpy().copy()
    places = [math.floor(share * (len(values) - 1)) for share in (0.25, 0.5, 0.75)]
    values.partition(places)
    first, median, third = (float(values[place]) for place in places)
    return median + 1.5 * (third - first)
