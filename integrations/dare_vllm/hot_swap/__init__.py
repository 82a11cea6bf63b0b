"""Way 2: another mixture in a running engine, between requests."""

from __future__ import annotations

__all__ = ["install"]


def install() -> None:
    """Give every worker, and the engine's core, what a swap asks of them."""
