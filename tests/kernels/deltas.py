"""Deltas of every kind with random contents."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st

from dare_adapters.codec import bytes_per_row
from dare_adapters.delta import Delta, DenseDelta, NoChange
from dare_adapters.lora import LowRankDelta
from dare_adapters.mask import BernoulliSupport, BlockedSupport, Support
from dare_adapters.scales import store_scales
from dare_adapters.sparse_delta import SparseDelta
from dare_adapters.stored_support import StoredSupport

KINDS = ["blocked", "bernoulli", "stored", "dense", "low rank", "nothing"]
BITS = [32, 16, 8, 4, 2, 1]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCKS = st.integers(1, 40) | st.sampled_from([256, 257, 300, 65536])


def blocked(rows: int, columns: int, block: int, bits: int, seed: int = 0) -> SparseDelta:
    """A delta with one survivor in each block."""
    return _sparse(BlockedSupport(seed, "some.weight", rows, columns, block), bits, seed)


def bernoulli(rows: int, columns: int, drop_rate: float, bits: int, seed: int = 0) -> SparseDelta:
    """A delta whose entries survive on their own."""
    return _sparse(BernoulliSupport(seed, "some.weight", rows, columns, drop_rate), bits, seed)


def stored(rows: int, columns: int, drop_rate: float, bits: int, seed: int = 0) -> SparseDelta:
    """A delta with a bitmap; its first row is whole and its last one empty."""
    kept = np.random.default_rng(seed).random((rows, columns)) >= drop_rate
    kept[:1], kept[1:][-1:] = True, False
    positions = np.flatnonzero(kept)
    return _sparse(StoredSupport.from_positions(positions, rows, columns), bits, seed)


@st.composite
def deltas(draw: st.DrawFn, rows: int, columns: int) -> Delta:
    """A delta of any kind, of a matrix."""
    kind, seed = draw(st.sampled_from(KINDS)), draw(st.integers(0, 1 << 20))
    bits = draw(st.sampled_from(BITS))
    if kind == "blocked":
        return blocked(rows, columns, draw(BLOCKS), bits, seed)
    if kind == "bernoulli":
        return bernoulli(rows, columns, draw(st.sampled_from([0.0, 0.5, 0.9])), bits, seed)
    if kind == "stored":
        return stored(rows, columns, draw(st.sampled_from([0.3, 0.9])), bits, seed)
    generator = torch.Generator().manual_seed(seed)
    if kind == "dense":
        values = torch.randn(rows, columns, generator=generator)
        return DenseDelta(values.to(draw(st.sampled_from(DTYPES))))
    if kind == "low rank":
        left, right = torch.randn(rows, 2, generator=generator), torch.randn(2, columns)
        return LowRankDelta(left, right, 0.5)
    return NoChange((rows, columns))


def _sparse(support: Support, bits: int, seed: int) -> SparseDelta:
    generator = torch.Generator().manual_seed(seed)
    counts = support.row_counts
    if counts is None:
        counts = np.full(support.rows, support.slots_per_row)
    shape = (support.rows, support.columns)
    if bits >= 16:
        dtype = torch.float32 if bits == 32 else DTYPES[1 + seed % 2]
        values = torch.randn(int(counts.sum()), generator=generator).to(dtype)
        return SparseDelta(shape, support, bits, values)
    size = sum(bytes_per_row(int(count), bits) for count in counts)
    codes = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
    scales, exponent = store_scales(torch.rand(support.rows, generator=generator) * 0.1, bits)
    return SparseDelta(shape, support, bits, codes, scales, exponent)
