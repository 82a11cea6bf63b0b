"""What is not finite is found wherever it is, with the compiled loops and without."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dare_adapters import finite
from dare_adapters.finite import first_non_finite

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
STRANGE = [float("nan"), float("inf"), float("-inf"), -float("nan")]


@pytest.mark.parametrize("compiled", [True, False])
@given(
    count=st.integers(0, 70),
    dtype=st.sampled_from(DTYPES),
    places=st.lists(st.integers(0, 69), max_size=3),
    value=st.sampled_from(STRANGE),
    seed=st.integers(0, 9),
)
def test_the_first_is_told(
    compiled: bool, count: int, dtype: torch.dtype, places: list[int], value: float, seed: int
):
    generator = torch.Generator().manual_seed(seed)
    largest = torch.finfo(dtype).max
    flat = torch.randn(count, generator=generator, dtype=torch.float64).clamp_(-1, 1)
    flat = (flat * largest).to(dtype).clamp_(-largest, largest)
    inside = [place for place in places if place < count]
    flat[inside] = value
    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            patch.setattr(finite, "_library", lambda: None)
        assert first_non_finite(flat) == min(inside, default=None)
        assert first_non_finite(torch.stack([flat, flat], dim=1)[:, 0]) == min(inside, default=None)
