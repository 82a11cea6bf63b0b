"""The back ends "triton" and "triton-interpreted": kernels on an accelerator, or their test.

Blocked deltas have kernels in both orientations, compressed rows in the plain one; dense rows and
what else is left goes the portable way. Nothing is imported from Triton before it is needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dare_adapters.compiled import DTYPES
from dare_adapters.kernels.backends import register_backend
from dare_adapters.kernels.gpu.available import can_compile, can_interpret, device_of
from dare_adapters.kernels.layout import Layout
from dare_adapters.kernels.packed_delta import PackedDelta
from dare_adapters.kernels.portable import add_product as add_portable_product

__all__ = ["add_product"]


def _compiles(x: torch.Tensor, y: torch.Tensor) -> bool:
    if x.is_cpu:
        return False
    return x.dtype in DTYPES and y.dtype in DTYPES and can_compile(x.device)


def _interprets(x: torch.Tensor, y: torch.Tensor) -> bool:
    known = x.dtype in DTYPES and y.dtype in DTYPES
    return known and x.device.type == "cpu" and can_interpret()


@register_backend("triton-interpreted", serves=_interprets)
def add_interpreted_product(
    x: torch.Tensor,
    deltas: Sequence[PackedDelta | None],
    token_slot: torch.Tensor,
    y: torch.Tensor,
    *,
    transposed: bool,
    weights: torch.Tensor | None,
) -> None:
    """:func:`add_product` on a processor; the interpreter cuts bfloat16 off instead of rounding."""
    if x.dtype == torch.bfloat16:
        x = x.to(torch.float32)
    out = y.to(torch.float32) if y.dtype == torch.bfloat16 else y
    add_product(x, deltas, token_slot, out, transposed=transposed, weights=weights)
    if out is not y:
        y.copy_(out)


@register_backend("triton", serves=_compiles, rank=2)
def add_product(
    x: torch.Tensor,
    deltas: Sequence[PackedDelta | None],
    token_slot: torch.Tensor,
    y: torch.Tensor,
    *,
    transposed: bool,
    weights: torch.Tensor | None,
) -> None:
    """See :class:`AddProduct`."""
    from dare_adapters.kernels.gpu.launch import add_same_layout, choose_way, kin

    if not len(x):
        return
    x = x if x.stride(1) == 1 else x.contiguous()
    out = y if y.stride(1) == 1 else y.contiguous()
    token_slot = token_slot.contiguous()
    weights = None if weights is None else weights.to(torch.float32).contiguous()
    rest, families = list(deltas), dict[Layout, list[PackedDelta | None]]()
    live = sum(delta is not None for delta in deltas)
    for slot, delta in enumerate(deltas):
        if delta is None or choose_way(delta.layout, x, live, transposed) is None:
            continue
        rest[slot] = None
        if delta.rows and delta.layout.width:
            families.setdefault(kin(delta.layout), [None] * len(deltas))[slot] = delta
    with device_of(x):
        for layout, own in families.items():
            way = choose_way(layout, x, live, transposed)
            add_same_layout(x, own, layout, token_slot, out, transposed, weights, way)
    if any(delta is not None for delta in rest):
        add_portable_product(x, rest, token_slot, out, transposed=transposed, weights=weights)
    if out is not y:
        y.copy_(out)
    elif not y.is_inference():
        torch.autograd.graph.increment_version(y)
