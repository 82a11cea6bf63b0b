"""Which sign an entry is to have, and the merge of the deltas that have it (TIES, steps 2 and 3).

Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from dare_adapters.errors import CombinationError

__all__ = ["disjoint_merge", "one_of", "weighted_sum"]

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


def weighted_sum(
    weights: Sequence[float], factor: float = 1.0
) -> Callable[[torch.Tensor], torch.Tensor]:
    """values (k, m) -> factor * sum of weight * value, (m,)."""
    total = [float(weight) * factor for weight in weights]

    def merge(values: torch.Tensor) -> torch.Tensor:
        result = values[0] if total[0] == 1.0 else values[0].mul_(total[0])
        for row, weight in zip(values[1:], total[1:], strict=True):
            result.add_(row, alpha=weight)
        return result

    return merge


def disjoint_merge(
    weights: Sequence[float],
    *,
    majority_sign_method: str = "total",
    vote: str = "unweighted",
    divisor: str = "count",
    factor: float = 1.0,
) -> Callable[[torch.Tensor], torch.Tensor]:
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
    column = torch.tensor([float(weight) for weight in weights])[:, None]

    def merge(values: torch.Tensor) -> torch.Tensor:
        weighted = values * column
        voting = weighted if vote == "weighted" else values
        ballots = voting if majority_sign_method == "total" else voting.sign()
        positive = ballots.sum(dim=0) >= 0
        agrees = torch.where(positive, voting > 0, voting < 0)
        result = weighted.mul_(agrees).sum(dim=0)
        if divisor == "count":
            result.div_(agrees.sum(dim=0).clamp_(min=1))
        elif divisor == "weights":
            total = (agrees * column).sum(dim=0)
            total[total.abs() < 1e-8] = 1.0
            result.div_(total)
        return result if factor == 1.0 else result.mul_(factor)

    return merge
