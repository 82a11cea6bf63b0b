"""The compiled loops give what NumPy and PyTorch give, bit for bit."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dare_adapters import codec, compiled
from dare_adapters.delta import WeightedDelta
from dare_adapters.difference import ParameterDifference
from dare_adapters.mask import BlockedSupport
from dare_adapters.matrix import MatrixView
from dare_adapters.prune import PruneRule
from dare_adapters.row_sums import apply_rows
from dare_adapters.scales import round_scales, store_scales
from dare_adapters.sparse_delta import SparseDelta

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_the_loops_are_there_where_a_compiler_is():
    if os.environ.get("DARE_ADAPTERS_COMPILED") == "0":
        pytest.skip("switched off by DARE_ADAPTERS_COMPILED=0")
    if shutil.which("cc") is None:
        pytest.skip("no C compiler on this machine")
    assert compiled.available(), "reinstall the project: `pip install -e .`"


needs_loops = pytest.mark.skipif(not compiled.available(), reason="the loops were not compiled")


@needs_loops
@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    rows=st.integers(1, 9),
    columns=st.integers(1, 400),
    block=st.integers(1, 65536) | st.integers(1, 40),
    start=st.integers(0, 8),
)
def test_positions_are_those_that_numpy_draws(
    seed: int, rows: int, columns: int, block: int, start: int
):
    support = BlockedSupport(seed, "some.weight", rows + start, columns, block)
    found, drawn = support.slots(start, start + rows), support._drawn_slots(start, start + rows)
    assert torch.equal(found.index, drawn.index)
    assert (found.valid is None) == (drawn.valid is None)
    assert found.valid is None or torch.equal(found.valid, drawn.valid)


@needs_loops
@pytest.mark.parametrize("base_dtype", DTYPES)
@pytest.mark.parametrize("finetuned_dtype", DTYPES)
@pytest.mark.parametrize(("columns", "block"), [(60, 10), (64, 10), (7, 10), (33, 1)])
def test_survivors_are_those_that_pytorch_gathers(
    base_dtype: torch.dtype, finetuned_dtype: torch.dtype, columns: int, block: int
):
    generator = torch.Generator().manual_seed(columns)
    base = (torch.randn(9 * columns, generator=generator) * 0.02).to(base_dtype)
    finetuned = (base.float() + torch.randn(base.shape, generator=generator) * 1e-3).to(
        finetuned_dtype
    )
    difference = ParameterDifference("w", (9, columns), base, finetuned, None)
    support = BlockedSupport(3, "w", 9, columns, block)
    rule = PruneRule(drop_rate=1 - 1 / block)
    slots, values = rule.survivors(difference, support, 2, 7)
    drawn = support._drawn_slots(2, 7)
    expected = drawn.clear_unused(difference.at(drawn.index, 2, 7) * rule.factor)
    assert torch.equal(slots.index, drawn.index)
    assert torch.equal(values, expected)


def random_delta(
    generator: torch.Generator, rows: int, columns: int, block: int, bits: int
) -> SparseDelta:
    support = BlockedSupport(7, "some.weight", rows, columns, block)
    slots = support.slots_per_row
    size = rows * codec.bytes_per_row(slots, bits)
    values = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
    scales = torch.rand(rows, generator=generator) * 10.0 ** torch.randint(
        -9, 3, (rows,), generator=generator
    )
    stored, exponent = store_scales(round_scales(scales, bits), bits)
    return SparseDelta((rows, columns), support, bits, values, stored, exponent)


@needs_loops
@pytest.mark.parametrize("bits", [8, 4, 2, 1])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, 9),
    columns=st.integers(2, 300),
    block=st.integers(1, 40),
    weight=st.sampled_from([1.0, 0.3, -2.5]),
    spread=st.sampled_from([1e-7, 1e-2, 1e4]),
)
def test_adding_and_putting_back_are_what_pytorch_does(
    bits: int,
    dtype: torch.dtype,
    seed: int,
    rows: int,
    columns: int,
    block: int,
    weight: float,
    spread: float,
):
    generator = torch.Generator().manual_seed(seed)
    delta = random_delta(generator, rows, columns, block, bits)
    # The window is a part of a larger parameter, whose other entries must stay.
    owner = (torch.randn(rows + 2, columns + 3, generator=generator) * spread).to(dtype)
    fast, slow = owner.clone(), owner.clone()
    views = [
        MatrixView(t.view(-1), rows, columns, columns + 3, columns + 3, 1) for t in (fast, slow)
    ]
    start = seed % rows
    kept = delta.apply_compiled(views[0], weight, start, rows)
    if kept is None:
        assert not delta.support.repeatable
        return
    index, change = WeightedDelta(delta, weight).read(start, rows)
    before = views[1].take(start, rows, index)
    views[1].put(start, rows, index, change.add_(before).to(dtype))
    assert torch.equal(fast.view(torch.uint8), slow.view(torch.uint8))
    assert torch.equal(kept.view(torch.uint8), before.view(torch.uint8))
    assert delta.restore_compiled(views[0], kept, start, rows)
    assert torch.equal(fast.view(torch.uint8), owner.view(torch.uint8))


@needs_loops
def test_rounding_is_right_at_the_edges_of_float16_and_bfloat16():
    edges = [0.0, -0.0, 65504.0, 65519.9, 65520.0, 1e30, 5.9e-8, 2.9e-8, 3.1e-8, 6.1e-5, 1.00048828]
    base = torch.tensor([edges + [-e for e in edges]])
    count = base.shape[1]
    delta = SparseDelta(
        (1, count),
        BlockedSupport(0, "x", 1, count, 1),
        8,
        torch.full((count,), 128, dtype=torch.uint8),
        torch.ones(1, dtype=torch.float16),
    )
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        target = base.to(dtype)
        expected = (target.float() + delta.dense()).to(dtype)
        delta.apply_compiled(MatrixView.over(target, 1, count), 1.0, 0, 1)
        assert torch.equal(target, expected)


@needs_loops
def test_autograd_sees_a_compiled_write():
    weight = torch.nn.Parameter(torch.randn(4, 40))
    out = (weight * weight).sum()
    delta = random_delta(torch.Generator().manual_seed(0), 4, 40, 10, 4)
    apply_rows(MatrixView.over(weight, 4, 40), [WeightedDelta(delta)], 0, 4)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_everything_works_without_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiled, "_library", lambda: None)
    delta = random_delta(torch.Generator().manual_seed(0), 6, 64, 10, 4)
    target = torch.randn(6, 64).bfloat16()
    expected = (target.float() + delta.dense()).bfloat16()
    apply_rows(MatrixView.over(target, 6, 64), [WeightedDelta(delta)], 0, 6)
    assert torch.equal(target, expected)
