"""Why an adapter cannot be served, as a message that a client can be given."""

from __future__ import annotations

from collections.abc import Sequence

from dare_adapters.errors import DareError

__all__ = ["AdapterRefusedError", "listed", "reason_of"]

# How refusals are known again after they came through another process as text.
MARK = "cannot be served per request: "
# What vLLM's executor writes behind the message of a worker's error.
BEHIND = "', please check the stack trace above"
_LISTED = 6


class AdapterRefusedError(DareError):
    """An adapter was refused when it was loaded; nothing of it is served.

    Args:
        name: of the adapter, or of the mix.
        reason: what is wrong, what was expected, what to do.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"adapter {name!r} {MARK}{reason}")


def reason_of(error: BaseException) -> str | None:
    """The refusal in an error, perhaps of another process; None: it is another error."""
    text = str(error)
    start = text.find("adapter ")
    return text[start:].partition(BEHIND)[0] if MARK in text and start >= 0 else None


def listed(names: Sequence[str]) -> str:
    """Some names, and how many more there are."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
