"""Linear layers whose weight is not a plain matrix: bitsandbytes' codes, torchao's tensors.

Nothing can be added to such a weight. What adapters change is added to the layer's output, and the
shape that they change is the one that the layer tells of itself.
"""

from __future__ import annotations

import torch
from torch import nn

from dare_adapters.live import LiveParameter, is_patchable

__all__ = ["matrix_window", "packed_shape"]


def packed_shape(module: nn.Module, name: str, tensor: torch.Tensor) -> tuple[int, int] | None:
    """The shape (out, in) of a packed weight; None where it is plain, absent, or of no matrix."""
    if name != "weight" or tensor.is_meta or is_patchable(tensor):
        return None
    sizes = [getattr(module, size, None) for size in ("out_features", "in_features")]
    rows, columns = sizes
    if not isinstance(rows, int) or not isinstance(columns, int):
        return None
    return rows, columns


def matrix_window(place: LiveParameter, shape: tuple[int, int]) -> LiveParameter:
    """A window on a packed weight as though it were a matrix: never to be written through."""
    return LiveParameter(place.owner, shape, 0, (shape[1], 1))
