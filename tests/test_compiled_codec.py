"""The compiled quantiser gives what PyTorch gives, bit for bit."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dare_adapters import codec, compiled_codec
from dare_adapters.difference import ParameterDifference
from dare_adapters.errors import CheckpointError
from dare_adapters.mask import BlockedSupport, Slots
from dare_adapters.prune import PruneRule
from tests.test_compiled import DTYPES

PACKED = [8, 4, 2, 1]
needs_loops = pytest.mark.skipif(
    not compiled_codec.available(), reason="the loops were not compiled"
)


def portable(values: torch.Tensor, slots: Slots, bits: int) -> codec.Quantised:
    """`codec.quantise` without the loops."""
    with mock.patch.object(compiled_codec, "available", return_value=False):
        return codec.quantise(values, slots, bits)


def assert_equal(found: codec.Quantised, expected: codec.Quantised) -> None:
    for name in ("scales", "signal", "rounding"):  # squares beyond float32 may end in NaN
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), rtol=0, atol=0, equal_nan=True
        )
    sound = torch.isfinite(expected.scales)  # others are refused when they are stored
    assert torch.equal(found.codes[sound], expected.codes[sound])


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@needs_loops
@pytest.mark.parametrize("bits", PACKED)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_row_is_rounded_alike(bits, data):
    rows, width = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 70))
    exponent = data.draw(st.sampled_from([0, -10, -60, -120, -140, 30, 60]))
    seed = data.draw(st.integers(0, 2**32))
    values = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    values = torch.ldexp(values, torch.tensor(exponent))
    for _ in range(data.draw(st.integers(0, 3))):
        if width:
            place = data.draw(st.integers(0, rows * width - 1))
            values.view(-1)[place] = data.draw(st.just(0.0) | st.just(-0.0) | FLOATS)
    ragged = data.draw(st.booleans()) and width > 0
    valid = torch.rand(rows, generator=torch.Generator().manual_seed(seed)) < 0.5
    slots = Slots(torch.zeros(rows, width, dtype=torch.int64), valid if ragged else None)
    slots.clear_unused(values)
    assert_equal(
        codec.quantise(values.clone(), slots, bits),
        portable(values.clone(), slots, bits),
    )


@needs_loops
@pytest.mark.parametrize("bits", PACKED)
@pytest.mark.parametrize("rows_columns", [(1, 1), (5, 7), (9, 64), (3, 333), (4, 1000)])
@pytest.mark.parametrize("block", [1, 4, 10, 100])
def test_a_row_encoded_at_once_is_gathered_rounded_and_packed(bits, rows_columns, block):
    rows, columns = rows_columns
    generator = torch.Generator().manual_seed(rows * columns)
    for base_dtype in DTYPES:
        for finetuned_dtype in DTYPES:
            base = torch.randn(rows, columns, generator=generator)
            finetuned = base + 0.01 * torch.randn(rows, columns, generator=generator)
            difference = ParameterDifference(
                "some.weight",
                (rows, columns),
                base.to(base_dtype).view(-1),
                finetuned.to(finetuned_dtype).view(-1),
            )
            rule = PruneRule("dare", 1 - 1 / block)
            support = BlockedSupport(3, "some.weight", rows, columns, block)
            slots, values = rule.survivors(difference, support, 0, rows)
            expected = portable(values, slots, bits)
            start = rows // 2
            for first in (0, start):
                found = compiled_codec.encode(
                    support.where,
                    codec.bytes_per_row(support.slots_per_row, bits),
                    difference.base,
                    difference.finetuned,
                    rule.factor,
                    bits,
                    first,
                    rows,
                )
                assert found is not None
                packed, scales, signal, rounding, used = found
                assert torch.equal(packed, codec.pack(expected.codes, bits)[first:])
                assert torch.equal(scales, expected.scales[first:])
                assert torch.equal(signal, expected.signal[first:])
                assert torch.equal(rounding.clamp(min=0), expected.rounding[first:])
                assert used == int(slots.used_per_row()[first:].sum())


@needs_loops
@pytest.mark.parametrize("strange", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["base", "finetuned"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_entry_that_is_not_finite_is_seen_though_it_is_dropped(dtype, side, strange):
    sides = {"base": torch.zeros(4, 100, dtype=dtype), "finetuned": torch.ones(4, 100, dtype=dtype)}
    support = BlockedSupport(3, "some.weight", 4, 100, 10)
    dropped = next(c for c in range(100) if c not in support.slots(2, 3).index.view(-1).tolist())
    sides[side][2, dropped] = strange
    flat = {name: value.view(-1) for name, value in sides.items()}
    where = (support.where, 5, flat["base"], flat["finetuned"], 10.0, 4)
    assert compiled_codec.encode(*where, 0, 2) is not None
    assert compiled_codec.encode(*where, 3, 4) is not None
    assert compiled_codec.encode(*where, 0, 4) is None
    difference = ParameterDifference("some.weight", (4, 100), flat["base"], flat["finetuned"])
    named = f"some.weight.*row 2, column {dropped}"
    with pytest.raises(CheckpointError, match=named):
        difference.check_finite(0, 4)
