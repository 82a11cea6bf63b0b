"""The back end "compiled": the loops of `_product.c` on the processor, straight from packed codes.

Outputs are shared out among threads, so a sum never depends on how many there are. A product of a
small layer takes a few microseconds, no more than a handful of Python's calls into C: so what is
known of a delta is written down once, and a request is one block of bytes.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from dare_adapters.compiled import DTYPES
from dare_adapters.kernels.backends import register_backend
from dare_adapters.kernels.blocked import BlockedLayout
from dare_adapters.kernels.compressed_rows import CompressedRowsLayout
from dare_adapters.kernels.packed_delta import PackedDelta
from dare_adapters.kernels.portable import add_product as add_dense_product
from dare_adapters.shared_library import load_library

__all__ = ["add_product", "available"]

_NAME = "compiled"
# Entries times vectors of eight tokens that are worth a thread's waking, some ten microseconds.
WORTH_A_THREAD = 1 << 14
# Outputs in a cache line, so that no two threads write to one.
TOGETHER = 64
LARGEST = 1 << 30

# `request` in `_product.c`.
_REQUEST = struct.Struct("PqPPqqqqPqqPqqqq")


class _Delta(ctypes.Structure):
    """`delta` in `_packed_rows.h`."""

    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("kind", "rows", "columns", "bits", "value_dtype")],
        *[(name, ctypes.c_int64) for name in ("block", "slots", "phase")],
        *[(name, ctypes.c_int64) for name in ("survivors", "index_bytes")],
        *[(name, ctypes.c_void_p) for name in ("offsets", "row_starts", "column_index")],
        *[(name, ctypes.c_void_p) for name in ("values", "scales")],
    ]


class _Known(NamedTuple):
    """A delta as the loops see it; `address` is 0 where it is dense."""

    address: int
    width: int
    described: _Delta | None


@lru_cache(maxsize=1)
def _library() -> Any:
    return load_library(__file__, "_product", _declare)


def _declare(library: Any) -> None:
    library.dare_products.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_uint]
    library.dare_products.restype = ctypes.c_int


def available() -> bool:
    """Whether the compiled loops are there."""
    return _library() is not None


def _serves(x: torch.Tensor, y: torch.Tensor) -> bool:
    on_cpu = x.is_cpu and y.is_cpu and x.dtype in DTYPES and y.dtype in DTYPES
    return on_cpu and x.shape[1] < LARGEST and y.shape[1] < LARGEST and available()


@register_backend(_NAME, serves=_serves, rank=1)
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
    addresses, width, any_dense = [], 0, False
    for delta in deltas:
        if delta is None:
            addresses.append(0)
            continue
        address, own_width, _ = delta.prepared.get(_NAME) or _describe(delta)
        addresses.append(address)
        width = max(width, own_width)
        any_dense = any_dense or not address
    if width and x.shape[0]:
        _add_sparse(x, addresses, width, token_slot, y, transposed, weights)
    if any_dense:
        dense = [None if one is None or one.layout.is_sparse else one for one in deltas]
        add_dense_product(x, dense, token_slot, y, transposed=transposed, weights=weights)


def _add_sparse(
    x: torch.Tensor,
    addresses: list[int],
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
    if token_slot.dtype is not torch.int64 or not token_slot.is_contiguous():
        token_slot = token_slot.to(torch.int64).contiguous()
    if weights is not None:
        weights = weights.to(torch.float32).contiguous()
    rows, columns = (inputs, outputs) if transposed else (outputs, inputs)
    work = rows * width * (min(tokens, len(addresses)) + tokens // 8)
    team = threads = 1 if work < 2 * WORTH_A_THREAD else torch.get_num_threads()
    if threads > 1:
        threads = max(1, min(threads, work // WORTH_A_THREAD, outputs // TOGETHER))
    deltas = _list_of(len(addresses))(*addresses)
    request = _REQUEST.pack(
        ctypes.addressof(deltas), len(addresses), 0 if weights is None else weights.data_ptr(),
        token_slot.data_ptr(), tokens, rows, columns, width, x.data_ptr(), DTYPES[x.dtype],
        x_stride, out.data_ptr(), DTYPES[out.dtype], y_stride, transposed, threads,
    )  # fmt: skip
    if _library().dare_products(request, _fork_join() if threads > 1 else None, team):
        raise MemoryError(f"no memory to hold {tokens} tokens of {inputs} inputs")
    if out is not y:
        y.copy_(out)
    elif not y.is_inference():
        torch.autograd.graph.increment_version(y)


@lru_cache(maxsize=64)
def _list_of(count: int) -> type[ctypes.Array[ctypes.c_void_p]]:
    return ctypes.c_void_p * count


def _describe(delta: PackedDelta) -> _Known:
    layout, tensors = delta.layout, delta.tensors()
    if not layout.is_sparse:
        return _kept(delta, _Known(0, 0, None))
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
    return _kept(delta, _Known(ctypes.addressof(made), layout.width, made))


def _kept(delta: PackedDelta, known: _Known) -> _Known:
    """With the delta from now on; what another thread put there first is as good."""
    found = delta.prepared.setdefault(_NAME, known)
    assert isinstance(found, _Known)
    return found


@lru_cache(maxsize=1)
def _fork_join() -> int | None:
    """GOMP_parallel of the OpenMP that PyTorch runs on, whose threads are awake, if it is GNU's."""
    if _forked or not torch.backends.openmp.is_available():  # type: ignore[no-untyped-call]
        return None
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, OSError, TypeError):
        return None


_forked: list[bool] = []


def _after_fork() -> None:
    """A child has none of its parent's threads, of which OpenMP does not know."""
    _forked.append(True)
    _fork_join.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
