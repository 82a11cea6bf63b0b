"""Refusing what would not fit in memory before it is begun."""

from __future__ import annotations

from pathlib import Path

from dare_adapters.errors import DareError

__all__ = ["require_memory"]


def require_memory(nbytes: int, what: str, advice: str) -> None:
    """Compare a need with what the machine has left, where it says so (Linux).

    Raises:
        DareError: there is less.
    """
    available = available_bytes()
    if available is not None and nbytes > available:
        raise DareError(
            f"{what} take {nbytes / 1e9:.1f} GB of memory and {available / 1e9:.1f} GB are "
            f"available; {advice}"
        )


def available_bytes() -> int | None:
    """Memory that can be had without swapping, or None."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        words = next(line.split() for line in lines if line.startswith("MemAvailable:"))
        return int(words[1]) * 1024
    except (OSError, StopIteration, ValueError, IndexError):
        return None
