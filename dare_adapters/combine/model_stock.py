"""Model Stock: how far to go from the base towards the average, from the angles between deltas.

Jang et al., "Model Stock: All we need is just a few fine-tuned models", ECCV 2024
(arXiv 2403.19522).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dare_adapters.combine.arguments import flag, number, unweighted
from dare_adapters.combine.registry import parameter_method
from dare_adapters.combine.vectors import combination, inner_products

__all__ = ["model_stock"]

# Where 1 + (N−1) cos is nearer to zero no point of the line is nearest: the base stays.
SINGULAR = 1e-6


@parameter_method("model_stock", least=2)
def model_stock(
    parameters: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    filter_wise: bool = False,
    eps: float = 1e-6,
    base: torch.Tensor,
) -> torch.Tensor:
    """t · mean(θᵢ) + (1−t) · base, with t = N cos / (1 + (N−1) cos).

    cos is the mean over all pairs of ⟨δᵢ, δⱼ⟩ / max(‖δᵢ‖‖δⱼ‖, eps), each in −1 … 1. `eps` is
    mergekit's: deltas whose norms' product is below it count as less alike than they are, which
    keeps the result nearer to the base. 0 is the paper's formula; zero deltas then have cos 0.

    Args:
        parameters: N, at least two.
        weights: each 1.
        filter_wise: a t for each row (vector along the last dimension) instead of one for all.
        eps: least product of two norms.

    Raises:
        CombinationError: a weight is not 1, or `eps` is negative.
    """
    unweighted(weights, "model_stock")
    eps = number(eps, "eps", 0)
    whole = not flag(filter_wise, "filter_wise") or base.dim() < 2
    shape = (1, base.numel()) if whole else (-1, base.shape[-1])
    vectors, origin = [parameter.reshape(shape) for parameter in parameters], base.reshape(shape)
    count = len(parameters)
    share = _ratio(inner_products(vectors, origin), eps) / count
    return combination(vectors, share[:, None], origin).view(base.shape)


def _ratio(products: torch.Tensor, eps: float) -> torch.Tensor:
    """t of each vector, float64 (n,), from inner products (n, N, N)."""
    count = products.shape[1]
    norms = products.diagonal(dim1=1, dim2=2).sqrt()
    first, second = torch.triu_indices(count, count, 1)
    lengths = (norms[:, first] * norms[:, second]).clamp(min=eps)
    cosines = torch.where(lengths > 0, products[:, first, second] / lengths, 0.0).clamp(-1, 1)
    cosine = cosines.mean(dim=1)
    denominator = 1 + (count - 1) * cosine
    singular = denominator.abs() < SINGULAR
    return torch.where(singular, 0.0, count * cosine / denominator)
