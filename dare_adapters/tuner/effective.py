"""A base parameter with what adapters change in it, as a tensor of its own.

Where gradients are needed they flow to the survivors alone; the result is otherwise, bit for bit,
what patching the base in place gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dare_adapters.delta import WeightedDelta
from dare_adapters.live import LiveParameter
from dare_adapters.row_sums import apply_rows

__all__ = ["TrainedPart", "add_deltas", "add_trained"]


@dataclass(frozen=True)
class TrainedPart:
    """Entries of a parameter that one adapter changes.

    Attributes:
        values: any float dtype, (m,) or the shape of the whole.
        positions: int64 (m,), flat, of each entry; None: all, in order.
    """

    values: torch.Tensor
    positions: torch.Tensor | None


def add_deltas(
    base: torch.Tensor, changes: Sequence[tuple[LiveParameter, Sequence[WeightedDelta]]]
) -> torch.Tensor:
    """A copy of a parameter with deltas added, each window's summed in float32, rounded once.

    Args:
        base: the parameter.
        changes: windows on it, with what is added to each.
    """
    made = base.detach().clone(memory_format=torch.contiguous_format)
    for window, deltas in changes:
        first = deltas[0].delta
        view = window.view_on(made, first.shape)
        ranges = first.row_ranges() if made.device.type == "cpu" else [(0, first.rows)]
        for start, stop in ranges:
            apply_rows(view, deltas, start, stop)
    return made


def add_trained(base: torch.Tensor, parts: Sequence[TrainedPart]) -> torch.Tensor:
    """The same, differentiable in the values of each part."""
    positions = [part.positions for part in parts]
    values = (part.values for part in parts)
    made: torch.Tensor = _AddTrained.apply(base, positions, *values)  # type: ignore[no-untyped-call]
    return made


class _AddTrained(torch.autograd.Function):
    """base + Σ scatter(values); the gradient of values is gathered where they went."""

    @staticmethod
    def forward(
        ctx: Any,
        base: torch.Tensor,
        positions: list[torch.Tensor | None],
        *values: torch.Tensor,
    ) -> torch.Tensor:
        ctx.positions = positions
        ctx.kinds = [(value.shape, value.dtype) for value in values]
        flat = base.detach().contiguous().view(-1)
        only = positions[0] if len(positions) == 1 else None
        if only is not None:
            made = flat.clone()
            here = made.index_select(0, only).to(torch.float32)
            made.index_copy_(0, only, here.add_(values[0].reshape(-1)).to(made.dtype))
            return made.view(base.shape)
        total = torch.zeros(flat.shape, dtype=torch.float32, device=flat.device)
        for value, place in zip(values, positions, strict=True):
            change = value.reshape(-1).to(torch.float32)
            if place is None:
                total += change
            else:
                total.index_add_(0, place, change)
        return total.add_(flat).to(base.dtype).view(base.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        flat = gradient.reshape(-1)
        found = []
        for place, (shape, dtype) in zip(ctx.positions, ctx.kinds, strict=True):
            own = flat if place is None else flat.index_select(0, place)
            found.append(own.to(dtype).view(shape))
        return (None, None, *found)
