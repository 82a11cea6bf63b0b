"""Interpolation on the sphere: directions are turned into each other, lengths are averaged.

A parameter is one long vector (nuslerp can take it apart). slerp: Shoemake, "Animating Rotation
with Quaternion Curves", SIGGRAPH 1985; karcher: Karcher 1977, iterated as in arXiv 2603.04972;
nuslerp and multislerp: mergekit 0.1.5, whose numbers these are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from dare_adapters.combine.arguments import flag, number, shares, unweighted
from dare_adapters.combine.registry import parameter_method
from dare_adapters.combine.vectors import combination, inner_products
from dare_adapters.errors import CombinationError

__all__ = ["karcher", "multislerp", "nuslerp", "slerp"]

# Vectors nearer than this to one line are interpolated linearly (slerp), as mergekit does.
NEARLY_PARALLEL = 0.9995
# A mean direction shorter than this, for weights of sum 1, is what rounding left of zero.
ROUNDING = 1e-7


@parameter_method("slerp", least=2, most=2)
def slerp(
    parameters: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    t: float | None = None,
) -> torch.Tensor:
    """(sin((1−t)Θ) θ₀ + sin(tΘ) θ₁) / sin Θ, with Θ the angle between θ₀ and θ₁.

    The first adapter is at t = 0, the second at t = 1; mergekit's `base_model` is the first.
    Where |cos Θ| > 0.9995: (1−t) θ₀ + t θ₁. The angle to a zero parameter is taken as π/2.

    Args:
        parameters: two.
        weights: each 1, or instead of `t`: then t = w₁ / (w₀ + w₁).
        t: a number; outside 0 … 1 it extrapolates.

    Raises:
        CombinationError: both `t` and weights are given, or the weights sum to zero.
    """
    if t is not None:
        unweighted(weights, "slerp", "say with t how far the result is from the first")
        t = number(t, "t")
    elif sum(weights) == 0:
        raise CombinationError(f"the weights {list(weights)} sum to zero; give slerp a t")
    else:
        t = weights[1] / sum(weights)
    vectors = [parameter.reshape(1, -1) for parameter in parameters]
    coefficients = _arc(inner_products(vectors), t, least_norm=1e-8, parallel=NEARLY_PARALLEL)
    return combination(vectors, coefficients).view(parameters[0].shape)


@parameter_method("nuslerp", least=2, most=2)
def nuslerp(
    parameters: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    flatten: bool = True,
    row_wise: bool = False,
    on_deltas: bool = True,
    base: torch.Tensor | None,
) -> torch.Tensor:
    """base + slerp(δ₀, δ₁; t), with t = w₁ / (w₀ + w₁), or ½ where the weights sum to zero.

    Linear only where the two are on one line. mergekit's, with a `base_model`; without one it is
    `on_deltas=False`.

    Args:
        parameters: two.
        weights: one for each; only their ratio matters.
        flatten: turn the parameter as one vector; False: a vector for each row or column.
        row_wise: where `flatten` is False, vectors along the first dimension; False: along the
            last (mergekit's `nuslerp_row_wise`).
        on_deltas: False: slerp(θ₀, θ₁; t) of whole parameters; then there need be no base.
    """
    flag(flatten, "flatten")
    flag(row_wise, "row_wise")
    origin = base if flag(on_deltas, "on_deltas") else None
    total = sum(weights)
    t = 0.5 if abs(total) < 1e-6 else weights[1] / total

    def rows(tensor: torch.Tensor) -> torch.Tensor:
        if flatten or tensor.dim() < 2:
            return tensor.reshape(1, -1)
        turned = tensor.transpose(0, -1) if row_wise else tensor
        return turned.reshape(-1, turned.shape[-1])

    vectors = [rows(parameter) for parameter in parameters]
    start = None if origin is None else rows(origin)
    products = inner_products(vectors, start)
    merged = combination(vectors, _arc(products, t, least_norm=1e-7, parallel=None), start)
    first = parameters[0]
    if row_wise and not flatten and first.dim() > 1:
        return merged.view(first.transpose(0, -1).shape).transpose(0, -1).contiguous()
    return merged.view(first.shape)


@parameter_method("multislerp")
def multislerp(
    parameters: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    normalize_weights: bool = True,
    eps: float = 1e-8,
    on_deltas: bool = True,
    base: torch.Tensor | None,
) -> torch.Tensor:
    """base + (Σ wᵢ‖δᵢ‖) m/‖m‖, with m = Σ wᵢ δᵢ/(‖δᵢ‖ + eps).

    mergekit's, which goes on to average in the tangent space at m: Σ wᵢ (uᵢ − ⟨uᵢ, m⟩ m) = 0
    there, so that it stays where it is. A single adapter is returned as it is, whatever its
    weight. Two whose directions cancel are added: base + w₀ δ₀ + w₁ δ₁.

    Args:
        parameters: any number.
        weights: one for each.
        normalize_weights: divide the weights by their sum.
        eps: a length, added to each.
        on_deltas: False: the same of whole parameters, without base (mergekit without a
            `base_model`).

    Raises:
        CombinationError: the weights sum to zero, or three or more directions cancel.
    """
    eps = number(eps, "eps", 0)
    origin = base.reshape(1, -1) if flag(on_deltas, "on_deltas") and base is not None else None
    if len(parameters) == 1:
        return parameters[0]
    used = torch.tensor([float(weight) for weight in weights], dtype=torch.float64)
    if flag(normalize_weights, "normalize_weights"):
        if float(used.sum()) == 0:
            raise CombinationError(
                f"the weights {list(weights)} sum to zero; change them or set "
                "normalize_weights=False"
            )
        used = used / used.sum()
    vectors = [parameter.reshape(1, -1) for parameter in parameters]
    products = inner_products(vectors, origin)[0]
    norms = products.diagonal().sqrt()
    mean = used * _inverse(norms + eps)
    length = _norm(mean, products)
    if length > max(eps, ROUNDING * float(used.abs().sum())):
        coefficients = mean * (float(used @ norms) / length)
    elif len(parameters) == 2 or not bool(norms.any()):
        coefficients = used
    else:
        raise CombinationError(
            f"multislerp: the directions of {len(parameters)} adapters, with the weights "
            f"{list(weights)}, cancel out; change the weights"
        )
    return combination(vectors, coefficients, origin).view(parameters[0].shape)


@parameter_method("karcher")
def karcher(
    parameters: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    max_iter: int = 10,
    tol: float = 1e-5,
) -> torch.Tensor:
    """(Σ αᵢ‖θᵢ‖) m, with m the point of the unit sphere of least Σ αᵢ angle(m, θᵢ)².

    From the normalised mean, m moves along the mean tangent Σ αᵢ Θᵢ/sin Θᵢ (uᵢ − cos Θᵢ m) until
    that is shorter than `tol`. αᵢ = wᵢ / Σ w; mergekit has no weights here and takes 1/n. Zero
    parameters have no direction but count as lengths. A single one is returned as it is.

    Args:
        parameters: any number.
        weights: one for each, at least 0.
        max_iter: steps at most.
        tol: radians; also the length under which a parameter counts as zero.

    Raises:
        CombinationError: a weight is negative, or all are zero.
    """
    max_iter = int(number(max_iter, "max_iter", 0, whole=True))
    tol = number(tol, "tol", 0)
    alphas = torch.tensor(shares(weights, "karcher"), dtype=torch.float64)
    if len(parameters) == 1:
        return parameters[0]
    vectors = [parameter.reshape(1, -1) for parameter in parameters]
    products = inner_products(vectors)[0]
    norms = products.diagonal().sqrt()
    scale = float(alphas @ norms)
    pulls = alphas * (norms > tol)
    if float(pulls.sum()) == 0:
        return torch.zeros_like(parameters[0])
    inverse = _inverse(norms)
    cosines = products * inverse[:, None] * inverse
    mean = _karcher_mean(cosines, pulls / pulls.sum(), max_iter, tol)
    return combination(vectors, mean * inverse * scale).view(parameters[0].shape)


def _karcher_mean(
    cosines: torch.Tensor, alphas: torch.Tensor, max_iter: int, tol: float
) -> torch.Tensor:
    """Coefficients of the mean (k,) in unit vectors of these cosines (k, k)."""
    length = _norm(alphas, cosines)
    if length < tol:  # they cancel: start from the first
        mean = (torch.arange(len(alphas)) == int(alphas.nonzero()[0])).to(torch.float64)
    else:
        mean = alphas / length
    for _ in range(max_iter):
        dots = (cosines @ mean).clamp(-1, 1)
        angles = dots.arccos()
        # Neither what is at the mean nor what is opposite to it says where to go.
        pulling = (alphas > 0) & (angles >= tol) & (angles <= math.pi - max(tol, ROUNDING))
        steps = torch.where(pulling, alphas * angles / angles.sin(), 0.0)
        tangent = steps - (steps @ dots) * mean
        length = _norm(tangent, cosines)
        if length < tol or length == 0:
            break
        mean = math.cos(length) * mean + math.sin(length) / length * tangent
        mean = mean / _norm(mean, cosines)
    return mean


def _arc(
    products: torch.Tensor, t: float, *, least_norm: float, parallel: float | None
) -> torch.Tensor:
    """Coefficients (n, 2) of the point t of the way from the first vector to the second.

    Args:
        products: inner products (n, 2, 2).
        least_norm: what is shorter counts as zero (slerp) or as that long (nuslerp).
        parallel: linear where |cosine| is above; None: where sin² is below 1e-16.
    """
    norms = products.diagonal(dim1=1, dim2=2).sqrt()
    short = 1.0 if parallel is not None else least_norm
    norms = torch.where(norms <= least_norm, short, norms)
    cosine = (products[:, 0, 1] / norms[:, 0] / norms[:, 1]).clamp(-1, 1)
    linear = 1 - cosine.square() <= 1e-16 if parallel is None else cosine.abs() > parallel
    angle = torch.where(linear, 0.0, cosine).arccos()
    turned = torch.stack([torch.sin((1 - t) * angle), torch.sin(t * angle)], dim=1)
    turned /= angle.sin()[:, None]
    straight = torch.tensor([1 - t, t], dtype=torch.float64)
    return torch.where(linear[:, None], straight, turned)


def _norm(coefficients: torch.Tensor, products: torch.Tensor) -> float:
    """Length of a combination of vectors with these inner products."""
    return math.sqrt(max(0.0, float(coefficients @ products @ coefficients)))


def _inverse(values: torch.Tensor) -> torch.Tensor:
    """1/x, and 0 of zero."""
    return torch.where(values > 0, 1 / values, 0.0)
