"""Two other ways to make a delta small, for comparison: signs, and low-rank factors.

Both leave parameters of one dimension whole, as `dare_adapters.extract` does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from dare_adapters.delta import Delta, DenseDelta, NewParameter
from dare_adapters.mask import matrix_shape
from dare_adapters.source import BaseReader, DeltaSource, Renamed

__all__ = ["Factors", "LowRank", "SignAndScale", "factorise", "rank_of_size"]

Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""By parameter: (rows, r) and (r, columns), the best of each rank first."""

SCALE_BITS = FACTOR_BITS = 16


class _Compressed(Renamed):
    """A source whose matrices are replaced by what a rule makes of them."""

    def __init__(self, source: DeltaSource) -> None:
        super().__init__(source, {name: name for name in source})

    def matrix(self, name: str, delta: torch.Tensor) -> torch.Tensor:
        """What is left of a delta, float32 (rows, columns)."""
        raise NotImplementedError

    def __getitem__(self, name: str) -> Delta | NewParameter:
        delta = super().__getitem__(name)
        if isinstance(delta, NewParameter) or len(delta.shape) < 2:
            return delta
        kept = self.matrix(name, delta.dense().view(delta.rows, delta.columns))
        return DenseDelta(kept.view(delta.shape), delta.added_rows)

    def parameter(self, name: str, base: BaseReader | None) -> Delta | NewParameter:
        return self[name]

    def _matrices(self) -> list[tuple[int, int]]:
        shapes = (self.source[name].shape for name in self)
        return [matrix_shape(shape) for shape in shapes if len(shape) > 1]


class SignAndScale(_Compressed):
    """The sign of every entry and one scale a matrix, the mean magnitude.

    The initial rule of BitDelta (Liu et al. 2024, arXiv 2402.10193, eq. 3), on every matrix; its
    scales are not distilled.
    """

    def matrix(self, name: str, delta: torch.Tensor) -> torch.Tensor:
        scale = delta.abs().mean().to(torch.float16).float()
        return torch.where(delta > 0, scale, -scale)  # its code, too, takes zero for negative

    @property
    def bits_per_parameter(self) -> float:
        """Of the matrices' entries."""
        sizes = [rows * columns for rows, columns in self._matrices()]
        return 1 + SCALE_BITS * len(sizes) / sum(sizes)

    @property
    def identity(self) -> str:
        return f"{self.source.identity}-signs"


class LowRank(_Compressed):
    """The best approximation of rank r of every matrix (Eckart & Young 1936), in 16 bits.

    What extracting a LoRA from a full fine-tune does, here from embeddings as well.

    Args:
        source: fine-tune minus base.
        factors: of :func:`factorise`, of rank r or more.
        rank: r; of a matrix with fewer rows or columns, all of it.
    """

    def __init__(self, source: DeltaSource, factors: Factors, rank: int) -> None:
        super().__init__(source)
        self.factors, self.rank = factors, rank

    def matrix(self, name: str, delta: torch.Tensor) -> torch.Tensor:
        left, right = self.factors[name]
        return left[:, : self.rank].half().float() @ right[: self.rank].half().float()

    @property
    def bits_per_parameter(self) -> float:
        """Of the matrices' entries."""
        shapes = self._matrices()
        stored = sum(min(self.rank, *shape) * sum(shape) for shape in shapes)
        return FACTOR_BITS * stored / sum(rows * columns for rows, columns in shapes)

    @property
    def identity(self) -> str:
        return f"{self.source.identity}-rank-{self.rank}"


def factorise(source: DeltaSource, rank: int) -> Factors:
    """Singular value decompositions of all matrices, cut off at a rank, each √σ on both sides."""
    found = {}
    for name in source:
        delta = source[name]
        if isinstance(delta, NewParameter) or len(delta.shape) < 2:
            continue
        left, sigma, right = torch.linalg.svd(
            delta.dense().view(delta.rows, delta.columns), full_matrices=False
        )
        root = sigma[:rank].sqrt()
        found[name] = (left[:, :rank] * root, root[:, None] * right[:rank])
    return found


def rank_of_size(source: DeltaSource, bits: float) -> int:
    """The rank at which factors take about so many bits for each entry, at least 1."""
    shapes = [matrix_shape(source[name].shape) for name in source if len(source[name].shape) > 1]
    entries = sum(math.prod(shape) for shape in shapes)
    return max(1, round(bits * entries / (FACTOR_BITS * sum(map(sum, shapes)))))
