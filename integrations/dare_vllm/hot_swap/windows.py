"""Where a running model has the entries of a checkpoint's parameter, and writes into just those.

The model's own loader is asked, with a tensor of the checkpoint and without a copy being made: a
loader that narrows, slices or transposes it copies a view, and a view tells which entries it is of.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dare_vllm.hot_swap.layout import intercepted_copies

__all__ = ["Window", "find_windows", "live_storages"]


@dataclass(frozen=True)
class Window:
    """A rectangle of a parameter, seen as a matrix, and the live tensor that holds it.

    Attributes:
        live: (height, width), or (width, height) where it is transposed; writable.
        columns: of the whole parameter.
        top, left, height, width: of the rectangle.
        transposed: whether the model keeps columns as rows.
    """

    live: torch.Tensor
    columns: int
    top: int
    left: int
    height: int
    width: int
    transposed: bool

    def write(self, index: torch.Tensor, values: torch.Tensor) -> None:
        """Set entries of the parameter, those of them that are in the rectangle.

        Args:
            index: flat positions in the whole parameter, int64 (m,), ascending.
            values: (m,).
        """
        whole_rows = self.width == self.columns
        if whole_rows and not self.transposed and self.live.is_contiguous():
            first, last = self.top * self.columns, (self.top + self.height) * self.columns
            if not len(index) or int(index[0]) >= last or int(index[-1]) < first:
                return
            if int(index[0]) < first or int(index[-1]) >= last:
                inside = (index >= first) & (index < last)
                index, values = index[inside], values[inside]
            self._put(self.live.view(-1), (index - first if first else index,), values)
            return
        row = torch.div(index, self.columns, rounding_mode="floor")
        column = index - row * self.columns - self.left
        row = row - self.top
        inside = (row >= 0) & (row < self.height) & (column >= 0) & (column < self.width)
        if not bool(inside.all()):
            row, column, values = row[inside], column[inside], values[inside]
        self._put(self.live, (column, row) if self.transposed else (row, column), values)

    @staticmethod
    def _put(live: torch.Tensor, place: tuple[torch.Tensor, ...], values: torch.Tensor) -> None:
        device = live.device
        live.index_put_(tuple(p.to(device) for p in place), values.to(device, live.dtype))


def find_windows(
    model: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]
) -> dict[str, list[Window] | None]:
    """The rectangles of parameters that this rank's model holds; none where another rank does.

    Args:
        model: of vLLM's.
        tensors: checkpoint names, and any tensor of each one's shape; nothing of it is read.

    Returns:
        By name; None where its loader does more than to copy rectangles of it.
    """
    storages = live_storages(model)
    found: dict[str, list[Window] | None] = {}
    current: list[Window | None] = []

    def note(destination: torch.Tensor, source: torch.Tensor) -> None:
        live = destination.untyped_storage().data_ptr() in storages
        current.append(_window(destination, source, tensor) if live else None)

    with intercepted_copies(model, note) as replaced:
        for name, tensor in tensors:
            current.clear()
            try:
                model.load_weights([(name, tensor)])  # type: ignore[operator]
            except (AssertionError, IndexError, NotImplementedError, RuntimeError, ValueError):
                current.append(None)
            plain = tensor.dim() <= 2 and tensor.is_contiguous() and None not in current
            found[name] = [one for one in current if one is not None] if plain else None
    return {} if replaced() else found


def live_storages(model: nn.Module) -> set[int]:
    """Where the parameters of a model are now."""
    return {weight.untyped_storage().data_ptr() for weight in model.parameters()}


def _window(destination: torch.Tensor, source: torch.Tensor, tensor: torch.Tensor) -> Window | None:
    columns = math.prod(tensor.shape[1:])
    if source.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
        return None  # computed, not cut out
    if destination.shape != source.shape or source.dtype != tensor.dtype:
        return None
    offset = int(source.storage_offset() - tensor.storage_offset())
    top, left = divmod(offset, columns) if columns else (0, 0)
    shape, strides = _as_matrix(source.shape, source.stride(), columns)
    if shape is None:
        return None
    height, width = shape
    transposed = strides == (1, columns) and columns != 1 and height != 1
    if transposed:
        height, width = width, height
    elif strides != (columns, 1):
        return None
    live = destination.detach()
    if live.dim() < 2:
        live = live.reshape(height, width) if live.is_contiguous() else live[:, None]
    return Window(live, columns, top, left, height, width, transposed)


def _as_matrix(
    shape: Sequence[int], strides: Sequence[int], columns: int
) -> tuple[tuple[int, int] | None, tuple[int, int]]:
    """Shape and strides of a view of a matrix or of a vector, which is a matrix of one column."""
    if len(shape) == 2:
        return (shape[0], shape[1]), (strides[0], strides[1])
    if len(shape) == 1 and columns == 1 and strides[0] == 1:
        return (shape[0], 1), (1, 1)
    return None, (0, 0)
