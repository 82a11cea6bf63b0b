"""Scales of quantised rows: what is stored is what rounding used."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dare_adapters import codec
from dare_adapters.mask import Slots
from dare_adapters.scales import load_scales, round_scales, store_scales

PRECISION = {8: 2**-11, 4: 2 ** (1 / 16) - 1 + 2**-11, 2: 2 ** (1 / 16) - 1 + 2**-11, 1: 2**-11}
REACH = {8: 2**-13, 4: 2**-30, 2: 2**-30, 1: 2**-13}
BITS = list(PRECISION)


@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=60, deadline=None)
@given(
    power=st.integers(-90, 100),
    ratios=st.lists(st.floats(2**-30, 1, width=32), min_size=1, max_size=20),
)
def test_scales_of_any_size_keep_their_precision(bits: int, power: int, ratios: list[float]):
    scales = torch.tensor(ratios, dtype=torch.float32).clamp(min=REACH[bits]) * 2.0**power
    rounded = round_scales(scales, bits)
    assert torch.allclose(rounded, scales, rtol=PRECISION[bits], atol=0)
    stored, exponent = store_scales(rounded, bits)
    largest = float(rounded.max())
    reachable = rounded >= largest * REACH[bits]
    assert torch.equal(load_scales(stored, exponent)[reachable], rounded[reachable])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [1e-38, 1e-30, 1.0, 1e30, 2e38])
def test_tiny_and_huge_scales_are_stored(bits: int, size: float):
    rounded = round_scales(torch.tensor([size, size / 2], dtype=torch.float32), bits)
    stored, exponent = store_scales(rounded, bits)
    assert torch.equal(load_scales(stored, exponent), rounded)


@pytest.mark.parametrize("bits", [4, 2])
def test_rounding_goes_to_the_nearest_step_of_an_eighth_of_an_octave(bits: int):
    scales = torch.logspace(-6, 3, 2000, dtype=torch.float64).to(torch.float32)
    steps = torch.tensor([round(2048 * 2 ** (-i / 8)) / 2048 for i in range(8)])
    grid = (steps[None, :] * 2.0 ** torch.arange(-30, 20)[:, None]).flatten().to(torch.float64)
    distance = (grid[None, :].log() - scales.to(torch.float64)[:, None].log()).abs()
    rounded = round_scales(scales, bits).to(torch.float64)
    found = (rounded.log() - scales.to(torch.float64).log()).abs()
    # Steps are rounded to eleven bits, and the points between them are not.
    assert bool((found <= distance.amin(dim=1) + 1e-3).all())
    assert bool(torch.isin(rounded, grid).all())


@pytest.mark.parametrize("bits", BITS)
def test_rounding_twice_is_rounding_once(bits: int):
    scales = round_scales(torch.rand(1000) + 1e-6, bits)
    assert torch.equal(round_scales(scales, bits), scales)


@pytest.mark.parametrize("bits", BITS)
def test_no_scales_and_zero_scales_are_stored(bits: int):
    assert store_scales(torch.zeros(0), bits)[0].shape == (0,)
    stored, exponent = store_scales(torch.zeros(3), bits)
    assert exponent == 0
    assert not load_scales(stored, exponent).any()


@pytest.mark.parametrize("bits", BITS)
def test_a_scale_far_below_the_largest_becomes_zero_and_not_another(bits: int):
    scales = round_scales(torch.tensor([1.0, 2.0**-40]), bits)
    assert load_scales(*store_scales(scales, bits)).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("bits", BITS)
def test_the_stored_scale_is_the_one_that_rounding_used(bits: int):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(30, 200, generator=generator) * 1e-3
    slots = Slots(torch.zeros(values.shape, dtype=torch.int64), None)
    scales = codec.quantise(values, slots, bits).scales
    assert torch.equal(load_scales(*store_scales(scales, bits)), scales)


def test_a_code_times_a_scale_is_exact_in_float32():
    scales = load_scales(torch.arange(255, dtype=torch.uint8), 3)
    for code in range(-8, 8):
        assert torch.equal((scales * code).double(), scales.double() * code)
