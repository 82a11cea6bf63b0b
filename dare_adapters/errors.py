"""What can go wrong, by name. Every message says which thing, what was expected, and what to do."""

from __future__ import annotations


class DareError(Exception):
    """Base of every error this library raises on purpose; the command line prints it plainly."""


class CheckpointError(DareError):
    """A checkpoint is missing, truncated, inconsistent, or holds NaN or infinity."""


class CheckpointMismatchError(CheckpointError):
    """Base and fine-tune do not describe the same parameters."""


class AdapterFormatError(DareError):
    """An adapter directory is damaged, contradicts itself, or is of a newer format."""


class AdapterNotFoundError(DareError, FileNotFoundError):
    """No adapter is to be found at a path, on the hub, or under a name."""


class AdapterExistsError(DareError, FileExistsError):
    """An adapter name or an output path is already taken."""


class BaseMismatchError(DareError):
    """The weights at hand are not the base that an adapter was extracted against."""


class ArchitectureMismatchError(DareError):
    """An adapter changes parameters that a model does not have, or has in another shape."""


class UnsupportedParameterError(DareError):
    """A parameter of a live model cannot be patched where it is: meta, sharded, packed."""


class CombinationError(DareError, ValueError):
    """Adapters cannot be combined as asked: an unknown method or option, a count, a mismatch."""


class RecipeError(DareError, ValueError):
    """A merge recipe cannot be read, contradicts itself, or asks for what is not supported."""


class PatchedModelError(DareError):
    """An operation would silently write or lose patched weights of a live model."""


class DeltaTooLargeError(DareError):
    """The fine-tune moved too far from the base for DARE, and the caller asked for an error."""


class DareWarning(UserWarning):
    """Base of the warnings this library issues."""


class DeltaTooLargeWarning(DareWarning):
    """The fine-tune moved further from the base than the range in which DARE is known to hold."""


class UnusedParametersWarning(DareWarning):
    """Parts of an adapter have no place in the model at hand and were left out."""


class PatchedStateWarning(DareWarning):
    """A state dict was taken while adapters were active: it holds patched weights."""
