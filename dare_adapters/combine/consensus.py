"""Which sign an entry is to have, and the merge of the deltas that have it (TIES, steps 2 and 3).

Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dare_adapters import compiled
from dare_adapters.compiled_merge import Election
from dare_adapters.errors import CombinationError

__all__ = ["DisjointMerge", "disjoint_merge", "one_of"]

MAJORITY_SIGN_METHODS = ("total", "frequency")
VOTES = ("unweighted", "weighted")
DIVISORS = ("count", "weights", "none")


def one_of(value: str, valid: Sequence[str], what: str) -> str:
    """Refuse a value that is not among the valid ones.

    Raises:
        CombinationError: naming them.
    """
    if value not in valid:
        raise CombinationError(f"{what} is {value!r}; there are {', '.join(valid)}")
    return value


def disjoint_merge(
    weights: Sequence[float],
    *,
    majority_sign_method: str = "total",
    vote: str = "unweighted",
    divisor: str = "count",
    factor: float = 1.0,
) -> DisjointMerge:
    """values (k, m) -> the merge of those whose sign is the elected one, (m,).

    The elected sign is that of the sum of the values ("total") or of their signs ("frequency"); a
    sum of zero elects plus. Zeros agree with no sign.

    Args:
        weights: (k,).
        majority_sign_method: "total" or "frequency".
        vote: whether "weighted" or "unweighted" values vote; a negative weight turns a vote.
        divisor: "count" (how many agree), "weights" (the sum of their weights; where that is
            zero, 1), or "none".
        factor: of the result.
    """
    one_of(majority_sign_method, MAJORITY_SIGN_METHODS, "majority_sign_method")
    one_of(vote, VOTES, "vote")
    one_of(divisor, DIVISORS, "divisor")
    column = torch.tensor([float(weight) for weight in weights])
    frequency, weighted = majority_sign_method == "frequency", vote == "weighted"
    return DisjointMerge(Election(column, frequency, weighted, DIVISORS.index(divisor), factor))


@dataclass(frozen=True)
class DisjointMerge:
    """What :func:`disjoint_merge` returns."""

    election: Election

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        how = self.election
        if compiled.can_use(values) and values.stride(1) == 1:
            return compiled.elect(
                values, how.weights, how.frequency, how.weighted, how.divisor, how.factor
            )
        divisor = DIVISORS[how.divisor]
        return _merge(values, how.weights, how.frequency, how.weighted, divisor).mul_(how.factor)


def _merge(
    values: torch.Tensor, weights: torch.Tensor, frequency: bool, weighted: bool, divisor: str
) -> torch.Tensor:
    """As the compiled loop does it, in the same order of additions."""
    ballots = values * weights[:, None] if weighted else values
    votes, result, shares = (torch.zeros(values.shape[1]) for _ in range(3))
    for row in ballots:
        votes += row.sign() if frequency else row
    positive = votes >= 0
    for row, ballot, weight in zip(values, ballots, weights, strict=True):
        agrees = torch.where(positive, ballot > 0, ballot < 0)
        result += torch.where(agrees, row * weight, 0.0)
        shares += agrees if divisor == "count" else agrees * weight
    if divisor == "count":
        return result.div_(shares.clamp_(min=1))
    if divisor == "weights":
        return result.div_(torch.where(shares.abs() < 1e-8, 1.0, shares))
    return result
