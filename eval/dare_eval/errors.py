"""What can go wrong in an experiment, beyond what can go wrong in the library."""

from __future__ import annotations

from dare_adapters.errors import DareError

__all__ = ["DataNotFoundError", "RecordError", "SandboxUnavailableError"]


class DataNotFoundError(DareError, FileNotFoundError):
    """A data set, or a split of it, is neither in the data directory nor on the hub."""


class RecordError(DareError):
    """A record is damaged or is of another cell, or there are none to make a report of."""


class SandboxUnavailableError(DareError):
    """Generated programs cannot be contained on this machine; the message says what is missing."""
