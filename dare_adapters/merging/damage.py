"""NaN and infinity in a merge: refused where they are read, and where they would be written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from dare_adapters.checkpoint import Checkpoint
from dare_adapters.checkpoint_writer import PART_ENTRIES, Parts
from dare_adapters.errors import CheckpointError
from dare_adapters.finite import first_non_finite

__all__ = ["check_input", "checked", "refusing_damage"]


def check_input(checkpoint: Checkpoint, name: str) -> None:
    """Look at every number of a tensor that is to be merged.

    Raises:
        CheckpointError: it holds NaN or infinity, and where.
    """
    tensor = checkpoint[name]
    if not tensor.is_floating_point():
        return
    flat = tensor.reshape(-1)
    for start in range(0, len(flat), PART_ENTRIES):
        place = first_non_finite(flat[start : start + PART_ENTRIES])
        if place is not None:
            raise CheckpointError(
                f"{checkpoint.path}: {name} holds {float(flat[start + place])} at entry "
                f"{start + place}; a damaged model cannot be merged, get it again"
            )


def refusing_damage(
    name: str, look: Callable[[], None] | None = None
) -> Callable[[torch.Tensor], None]:
    """A function that refuses parts of a tensor which hold NaN or infinity.

    It raises a CheckpointError.

    Args:
        name: of the tensor.
        look: raises an error of its own that names the input which is damaged, if one is.
    """

    def check(part: torch.Tensor) -> None:
        if part.is_floating_point() and first_non_finite(part.reshape(-1)) is not None:
            if look is not None:
                look()
            raise CheckpointError(
                f"{name} would hold NaN or infinity: a model that is merged is damaged, or the "
                f"weights take it beyond {part.dtype}; nothing was written"
            )

    return check


def checked(name: str, parts: Parts) -> Parts:
    """Parts that are refused where they hold NaN or infinity."""
    check = refusing_damage(name)

    def made(pool: ThreadPoolExecutor) -> Iterator[torch.Tensor]:
        for part in parts(pool):
            check(part)
            yield part

    return made
