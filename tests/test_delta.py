"""Deltas read and applied a range of rows at a time, against dense arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dare_adapters
from dare_adapters.adapter import Adapter
from dare_adapters.delta import Delta, DenseDelta, WeightedDelta
from dare_adapters.mask import BernoulliSupport, BlockedSupport
from dare_adapters.matrix import MatrixView
from dare_adapters.row_sums import apply_rows
from dare_adapters.sparse_delta import SparseDelta
from tests import reference
from tests.checkpoints import fine_tuned, integers, write_checkpoint

SEED = 99
SHAPES = {
    "plain.weight": (12, 40),
    "ragged.weight": (7, 53),
    "conv.weight": (6, 3, 4, 2),
    "experts.weight": (2, 3, 130),
}
MASKS: dict[str, dict[str, Any]] = {
    "blocked": {"drop_rate": 0.75},
    "bernoulli": {"drop_rate": 0.75, "mask": "bernoulli"},
    "drop_only": {"drop_rate": 0.8, "method": "drop_only"},
    "bitmap": {"drop_rate": 0.6, "method": "magnitude"},
    "gaps": {"drop_rate": 0.97, "method": "magnitude"},
    "nothing dropped": {"drop_rate": 0.0},
}


def make(
    tmp_path: Path, dtype: torch.dtype, bits: int, **options: Any
) -> tuple[Adapter, dict[str, np.ndarray]]:
    """An extracted adapter, and the unpruned deltas in float32, taken with NumPy."""
    base = {
        name: integers(shape, 7 * place).to(dtype)
        for place, (name, shape) in enumerate(SHAPES.items())
    }
    finetuned = fine_tuned(base)
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "finetuned", finetuned)
    adapter = dare_adapters.extract(
        tmp_path / "base",
        tmp_path / "finetuned",
        tmp_path / "adapter",
        bits=bits,
        seed=SEED,
        progress=False,
        **options,
    )
    whole = {name: finetuned[name].float().numpy() - base[name].float().numpy() for name in base}
    return adapter, whole


def support_of(name: str, delta: np.ndarray, options: dict[str, Any]) -> np.ndarray:
    """The entries that survive, bool (rows, columns), with loops and a stable sort."""
    rows, columns = reference.matrix_of(delta.shape)
    drop_rate = options["drop_rate"]
    kept = np.zeros((rows, columns), dtype=bool)
    if options.get("method") == "magnitude":
        keep = round((1 - drop_rate) * delta.size)
        kept.reshape(-1)[np.argsort(-np.abs(delta).reshape(-1), kind="stable")[:keep]] = True
        return kept
    for row in range(rows):
        if options.get("mask") == "bernoulli":
            kept[row, reference.bernoulli_row(SEED, name, row, columns, drop_rate)] = True
        else:
            block = round(1 / (1 - drop_rate))
            found = reference.blocked_row(SEED, name, row, columns, block)
            kept[row, [column for column in found if column is not None]] = True
    return kept


def survivors(name: str, delta: np.ndarray, options: dict[str, Any]) -> np.ndarray:
    """The pruned delta, dense, float32 (rows, columns)."""
    factor = 1.0
    if options.get("method", "dare") == "dare":
        factor = 1 / (1 - options["drop_rate"])
    matrix = delta.reshape(reference.matrix_of(delta.shape)) * np.float32(factor)
    return np.where(support_of(name, delta, options), matrix, np.float32(0))


def stored_scales(adapter: Adapter, name: str) -> np.ndarray:
    """The scale of each row, read from the file's bytes."""
    config = json.loads((adapter.path / "adapter_config.json").read_text())
    tensors = reference.read_safetensors(adapter.path / "adapter_model.safetensors")
    module, last = name.split(".")
    scales = np.array(tensors[f"base_model.model.{module}.dare_{last}_scales"].numbers())
    entry = config["parameters"][name]
    exponent = entry.get("exponent", 0)
    return np.array([reference.scale_of(s, exponent, entry["bits"]) for s in scales])


@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_32_bits_a_delta_is_exactly_the_dense_one(tmp_path, dtype, options):
    adapter, whole = make(tmp_path, dtype, 32, **options)
    for name, delta in whole.items():
        expected = survivors(name, delta, options).reshape(delta.shape)
        assert np.array_equal(adapter[name].dense().numpy(), expected), name


@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_at_16_bits_a_delta_is_the_dense_one_in_half_precision(tmp_path, dtype, options):
    adapter, whole = make(tmp_path, dtype, 16, **options)
    half = torch.float16 if dtype == torch.float32 else dtype
    for name, delta in whole.items():
        expected = torch.from_numpy(survivors(name, delta, options)).to(half).float()
        assert torch.equal(adapter[name].dense(), expected.view(delta.shape)), name


@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_at_few_bits_every_survivor_is_at_its_nearest_level(tmp_path, bits, options):
    adapter, whole = make(tmp_path, torch.bfloat16, bits, **options)
    limit = 2 ** (bits - 1) - 1
    for name, delta in whole.items():
        expected = survivors(name, delta, options).astype(np.float64)
        found = adapter[name].dense().numpy().reshape(expected.shape).astype(np.float64)
        levels = stored_scales(adapter, name)[:, None, None] * np.arange(-limit, limit + 1)
        nearest = np.abs(expected[:, :, None] - levels).min(axis=2)
        assert np.allclose(np.abs(found - expected), nearest, rtol=1e-4, atol=1e-9), name
        assert (found[expected == 0] == 0).all(), name


@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS.keys())
def test_at_one_bit_every_survivor_is_its_sign_times_the_unbiased_scale(tmp_path, options):
    adapter, whole = make(tmp_path, torch.float32, 1, **options)
    for name, delta in whole.items():
        expected = survivors(name, delta, options).astype(np.float64)
        found = adapter[name].dense().numpy().reshape(expected.shape)
        length = np.abs(expected).sum(axis=1)
        scales = (expected**2).sum(axis=1) / np.where(length > 0, length, 1)
        # Scales far below the parameter's largest are subnormal in float16.
        close = np.isclose(np.abs(found), scales[:, None], rtol=2**-11, atol=scales.max() * 2**-24)
        alive = expected != 0
        assert close[alive].all(), name
        assert (np.sign(found) == np.sign(expected))[alive].all(), name
        assert (found[~support_of(name, delta, options)] == 0).all(), name


@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("bits", [32, 16, 8, 4, 2, 1])
def test_every_adapter_is_what_a_plain_decoder_reads(tmp_path, bits, options):
    adapter, _ = make(tmp_path, torch.bfloat16, bits, **options)
    for name, expected in reference.decode_adapter(adapter.path).items():
        assert np.array_equal(adapter[name].dense().double().numpy(), expected), name


@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("bits", [32, 4, 1])
def test_a_range_of_rows_is_a_slice_of_the_whole(tmp_path, bits, options):
    adapter, _ = make(tmp_path, torch.float32, bits, **options)
    for name, delta in adapter.deltas():
        dense = delta.dense().view(delta.rows, delta.columns)
        for start in range(delta.rows):
            for stop in (start + 1, min(start + 5, delta.rows), delta.rows):
                index, values = delta.read(start, stop)
                part = torch.zeros((stop - start) * delta.columns)
                part[index] = values
                assert torch.equal(part, dense[start:stop].reshape(-1)), (name, start, stop)
                assert torch.equal(delta.positions(start, stop), index)
                # A position may come twice, but never with two values.
                assert torch.equal(part[index], values)


# --- applying


def deltas_over(rows: int, columns: int) -> list[Delta]:
    """Two sparse deltas and a dense one."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.01

    blocked = BlockedSupport(1, "w", rows, columns, 4)
    bernoulli = BernoulliSupport(2, "w", rows, columns, 0.6)
    return [
        SparseDelta((rows, columns), blocked, 32, draw(blocked.slot_count)),
        SparseDelta((rows, columns), bernoulli, 32, draw(bernoulli.slot_count)),
        DenseDelta(draw(rows, columns).to(torch.bfloat16)),
    ]


def view_of(layout: str, matrix: torch.Tensor) -> tuple[MatrixView, torch.Tensor]:
    """A window that holds `matrix`, and its storage."""
    rows, columns = matrix.shape
    if layout == "contiguous":
        storage = matrix.clone().view(-1)
        return MatrixView.over(storage.view(rows, columns), rows, columns), storage
    if layout == "offset":  # rows of a larger stack
        storage = torch.full((rows * columns + 30,), 7.0, dtype=matrix.dtype)
        storage[20 : 20 + rows * columns] = matrix.reshape(-1)
        return MatrixView(storage, rows, columns, 20, columns, 1), storage
    if layout == "transposed":  # a Conv1D
        storage = matrix.t().contiguous().view(-1)
        return MatrixView(storage, rows, columns, 0, 1, rows), storage
    if layout == "strided":  # a part of each row of something wider
        storage = torch.full((rows, columns + 9), 7.0, dtype=matrix.dtype)
        storage[:, 4 : 4 + columns] = matrix
        return MatrixView(storage.view(-1), rows, columns, 4, columns + 9, 1), storage.view(-1)
    scattered = torch.arange(rows * columns).view(columns, rows).t().reshape(-1).flip(0)
    storage = torch.empty(rows * columns, dtype=matrix.dtype)
    storage[scattered] = matrix.reshape(-1)
    return MatrixView(storage, rows, columns, 0, 0, 0, scattered), storage


def read_back(view: MatrixView) -> torch.Tensor:
    """The matrix in a window, entry by entry."""
    found = torch.empty(view.rows, view.columns, dtype=view.dtype)
    for row in range(view.rows):
        for column in range(view.columns):
            place = view.offset + row * view.row_stride + column * view.column_stride
            if view.positions is not None:
                place = int(view.positions[row * view.columns + column])
            found[row, column] = view.storage[place]
    return found


@pytest.mark.parametrize("layout", ["contiguous", "offset", "transposed", "strided", "scattered"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chosen", [(0,), (1,), (2,), (0, 1), (0, 2), (0, 1, 2)], ids=str)
def test_deltas_are_summed_in_float32_and_rounded_once(layout, dtype, chosen):
    rows, columns, weights = 9, 23, (1.0, -0.5, 2.25)
    base = integers((rows, columns)).to(dtype)
    deltas = [WeightedDelta(deltas_over(rows, columns)[i], weights[i]) for i in chosen]
    total = torch.zeros(rows, columns)
    touched = torch.zeros(rows, columns, dtype=torch.bool)
    for weighted in deltas:
        total += weighted.delta.dense() * weighted.weight
        touched |= weighted.delta.dense() != 0
    expected = (base.float() + total).to(dtype)

    view, storage = view_of(layout, base)
    untouched = storage.clone()
    changed = [
        (start, *apply_rows(view, deltas, start, min(start + 4, rows))) for start in (0, 4, 8)
    ]
    assert torch.equal(read_back(view), expected)
    for start, index, originals in changed:
        stop = min(start + 4, rows)
        before = base[start:stop].reshape(-1)
        assert torch.equal(originals, before if index is None else before[index])
        if index is not None:
            written = torch.zeros((stop - start) * columns, dtype=torch.bool)
            written[index] = True
            assert torch.equal(written, written | touched[start:stop].reshape(-1))
        view.put(start, stop, index, originals)
    # What was there is back, and nothing beside the window was written.
    assert torch.equal(storage, untouched)


@settings(max_examples=40, deadline=None)
@given(weights=st.lists(st.floats(-3, 3, width=32), min_size=3, max_size=3))
def test_any_weights_give_the_dense_sum(weights):
    rows, columns = 5, 17
    base = integers((rows, columns)).to(torch.bfloat16)
    deltas = [WeightedDelta(d, w) for d, w in zip(deltas_over(rows, columns), weights, strict=True)]
    total = torch.zeros(rows, columns)
    for weighted in deltas:
        total += weighted.delta.dense() * weighted.weight
    view, _ = view_of("strided", base)
    apply_rows(view, deltas, 0, rows)
    assert torch.equal(read_back(view), (base.float() + total).to(torch.bfloat16))


def test_dense_deltas_take_any_float_type_and_scalars():
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        values = integers((3, 5)).to(dtype)
        assert torch.equal(DenseDelta(values).dense(), values.float())
    scalar = DenseDelta(torch.tensor(0.5))
    assert scalar.shape == ()
    assert scalar.dense().item() == 0.5
