"""Attach and detach by Triton kernels: the bits of the processor's loops, and of the format."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dare_adapters.delta import WeightedDelta
from dare_adapters.kernels import PackedDelta
from dare_adapters.mask import parameter_key
from dare_adapters.matrix import MatrixView
from dare_adapters.row_sums import apply_rows
from dare_adapters.scales import load_scales
from tests.kernels.deltas import BITS, blocked
from tests.test_mask import GOLDEN_BLOCKED, GOLDEN_NAME, GOLDEN_SEED, KNOWN_ANSWERS

if not os.environ.get("CI"):
    pytest.importorskip("triton")

import triton
import triton.language as tl

from dare_adapters.kernels.gpu.change import apply_on_device, offsets_on_device, restore_on_device
from dare_adapters.kernels.gpu.philox import philox, word_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cuts bfloat16 off where a GPU rounds.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
quickly = settings(max_examples=20, deadline=None)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "key_low", "key_high"])
def _words(out, seed_low, seed_high, key_low, key_high, COUNT: tl.constexpr):
    number = tl.arange(0, COUNT).to(tl.int64)
    a, b, c, d = philox(number, word_of(seed_low, seed_high), word_of(key_low, key_high))
    tl.store(out + number * 4, a.to(tl.int64, bitcast=True))
    tl.store(out + number * 4 + 1, b.to(tl.int64, bitcast=True))
    tl.store(out + number * 4 + 2, c.to(tl.int64, bitcast=True))
    tl.store(out + number * 4 + 3, d.to(tl.int64, bitcast=True))


def test_the_generator_gives_the_published_words():
    counter, (seed, key), words = KNOWN_ANSWERS[0]
    assert (counter, seed, key) == ((0, 0, 0, 0), 0, 0)
    out = torch.zeros(2, 4, dtype=torch.int64, device=DEVICE)
    _words[(1,)](out, 0, 0, 0, 0, COUNT=2)
    assert [word % (1 << 64) for word in out[0].tolist()] == list(words)


def test_offsets_are_those_that_the_format_promises():
    where = (GOLDEN_SEED, parameter_key(GOLDEN_NAME), 45, 10)
    offsets = torch.zeros(8, 4, dtype=torch.uint8, device=DEVICE)
    offsets_on_device(where, 8, offsets, 8)
    drawn = torch.stack([offsets & 15, offsets >> 4], dim=-1).flatten(1).tolist()
    for row, columns in GOLDEN_BLOCKED.items():
        found = [block * 10 + drawn[row][block] for block in range(5)]
        assert [column for column in found if column < 45] == columns


@quickly
@given(data=st.data())
def test_offsets_drawn_on_the_device_are_the_processors(data: st.DataObject):
    rows, columns = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 700))
    block = data.draw(st.integers(2, 40) | st.sampled_from([256, 257, 65536]))
    delta = blocked(rows, columns, block, 4, data.draw(st.integers(0, 2**63)))
    packed = PackedDelta.from_delta(delta)
    expected = packed.tensors()["offsets"]
    found = torch.full_like(expected, 77, device=DEVICE)
    offsets_on_device(delta.support.where, rows, found, packed.layout.slots)
    assert torch.equal(found.cpu(), expected)


@quickly
@given(data=st.data())
def test_a_change_has_the_bits_of_the_processors_loops_and_is_taken_back(data: st.DataObject):
    rows, columns = data.draw(st.integers(2, 8)), data.draw(st.integers(2, 400))
    block = data.draw(st.integers(1, 40))
    bits, seed = data.draw(st.sampled_from(BITS)), data.draw(st.integers(0, 2**63))
    weight, start = data.draw(st.sampled_from([1.0, 0.7, -3.0])), data.draw(st.integers(0, 1))
    dtype, margin = data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(0, 3))
    delta = blocked(rows, columns, block, bits, seed)
    if not delta.support.repeatable:
        return
    wide = torch.randn(rows, columns + margin).to(dtype)
    expected, found = wide.clone(), wide.clone().to(DEVICE)
    view = MatrixView(expected.view(-1), rows, columns, 0, columns + margin, 1)
    _, kept = apply_rows(view, [WeightedDelta(delta, weight)], start, rows)
    scales = None if delta.scales is None else load_scales(delta.scales, delta.exponent).to(DEVICE)
    where, slots = delta.support.where, delta.support.slots_per_row
    values = delta.values.to(DEVICE)
    originals = apply_on_device(
        where, bits, values, scales, weight, found.view(-1), columns + margin, slots, start, rows
    )
    assert torch.equal(found.cpu(), expected)
    assert torch.equal(originals.cpu(), kept)
    restore_on_device(where, found.view(-1), columns + margin, originals, slots, start, rows)
    assert torch.equal(found.cpu(), wide)
