"""Triton's kernels: each of them, whatever would be chosen; interpreted where there is no GPU."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dare_adapters.kernels import PackedDelta, sparse_delta_linear
from tests.kernels.deltas import BITS, DTYPES, bernoulli, blocked
from tests.kernels.test_sparse_delta_linear import TOLERANCE, expected_product

if not os.environ.get("CI"):
    pytest.importorskip("triton")

from dare_adapters.kernels.gpu.group_tokens import group_tokens
from dare_adapters.kernels.gpu.launch import add_same_layout, choose_way, exact_in, kin

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAME = "triton" if DEVICE == "cuda" else "triton-interpreted"
# The interpreter cuts bfloat16 off where a GPU rounds.
KERNEL_DTYPES = DTYPES if DEVICE == "cuda" else [torch.float32, torch.float16]
quickly = settings(max_examples=12, deadline=None)


@pytest.mark.parametrize("way", ["gather", "multiply", "dense"])
@quickly
@given(data=st.data())
def test_each_way_gives_the_dense_sum(way: str, data: st.DataObject):
    rows, columns = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 90))
    tokens, slots = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 3))
    block, bits = data.draw(st.integers(1, 40)), data.draw(st.sampled_from(BITS))
    seed = data.draw(st.integers(0, 1000))
    cut = data.draw(st.integers(0, columns - 1))  # slices begin within blocks
    generator = torch.Generator().manual_seed(seed)
    made = [
        PackedDelta.from_delta(blocked(rows, columns, block, bits, seed * 2 + 4 * slot))
        for slot in range(slots)
    ]
    deltas: list[PackedDelta | None] = [one.slice_columns(cut, columns).to(DEVICE) for one in made]
    deltas[data.draw(st.integers(0, slots - 1))] = data.draw(st.sampled_from([None, deltas[0]]))
    present = [delta for delta in deltas if delta is not None]
    if not present:
        return
    layout = present[0].layout
    x_dtype, y_dtype = (data.draw(st.sampled_from(KERNEL_DTYPES)) for _ in range(2))
    if way == "dense" and not exact_in(x_dtype, layout):
        x_dtype = layout.dtype if layout.dtype in KERNEL_DTYPES[1:] else torch.float16
        if not exact_in(x_dtype, layout):
            return
    x = torch.randn(tokens, columns - cut, generator=generator).to(x_dtype).to(DEVICE)
    y = torch.randn(tokens, rows, generator=generator).to(y_dtype).to(DEVICE)
    token_slot = torch.randint(-1, slots + 2, (tokens,), generator=generator).to(DEVICE)
    weights = torch.randn(slots, generator=generator) if data.draw(st.booleans()) else None
    dense = [None if one is None else one.dense().view(one.rows, -1).cpu() for one in deltas]
    expected, size = expected_product(
        x.cpu(), dense, token_slot.cpu(), y.cpu(), False,
        None if weights is None else weights.tolist(),
    )  # fmt: skip
    found = y.clone()
    on_device = None if weights is None else weights.to(DEVICE)
    add_same_layout(x, deltas, layout, token_slot, found, False, on_device, way)
    assert ((found.cpu().double() - expected).abs() <= size * TOLERANCE[y_dtype]).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("make", [blocked, bernoulli])
@pytest.mark.parametrize("tokens", [1, 23])
def test_poison_shows_that_every_element_is_written_and_no_other(
    transposed: bool, make, tokens: int
):
    rows, columns, margin = 35, 52, 4
    delta = PackedDelta.from_delta(make(rows, columns, 10 if make is blocked else 0.9, 4))
    inputs, outputs = (rows, columns) if transposed else (columns, rows)
    poison = torch.full((tokens + 2, outputs + 2 * margin), float("nan"), device=DEVICE)
    inner = poison[1:-1, margin:-margin]
    token_slot = (torch.arange(tokens, device=DEVICE) + 1) % 3 - 1
    inner[token_slot == 0] = 0
    x = torch.ones(tokens, inputs, device=DEVICE)
    x[token_slot != 0] = float("nan")  # what other tokens hold reaches nobody
    sparse_delta_linear(
        x, [delta.to(DEVICE), None], token_slot, inner, transposed=transposed, backend=NAME
    )
    sums = delta.dense().sum(0 if transposed else 1)
    mine = inner[token_slot == 0].cpu()
    torch.testing.assert_close(mine, sums.expand(len(mine), -1))
    inner[token_slot == 0] = float("nan")
    assert poison.isnan().all()


@settings(max_examples=30, deadline=None)
@given(slots=st.lists(st.integers(-1, 6), min_size=1, max_size=50), chunk=st.sampled_from([8, 64]))
def test_tokens_are_sorted_by_slot_and_keep_their_order(slots: list[int], chunk: int):
    token_slot = torch.tensor(slots, device=DEVICE)
    order = torch.full((len(slots),), -7, dtype=torch.int32, device=DEVICE)
    starts = torch.empty(6, dtype=torch.int32, device=DEVICE)
    group_tokens[(6,)](token_slot, order, starts, len(slots), CHUNK=chunk)
    expected = [[t for t, own in enumerate(slots) if own == slot] for slot in range(5)]
    borders = starts.tolist()
    found = [order[a:b].tolist() for a, b in itertools.pairwise(borders)]
    assert borders[0] == 0
    assert found == expected
    assert (order[borders[-1] :] == -7).all()


def test_deltas_packed_in_different_ways_share_a_call():
    shape, tokens = (33, 64), 12
    sources = [
        blocked(*shape, 10, 4), blocked(*shape, 10, 4, 5), blocked(*shape, 20, 1),
        blocked(*shape, 300, 16), bernoulli(*shape, 0.5, 2), bernoulli(*shape, 0.9, 8),
    ]  # fmt: skip
    packed = [PackedDelta.from_delta(one).to(DEVICE) for one in sources]
    assert len({kin(one.layout) for one in packed}) == 5
    token_slot = (torch.arange(tokens) % 7).to(DEVICE)
    x = torch.randn(tokens, 64)
    found = torch.zeros(tokens, 33, device=DEVICE)
    sparse_delta_linear(x.to(DEVICE), packed, token_slot, found, backend=NAME)
    expected = torch.stack(
        [
            sources[slot].dense() @ x[token] if slot < 6 else torch.zeros(33)
            for token, slot in enumerate(token_slot.tolist())
        ]
    )
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)


def test_the_way_follows_from_tokens_a_delta():
    layout = PackedDelta.from_delta(blocked(64, 640, 10, 4)).layout
    half = torch.zeros(2048, 640, dtype=torch.bfloat16)
    assert choose_way(layout, half[:16], 1, False) == "gather"
    assert choose_way(layout, half[:64], 1, False) == "multiply"
    assert choose_way(layout, half, 1, False) == "dense"
    assert choose_way(layout, half[:64], 16, False) == "gather"
    assert choose_way(layout, half.float(), 1, False) == "multiply"
    assert choose_way(layout, half[:1], 1, True) == "multiply"
    far = PackedDelta.from_delta(blocked(8, 640, 300, 4)).layout
    assert (choose_way(far, half, 1, False), choose_way(far, half, 1, True)) == ("gather", None)


def test_broken_offsets_and_columns_never_reach_outside():
    for made in (blocked(20, 35, 10, 4), blocked(20, 35, 300, 4), bernoulli(20, 35, 0.5, 4)):
        packed = PackedDelta.from_delta(made)
        broken = {
            name: torch.ones_like(one).neg_() if name in ("offsets", "column_index") else one
            for name, one in packed.tensors().items()
        }
        delta = PackedDelta.from_tensors(packed.layout, broken).to(DEVICE)
        for tokens in (2, 30):
            x = torch.ones(tokens, 35, device=DEVICE)
            slot = torch.zeros(tokens, dtype=torch.int64, device=DEVICE)
            y = torch.zeros(tokens, 20, device=DEVICE)
            assert sparse_delta_linear(x, [delta], slot, y, backend=NAME).isfinite().all()


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")
def test_a_captured_graph_sees_new_tokens_slots_and_contents():
    deltas = [PackedDelta.from_delta(blocked(64, 640, 10, 4, seed)).to("cuda") for seed in (1, 2)]
    x, y = torch.randn(8, 640, device="cuda"), torch.zeros(8, 64, device="cuda")
    slot = torch.zeros(8, dtype=torch.int64, device="cuda")
    sparse_delta_linear(x, deltas, slot, y)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sparse_delta_linear(x, deltas, slot, y)
    y.zero_()
    slot.copy_(torch.arange(8) % 2)
    graph.replay()
    expected = torch.stack([deltas[t % 2].dense() @ x[t] for t in range(8)])
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
