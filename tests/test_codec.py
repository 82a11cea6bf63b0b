"""How survivors are rounded and packed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dare_adapters import codec
from dare_adapters.mask import Slots
from tests import reference

PACKED = [8, 4, 2, 1]
ROUNDED = [8, 4, 2]


def all_used(values: torch.Tensor) -> Slots:
    return Slots(torch.zeros(values.shape, dtype=torch.int64), None)


def quantise(values: torch.Tensor, bits: int) -> codec.Quantised:
    return codec.quantise(values.clone(), all_used(values), bits)


def limit_of(bits: int) -> int:
    return max(1, (1 << (bits - 1)) - 1)


def draw(kind: str, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Rows of a distribution, at the size of a delta."""
    generator = np.random.Generator(np.random.Philox(seed))
    shape = (rows, columns)
    values = {
        "gaussian": lambda: generator.standard_normal(shape),
        "laplace": lambda: generator.laplace(size=shape),
        "student-t": lambda: generator.standard_t(5, shape),
    }[kind]()
    return torch.from_numpy(values * 0.002).to(torch.float32)


def levels_error(row: np.ndarray, scale: float, limit: int) -> float:
    """Squared error of the nearest levels, in float64."""
    codes = np.clip(np.round(row / scale), -limit, limit)
    return float(((row - codes * scale) ** 2).sum())


def best_error(row: np.ndarray, bits: int) -> float:
    """The smallest squared error any scale gives, by trying 600 of them."""
    limit, largest = limit_of(bits), float(np.abs(row).max())
    return min(
        levels_error(row, largest / limit * share, limit) for share in np.linspace(0.05, 1.3, 600)
    )


# --- packing


@pytest.mark.parametrize("bits", PACKED)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_code_survives_packing_at_every_width(bits, data):
    rows, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 19))
    limit = limit_of(bits)
    code = st.sampled_from([-1, 1]) if bits == 1 else st.integers(-limit, limit)
    row = st.lists(code, min_size=width, max_size=width)
    table = data.draw(st.lists(row, min_size=rows, max_size=rows))
    packed = codec.pack(torch.tensor(table, dtype=torch.int8), bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, math.ceil(width * bits / 8))
    assert codec.bytes_per_row(width, bits) == packed.shape[1]
    for number, codes in enumerate(table):
        stored = bytes(packed[number].tolist())
        assert reference.unpack_codes(stored, bits, width) == codes
    assert codec.unpack(packed, bits).reshape(rows, -1)[:, :width].tolist() == table


@pytest.mark.parametrize("bits", PACKED)
def test_every_byte_unpacks_as_described(bits):
    found = codec.unpack(torch.arange(256, dtype=torch.uint8), bits)
    expected = [reference.unpack_codes(bytes([byte]), bits, 8 // bits) for byte in range(256)]
    assert found.dtype == torch.float32
    assert found.tolist() == expected


def test_packing_no_slots_gives_no_bytes():
    for bits in PACKED:
        packed = codec.pack(torch.zeros((3, 0), dtype=torch.int8), bits)
        assert packed.shape == (3, 0)


# --- 8, 4 and 2 bits


@pytest.mark.parametrize("bits", ROUNDED)
@pytest.mark.parametrize("kind", ["gaussian", "laplace", "student-t"])
@pytest.mark.parametrize("columns", [300, 700])
def test_rounding_is_within_a_tenth_of_the_best_scale(bits, kind, columns):
    values = draw(kind, 24, columns)
    found = quantise(values, bits).values().to(torch.float64)
    wide = values.to(torch.float64)
    error = float((found - wide).square().sum())
    best = sum(best_error(row, bits) for row in wide.numpy())
    assert error <= 1.1 * best


@pytest.mark.parametrize("bits", ROUNDED)
@pytest.mark.parametrize("kind", ["gaussian", "laplace", "student-t"])
def test_every_value_goes_to_its_nearest_level(bits, kind):
    values = draw(kind, 8, 300)
    quantised = quantise(values, bits)
    limit = limit_of(bits)
    assert int(quantised.codes.abs().max()) <= limit
    levels = quantised.scales.to(torch.float64)[:, None] * torch.arange(-limit, limit + 1)
    wide = values.to(torch.float64)
    nearest = (wide[:, :, None] - levels[:, None, :]).abs().amin(dim=2)
    found = (wide - quantised.values().to(torch.float64)).abs()
    assert torch.allclose(found, nearest, rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("bits", ROUNDED)
@pytest.mark.parametrize("kind", ["gaussian", "laplace", "student-t"])
def test_rounding_twice_is_rounding_once(bits, kind):
    once = quantise(draw(kind, 40, 200), bits)
    twice = quantise(once.values(), bits)
    assert torch.equal(once.values(), twice.values())


@pytest.mark.parametrize("bits", ROUNDED)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_zeros_stay_zero_and_signs_stay(bits, data):
    number = st.one_of(st.just(0.0), st.floats(-1, 1, width=32).map(lambda v: v * 1e-3))
    row = data.draw(st.lists(number, min_size=1, max_size=40))
    values = torch.tensor([row])
    found = quantise(values, bits).values()
    assert bool(torch.isfinite(found).all())
    assert bool((found[values == 0] == 0).all())
    assert bool((found * values.sign() >= 0).all())


@pytest.mark.parametrize("bits", PACKED)
def test_a_row_of_zeros_has_no_scale(bits):
    values = torch.zeros((2, 9))
    values[1, 4] = 0.25
    quantised = quantise(values, bits)
    assert quantised.scales[0] == 0
    assert quantised.scales[1] > 0
    assert not quantised.values()[0].any()


@pytest.mark.parametrize("bits", PACKED)
def test_a_single_survivor_a_row_is_kept_to_the_precision_of_its_scale(bits):
    values = draw("gaussian", 50, 1)
    precision = 0.045 if bits in (4, 2) else 2**-10
    assert torch.allclose(quantise(values, bits).values(), values, rtol=precision)


@pytest.mark.parametrize("bits", PACKED)
def test_rows_are_rounded_independently(bits):
    values = draw("laplace", 6, 77)
    whole = quantise(values, bits)
    for row in range(6):
        alone = quantise(values[row : row + 1], bits)
        assert torch.equal(alone.values()[0], whole.values()[row])


@pytest.mark.parametrize("bits", PACKED)
@pytest.mark.parametrize("kind", ["gaussian", "student-t"])
def test_the_measured_loss_is_the_loss(bits, kind):
    values = draw(kind, 9, 150)
    quantised = quantise(values, bits)
    wide = values.to(torch.float64)
    signal = wide.square().sum(dim=1)
    error = (quantised.values().to(torch.float64) - wide).square().sum(dim=1)
    assert torch.allclose(quantised.signal.to(torch.float64), signal, rtol=1e-5)
    assert torch.allclose(
        quantised.rounding.to(torch.float64), error, rtol=1e-3, atol=1e-6 * float(signal.max())
    )


# --- 1 bit


@settings(max_examples=100, deadline=None)
@given(
    row=st.lists(
        st.floats(-1, 1, width=32).filter(lambda v: v == 0 or abs(v) > 1e-6),
        min_size=1,
        max_size=50,
    )
)
def test_one_bit_projects_on_the_row_as_the_row_itself_does(row):
    values = torch.tensor([row])
    found = quantise(values, 1)
    v = values[0].to(torch.float64)
    norm = float(v @ v)
    # Only the rounding of the scale to 11 bits is in the way.
    assert float(v @ found.values()[0].to(torch.float64)) == pytest.approx(norm, rel=2**-11)
    assert bool((found.codes[values > 0] == 1).all())
    assert bool((found.codes[values < 0] == -1).all())


def test_one_bit_scales_are_the_ratio_of_norms():
    values = draw("laplace", 20, 333)
    wide = values.to(torch.float64)
    expected = wide.square().sum(dim=1) / wide.abs().sum(dim=1)
    scales = quantise(values, 1).scales
    assert torch.allclose(scales.to(torch.float64), expected, rtol=2**-11)


@given(width=st.integers(1, 64))
@settings(deadline=None)
def test_zeros_are_balanced_at_one_bit(width):
    values = torch.zeros((1, width))
    assert abs(int(quantise(values, 1).codes.sum())) == width % 2


def test_mostly_zero_rows_do_not_drift_at_one_bit():
    values = torch.zeros((50, 1000))
    values[:, ::37] = draw("gaussian", 50, 28)
    found = quantise(values, 1).values()
    assert float(found[values == 0].sum().abs()) <= float(found.abs().max()) * 50
