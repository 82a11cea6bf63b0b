"""Whole parameters, drawn; and vectors as plain lists, for formulas written out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from hypothesis import strategies as st

# Scalars, vectors, a single row and column, a stack of experts, a convolution.
SHAPES = [(), (1,), (7,), (1, 9), (9, 1), (5, 8), (6, 7), (3, 4, 5), (4, 2, 3, 3)]
SHARES = st.sampled_from([0.1, 0.25, 0.5, 1.0, 2.0, 7.5])


@dataclass(frozen=True)
class Models:
    """A base's parameter and that of some fine-tunes, float32 of one shape."""

    base: torch.Tensor
    tuned: list[torch.Tensor]

    @cached_property
    def deltas(self) -> list[list[float]]:
        return [minus(flat(one), flat(self.base)) for one in self.tuned]


@st.composite
def models(
    draw: st.DrawFn, least: int = 1, most: int = 4, shapes: list[tuple[int, ...]] | None = None
) -> Models:
    """Values that some data type holds, fine-tunes near the base or far from it."""
    shape = draw(st.sampled_from(shapes or SHAPES))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    spread = draw(st.sampled_from([0.02, 0.3, 2.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    count = draw(st.integers(least, most))

    def noise() -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    base = noise().to(dtype).float()
    tuned = [(base + spread * noise()).to(dtype).float() for _ in range(count)]
    return Models(base, tuned)


def flat(tensor: torch.Tensor) -> list[float]:
    return [float(value) for value in tensor.reshape(-1)]


def dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def norm(a: list[float]) -> float:
    return math.sqrt(dot(a, a))


def plus(*vectors: list[float]) -> list[float]:
    return [math.fsum(values) for values in zip(*vectors, strict=True)]


def minus(a: list[float], b: list[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


def times(factor: float, a: list[float]) -> list[float]:
    return [factor * x for x in a]


def columns(matrix: torch.Tensor) -> list[list[float]]:
    return [flat(matrix[:, place]) for place in range(matrix.shape[1])]


def assert_near(found: torch.Tensor, expected: list[float], tolerance: float = 1e-5) -> None:
    """Equal to `tolerance`, relative to the largest expected value where that is above 1."""
    assert found.dtype == torch.float32
    scale = max([1.0, *(abs(value) for value in expected)])
    worst = max((abs(a - b) for a, b in zip(flat(found), expected, strict=True)), default=0.0)
    assert worst <= tolerance * scale, f"{worst} apart"
