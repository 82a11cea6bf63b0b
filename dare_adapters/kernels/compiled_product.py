"""The back end "compiled": the loops of `_product.c` on the processor, straight from packed codes.

Outputs are shared out among threads, so a sum never depends on how many there are.
"""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
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
    on_cpu = x.is_cpu and y.is_cpu and x.dtype in DTYPES and y.dtype in DTYPES
    return on_cpu and x.shape[1] < LARGEST and y.shape[1] < LARGEST and available()


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
    dense: list[PackedDelta | None] | None = None
    described, width = _described(deltas), 0
    for slot, delta in enumerate(deltas):
        if delta is None:
            continue
        layout = delta.layout
        if layout.is_sparse:
            width = max(width, layout.width)
        else:
            dense = dense or [None] * len(deltas)
            dense[slot] = delta
    if width and x.shape[0]:
        _add_sparse(x, described, width, token_slot, y, transposed, weights)
    if dense is not None:
        add_dense_product(x, dense, token_slot, y, transposed=transposed, weights=weights)


def _described(deltas: Sequence[PackedDelta | None]) -> ctypes.Array[_Delta]:
    """Sparse deltas as the loops see them; whatever else there is, as none."""
    if len(deltas) == 1 and deltas[0] is not None:  # nothing to gather, which takes microseconds
        alone = _known.get(deltas[0])
        if alone is not None:
            return alone
    made = (_Delta * len(deltas))()
    for slot, delta in enumerate(deltas):
        if delta is None or not delta.layout.is_sparse:
            continue
        found = _known.get(delta)
        if found is None:
            found = _known[delta] = (_Delta * 1)(_describe(delta))
        made[slot] = found[0]
    return made


def _add_sparse(
    x: torch.Tensor,
    described: ctypes.Array[_Delta],
    width: int,
    token_slot: torch.Tensor,
    y: torch.Tensor,
    transposed: bool,
    weights: torch.Tensor | None,
) -> None:
    (tokens, inputs), outputs = x.shape, y.shape[1]
    (x_stride, x_step), (y_stride, y_step) = x.stride(), y.stride()
    out = y
    if x_step != 1:
        x = x.contiguous()
        x_stride = inputs
    if y_step != 1:
        out = y.contiguous()
        y_stride = outputs
    if token_slot.dtype != torch.int64 or not token_slot.is_contiguous():
        token_slot = token_slot.to(torch.int64).contiguous()
    weights = None if weights is None else weights.to(torch.float32).contiguous()
    rows, columns = (inputs, outputs) if transposed else (outputs, inputs)
    arguments = (
        described, len(described), None if weights is None else weights.data_ptr(),
        token_slot.data_ptr(), tokens, rows, columns, width, x.data_ptr(), DTYPES[x.dtype],
        x_stride, out.data_ptr(), DTYPES[out.dtype], y_stride, transposed,
    )  # fmt: skip
    work = rows * width * max(1, tokens // 8)
    parts = 1 if work < 2 * WORTH_A_THREAD else _parts(work, outputs)

    add = partial(_library().dare_add_products, *arguments)
    if parts == 1:
        failed = bool(add(0, outputs))
    else:
        borders = [outputs * part // parts // TOGETHER * TOGETHER for part in range(parts)]
        shares = [*itertools.pairwise([*borders, outputs])]
        others = [_pool().submit(add, *share) for share in shares[1:]]
        failed = any([add(*shares[0]), *(other.result() for other in others)])
    if failed:
        raise MemoryError(f"no memory to hold {tokens} tokens of {inputs} inputs")
    if out is not y:
        y.copy_(out)
    elif not y.is_inference():
        torch.autograd.graph.increment_version(y)


def _parts(work: int, outputs: int) -> int:
    return max(1, min(torch.get_num_threads(), work // WORTH_A_THREAD, outputs // TOGETHER))


# Deltas as the loops see them; valid as long as the delta, which keeps its tensors.
_known: WeakKeyDictionary[PackedDelta, ctypes.Array[_Delta]] = WeakKeyDictionary()


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
