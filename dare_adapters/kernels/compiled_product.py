"""The back end "compiled": the loops of `_product.c` on the processor, straight from packed codes.

Outputs are shared out among threads, so a sum never depends on how many there are.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch

from dare_adapters.compiled import DTYPES
from dare_adapters.kernels.backends import register_backend
from dare_adapters.kernels.blocked import BlockedLayout
from dare_adapters.kernels.compressed_rows import CompressedRowsLayout
from dare_adapters.kernels.packed_delta import PackedDelta
from dare_adapters.kernels.portable import add_product as add_dense_product
from dare_adapters.shared_library import load_library

__all__ = ["add_product", "available"]

# Entries times vectors of eight tokens that are worth a thread's waking, some tens of microseconds.
WORTH_A_THREAD = 1 << 17
# Outputs in a cache line, so that no two threads write to one; and blocks that share a byte.
TOGETHER = 64
LARGEST = 1 << 30


class _Delta(ctypes.Structure):
    """`delta` in `_product.c`."""

    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("kind", "rows", "columns", "bits", "value_dtype")],
        *[(name, ctypes.c_int64) for name in ("block", "slots", "phase")],
        *[(name, ctypes.c_int64) for name in ("survivors", "index_bytes")],
        *[(name, ctypes.c_void_p) for name in ("offsets", "row_starts", "column_index")],
        *[(name, ctypes.c_void_p) for name in ("values", "scales")],
    ]


@lru_cache(maxsize=1)
def _library() -> Any:
    return load_library(__file__, "_product", _declare)


def _declare(library: Any) -> None:
    size, place, number = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
    library.dare_add_products.argtypes = [
        place, size, place, place, size, size, size, size, place, number, size, place, number, size,
        number, size, size,
    ]  # fmt: skip
    library.dare_add_products.restype = number


def available() -> bool:
    """Whether the compiled loops are there."""
    return _library() is not None


def _serves(x: torch.Tensor, y: torch.Tensor) -> bool:
    on_cpu = x.device.type == "cpu" and y.device.type == "cpu"
    fits = max(x.shape[1], y.shape[1]) < LARGEST
    return on_cpu and fits and x.dtype in DTYPES and y.dtype in DTYPES and available()


@register_backend("compiled", serves=_serves, rank=1)
def add_product(
    x: torch.Tensor,
    deltas: Sequence[PackedDelta | None],
    token_slot: torch.Tensor,
    y: torch.Tensor,
    *,
    transposed: bool,
    weights: torch.Tensor | None,
) -> None:
    """See :class:`AddProduct`; a dense delta is PyTorch's to multiply."""
    sparse = [delta if delta is not None and delta.layout.is_sparse else None for delta in deltas]
    if any(delta is not None for delta in sparse) and x.numel() and y.numel():
        _add_sparse(x, sparse, token_slot, y, transposed, weights)
    dense = [delta if own is None else None for delta, own in zip(deltas, sparse, strict=True)]
    if any(delta is not None for delta in dense):
        add_dense_product(x, dense, token_slot, y, transposed=transposed, weights=weights)


def _add_sparse(
    x: torch.Tensor,
    deltas: Sequence[PackedDelta | None],
    token_slot: torch.Tensor,
    y: torch.Tensor,
    transposed: bool,
    weights: torch.Tensor | None,
) -> None:
    x = x if x.stride(1) == 1 else x.contiguous()
    token_slot = token_slot.to(torch.int64).contiguous()
    weights = None if weights is None else weights.to(torch.float32).contiguous()
    out = y if y.stride(1) == 1 else y.contiguous()
    described = (_Delta * len(deltas))(*[_described(delta) for delta in deltas])
    width = max(delta.layout.width for delta in deltas if delta is not None)
    inputs, outputs = x.shape[1], y.shape[1]
    rows, columns = (inputs, outputs) if transposed else (outputs, inputs)

    def add(low: int, high: int) -> None:
        failed = _library().dare_add_products(
            described, len(deltas), None if weights is None else weights.data_ptr(),
            token_slot.data_ptr(), len(token_slot), rows, columns, width, x.data_ptr(),
            DTYPES[x.dtype], x.stride(0), out.data_ptr(), DTYPES[out.dtype], out.stride(0),
            transposed, low, high,
        )  # fmt: skip
        if failed:
            raise MemoryError(f"no memory to hold {len(token_slot)} tokens of {inputs} inputs")

    work = rows * width * max(1, len(token_slot) // 8)
    parts = min(torch.get_num_threads(), work // WORTH_A_THREAD, outputs // TOGETHER)
    if parts <= 1:
        add(0, outputs)
    else:
        borders = [outputs * part // parts // TOGETHER * TOGETHER for part in range(parts)]
        ends = [*borders[1:], outputs]
        others = [_pool().submit(add, *share) for share in zip(borders[1:], ends[1:], strict=True)]
        add(borders[0], ends[0])
        for other in others:
            other.result()
    if out is not y:
        y.copy_(out)
    elif not y.is_inference():
        torch.autograd.graph.increment_version(y)


_NOTHING = _Delta()
_known: WeakKeyDictionary[PackedDelta, _Delta] = WeakKeyDictionary()


def _described(delta: PackedDelta | None) -> _Delta:
    """A delta as the loops see it; valid as long as the delta, which keeps its tensors."""
    if delta is None:
        return _NOTHING
    found = _known.get(delta)
    if found is None:
        found = _known[delta] = _describe(delta)
    return found


def _describe(delta: PackedDelta) -> _Delta:
    layout, tensors = delta.layout, delta.tensors()
    made = _Delta(
        kind=layout.kind,
        rows=layout.rows,
        columns=layout.columns,
        bits=layout.bits,
        value_dtype=DTYPES.get(layout.dtype, 0),
    )
    if isinstance(layout, BlockedLayout):
        made.block, made.slots, made.phase = layout.block, layout.slots, layout.phase
    elif isinstance(layout, CompressedRowsLayout):
        made.survivors = layout.survivors
        made.index_bytes = tensors["column_index"].element_size()
    for name, tensor in tensors.items():
        setattr(made, name, tensor.data_ptr())
    return made


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="dare-product")


if hasattr(os, "register_at_fork"):  # a child has none of its parent's threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
