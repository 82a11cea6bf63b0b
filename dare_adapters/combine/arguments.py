"""What a method may be told: options in range, and weights that mean something to it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dare_adapters.errors import CombinationError

__all__ = ["flag", "number", "shares", "unweighted"]


def number(
    value: object,
    what: str,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    whole: bool = False,
) -> float:
    """The value, a finite number in low … high.

    Raises:
        CombinationError: it is something else; the message names `what` and the range.
    """
    kinds = int if whole else (int, float)
    fits = isinstance(value, kinds) and not isinstance(value, bool)
    if not fits or not math.isfinite(value) or not low <= value <= high:  # type: ignore[operator, arg-type]
        kind = "a whole number" if whole else "a number"
        if low > -math.inf:
            kind += f" in {low:g} … {high:g}" if high < math.inf else f" of at least {low:g}"
        raise CombinationError(f"{what} is {value!r}; it must be {kind}")
    return value  # type: ignore[return-value]


def flag(value: object, what: str) -> bool:
    """The value, True or False.

    Raises:
        CombinationError: it is something else.
    """
    if not isinstance(value, bool):
        raise CombinationError(f"{what} is {value!r}; it must be True or False")
    return value


def unweighted(weights: Sequence[float], method: str, instead: str = "") -> None:
    """Refuse weights where the method's formula has no place for any.

    Raises:
        CombinationError: a weight is not 1; the message says what to use `instead`.
    """
    if any(weight != 1 for weight in weights):
        raise CombinationError(
            f"{method} has no weights, {list(weights)} are given; leave each at 1"
            + (f" and {instead}" if instead else "")
        )


def shares(weights: Sequence[float], method: str) -> list[float]:
    """The weights over their sum.

    Raises:
        CombinationError: one is negative, or all are zero.
    """
    total = math.fsum(weights)
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or total <= 0:
        raise CombinationError(
            f"{method} takes weights of at least 0, not all of them 0; {list(weights)} are given"
        )
    return [weight / total for weight in weights]
