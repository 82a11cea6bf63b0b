"""Parameters as vectors: inner products and linear combinations, a tile at a time.

Spherical methods never leave the span of their inputs. All that they need to know of the vectors
is the matrix of inner products, and all that they make is a linear combination: two passes in
float64, and no copy of any parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from dare_adapters.delta import STEP_ENTRIES

__all__ = ["average", "combination", "inner_products", "stretches"]


def inner_products(
    vectors: Sequence[torch.Tensor], origin: torch.Tensor | None = None
) -> torch.Tensor:
    """⟨vᵢ − o, vⱼ − o⟩, float64 (n, k, k).

    Args:
        vectors: k tensors (n, length), a vector in each row.
        origin: o, (n, length); None: zero.
    """
    count, length = vectors[0].shape
    products = torch.zeros(count, len(vectors), len(vectors), dtype=torch.float64)
    for rows, columns in _tiles(count, length):
        tile = _tile(vectors, origin, rows, columns).transpose(0, 1)
        products[rows] += tile @ tile.transpose(1, 2)
    return products


def combination(
    vectors: Sequence[torch.Tensor],
    coefficients: torch.Tensor,
    origin: torch.Tensor | None = None,
) -> torch.Tensor:
    """o + Σ cᵢ (vᵢ − o), float32 (n, length).

    Args:
        vectors: k tensors (n, length).
        coefficients: float64 (n, k) or (k,).
        origin: o, (n, length); None: zero.
    """
    count, length = vectors[0].shape
    coefficients = coefficients.expand(count, len(vectors))
    result = torch.empty(count, length)
    for rows, columns in _tiles(count, length):
        tile = _tile(vectors, origin, rows, columns)
        total = tile.mul_(coefficients[rows].T[:, :, None]).sum(dim=0)
        result[rows, columns] = total if origin is None else total + origin[rows, columns]
    return result


def average(parameters: Sequence[torch.Tensor], shares: Sequence[float]) -> torch.Tensor:
    """Σ cᵢ θᵢ, float32 of the parameters' shape."""
    vectors = [parameter.reshape(1, -1) for parameter in parameters]
    total = combination(vectors, torch.tensor(shares, dtype=torch.float64))
    return total.view(parameters[0].shape)


def stretches(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same entries of tensors of one shape, flat views, `STEP_ENTRIES` at a time."""
    flat = [tensor.reshape(-1) for tensor in tensors]
    for start in range(0, flat[0].numel(), STEP_ENTRIES):
        yield tuple(tensor[start : start + STEP_ENTRIES] for tensor in flat)


def _tiles(count: int, length: int) -> Iterator[tuple[slice, slice]]:
    width = max(1, min(length, STEP_ENTRIES))
    height = max(1, STEP_ENTRIES // width)
    for top in range(0, count, height):
        for left in range(0, length, width):
            yield slice(top, top + height), slice(left, left + width)


def _tile(
    vectors: Sequence[torch.Tensor], origin: torch.Tensor | None, rows: slice, columns: slice
) -> torch.Tensor:
    """float64 (k, n, length), relative to the origin."""
    tile = torch.stack([vector[rows, columns].to(torch.float64) for vector in vectors])
    return tile if origin is None else tile.sub_(origin[rows, columns])
