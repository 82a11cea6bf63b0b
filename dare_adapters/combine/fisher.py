"""Fisher merging: each entry the average of the models, weighted by how sure each is of it.

Matena & Raffel, "Merging Models with Fisher-Weighted Averaging", NeurIPS 2022; with the
definitions of MergeLM's code (Yu et al. 2024).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dare_adapters.combine.arguments import flag, number, shares
from dare_adapters.combine.registry import parameter_method
from dare_adapters.combine.vectors import average, stretches
from dare_adapters.errors import CombinationError

__all__ = ["fisher"]


@parameter_method("fisher", statistics="fisher")
def fisher(
    parameters: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    epsilon: float = 1e-6,
    normalize: bool = False,
    norms: Sequence[float] | None = None,
    statistics: Sequence[torch.Tensor | None],
) -> torch.Tensor:
    """Σ cᵢ (Fᵢ + ε) θᵢ / Σ cᵢ (Fᵢ + ε), entry by entry.

    cᵢ = wᵢ, or wᵢ / (normᵢ + ε) with `normalize`, so that a model with large gradients does not
    drown the others. The norm is that of the *whole model's* Fisher, √ΣF² over all parameters: one
    parameter does not know it, so it is given. MergeLM normalises unless told otherwise.

    A parameter for which an adapter has no statistics is the average Σ wᵢ θᵢ / Σ wᵢ, and so is an
    entry all of whose Fᵢ + ε are zero.

    Args:
        parameters: any number.
        weights: one for each, at least 0; only their ratios matter.
        epsilon: added to every Fᵢ, at least 0, in the Fisher's unit (squared gradients).
        normalize: divide each Fisher by its model's norm, which `norms` must then give.
        norms: the L2 norm of each adapter's whole Fisher.
        statistics: Fᵢ, the diagonal of the Fisher information, at least 0, shape of the
            parameter; or None.

    Raises:
        CombinationError: an option or a weight is out of range; statistics have another shape or
            negative entries.
    """
    epsilon = number(epsilon, "epsilon", 0)
    parts = shares(weights, "fisher")
    factors = parts
    if flag(normalize, "normalize"):
        factors = [
            part / (norm + epsilon) if norm + epsilon > 0 else 0.0
            for part, norm in zip(parts, _norms(norms, len(parameters)), strict=True)
        ]
    if len(parameters) == 1:
        return parameters[0]
    merged = average(parameters, parts)
    known = [information for information in statistics if information is not None]
    if len(known) < len(parameters):
        return merged
    _check_shapes(known, parameters[0])
    for out, *rest in stretches(merged, *parameters, *known):
        own, certain = rest[: len(parameters)], rest[len(parameters) :]
        total = torch.zeros(out.shape, dtype=torch.float64)
        divisor = torch.zeros_like(total)
        for place, (theta, information) in enumerate(zip(own, certain, strict=True)):
            if not bool((information >= 0).all()):
                raise CombinationError(
                    f"the Fisher of adapter {place} has entries that are negative or NaN; it "
                    "must be squared gradients: make it with `dare-adapters stats`"
                )
            trust = information.to(torch.float64).add(epsilon).mul_(factors[place])
            total.addcmul_(trust, theta.to(torch.float64))
            divisor.add_(trust)
        out.copy_(torch.where(divisor > 0, total / divisor, out.to(torch.float64)))
    return merged


def _norms(norms: Sequence[float] | None, count: int) -> list[float]:
    if norms is None:
        raise CombinationError(
            "normalize needs norms, the L2 norm of each adapter's Fisher over the whole model; "
            "give them, or set normalize=False"
        )
    if len(norms) != count:
        raise CombinationError(f"norms has {len(norms)} values for {count} adapters")
    return [number(norm, "norms", 0) for norm in norms]


def _check_shapes(known: Sequence[torch.Tensor], parameter: torch.Tensor) -> None:
    for place, information in enumerate(known):
        if information.shape != parameter.shape:
            raise CombinationError(
                f"the Fisher of adapter {place} has the shape {list(information.shape)}, its "
                f"parameter {list(parameter.shape)}; they are of different models"
            )
