"""Options of commands that list values, with commas between."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TypeVar

import typer

__all__ = ["listed", "listed_rates"]

Value = TypeVar("Value")


def listed(
    text: str, kind: Callable[[str], Value], option: str, known: Collection[Value] | None = None
) -> list[Value]:
    """The values of a list, each once.

    Args:
        text: as it was given.
        kind: of a value: int, float, str.
        option: its name, for messages.
        known: the values that there are; None: any.

    Raises:
        typer.BadParameter: one is not of its kind or not known, or there is none.
    """
    try:
        values = list(dict.fromkeys(kind(part.strip()) for part in text.split(",") if part.strip()))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}: {error}", param_hint=option) from error
    for value in values:
        if known is not None and value not in known:
            there = ", ".join(map(str, known))
            raise typer.BadParameter(f"{value!r}; there are {there}", param_hint=option)
    if not values:
        raise typer.BadParameter(f"{text!r} names nothing", param_hint=option)
    return values


def listed_rates(text: str, option: str = "--drop-rates") -> list[float]:
    """Drop rates, each at least 0 and below 1.

    Raises:
        typer.BadParameter: as `listed`, or one is out of range.
    """
    rates = listed(text, float, option)
    for rate in rates:
        if not 0 <= rate < 1:
            raise typer.BadParameter(
                f"a drop rate is {rate}; it must be at least 0 and below 1", param_hint=option
            )
    return rates
