"""The back end "reference": one token after another, from the dense delta, in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dare_adapters.kernels.backends import register_backend
from dare_adapters.kernels.packed_delta import PackedDelta

__all__ = ["add_product"]


@register_backend("reference")
def add_product(
    x: torch.Tensor,
    deltas: Sequence[PackedDelta | None],
    token_slot: torch.Tensor,
    y: torch.Tensor,
    *,
    transposed: bool,
    weights: torch.Tensor | None,
) -> None:
    """What every other back end is compared with; see :class:`AddProduct`."""
    for slot, delta in enumerate(deltas):
        if delta is None:
            continue
        dense = delta.dense().view(delta.rows, delta.columns)
        matrix = dense.T if transposed else dense
        for token, own in enumerate(token_slot.tolist()):
            if own == slot:
                change = matrix @ x[token].to(torch.float32)
                if weights is not None:
                    change = change * weights[slot]
                y[token] = y[token] + change
