"""Names such as `math*0.6+chat*0.4`: a weighted sum of adapters, as a client writes it."""

from __future__ import annotations

import math
import re

__all__ = ["parse_mix"]

MAX_TERMS = 16
_TERM = re.compile(r"(?P<name>[^*+\s]+)(?:\*(?P<weight>-?\d*\.?\d+(?:e-?\d+)?))?")


def parse_mix(name: str) -> list[tuple[str, float]] | None:
    """The names and weights of a mix; None: it is the name of one adapter.

    A mix is terms joined by `+`, each a name and perhaps `*` and a number (default 1). One that
    occurs twice counts with the sum of its weights.

    Args:
        name: what a request has for `model`.
    """
    if "*" not in name and "+" not in name:
        return None
    terms = name.split("+")
    if len(terms) > MAX_TERMS:
        return None
    weights: dict[str, float] = {}
    for term in terms:
        found = _TERM.fullmatch(term.strip())
        if found is None:
            return None
        weight = float(found["weight"] or 1)
        if not math.isfinite(weight):
            return None
        weights[found["name"]] = weights.get(found["name"], 0.0) + weight
    return list(weights.items())
