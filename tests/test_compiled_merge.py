"""What deltas keep is added to a base in one pass, as plain PyTorch adds it, bit for bit."""

from __future__ import annotations

import itertools

import pytest
import torch

from dare_adapters import compiled
from dare_adapters.combine.consensus import DIVISORS, _merge
from dare_adapters.combine.dare import dare_linear, dare_ties
from dare_adapters.combine.sparsify import RandomMasks
from dare_adapters.delta import Delta, WeightedDelta
from dare_adapters.difference import ParameterDifference
from dare_adapters.mask import BlockedSupport
from dare_adapters.row_sums import add_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS, SEEDS = 5, [3, 11, 4]
pytestmark = pytest.mark.skipif(not compiled.available(), reason="the loops were not compiled")


def fine_tunes(
    base_dtype: torch.dtype, dtype: torch.dtype, columns: int, count: int
) -> list[ParameterDifference]:
    """Over one base; few levels, so that sums of magnitudes are exact in any order."""
    generator = torch.Generator().manual_seed(columns)

    def drawn() -> torch.Tensor:
        return torch.randint(-4, 5, (ROWS * columns,), generator=generator) / 64

    base = drawn()
    base[::7] = -0.0
    flat = base.to(base_dtype)
    shape = (ROWS, columns)
    return [ParameterDifference("w", shape, flat, drawn().to(dtype)) for _ in range(count)]


def plainly_rescaled(delta: ParameterDifference, density: float, seed: int) -> torch.Tensor:
    """What DARE keeps, rescaled to the delta's l1 norm, (rows * columns,)."""
    whole = delta.finetuned.to(torch.float32) - delta.base.to(torch.float32)
    support = BlockedSupport(seed, "w", delta.rows, delta.columns, round(1 / density))
    slots = support.slots(0, delta.rows)
    kept = torch.zeros_like(whole)
    places = slots.compact(slots.index)
    kept[places] = whole[places]
    norms = [values.abs().sum(dtype=torch.float64) for values in (whole, kept)]
    return kept * float(norms[0] / norms[1]) if norms[1] else kept


def ranges() -> list[tuple[int, int]]:
    return [(0, ROWS), (0, 2), (2, ROWS), (3, 4)]


@pytest.mark.parametrize(("base_dtype", "dtype"), itertools.product(DTYPES, DTYPES))
@pytest.mark.parametrize("columns", [7, 33, 1024, 1030, 2500])
@pytest.mark.parametrize("density", [0.5, 0.1, 0.02])
def test_a_sum_is_pytorchs(
    base_dtype: torch.dtype, dtype: torch.dtype, columns: int, density: float
):
    weights = [1.0, -0.6, 0.25]
    deltas = fine_tunes(base_dtype, dtype, columns, 3)
    masks = RandomMasks("w", SEEDS)
    merged = dare_linear(deltas, weights, density=density, rescale="l1", masks=masks)
    change = torch.full((ROWS * columns,), -0.0)
    for delta, weight, seed in zip(deltas, weights, SEEDS, strict=True):
        change += plainly_rescaled(delta, density, seed) * weight
    same_rows(merged, deltas[0].base, change)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [7, 1030, 2500])
@pytest.mark.parametrize("density", [0.5, 0.1, 0.02])
@pytest.mark.parametrize(
    ("method", "vote", "divisor"),
    itertools.product(("total", "frequency"), ("unweighted", "weighted"), DIVISORS),
)
def test_an_election_is_pytorchs(
    dtype: torch.dtype, columns: int, density: float, method: str, vote: str, divisor: str
):
    weights = [1.0, -0.6, 0.25]
    deltas = fine_tunes(dtype, dtype, columns, 3)
    merged = dare_ties(
        deltas,
        weights,
        density=density,
        majority_sign_method=method,
        rescale="l1",
        vote=vote,
        divisor=divisor,
        lambda_=0.7,
        masks=RandomMasks("w", SEEDS),
    )
    values = torch.stack(
        [plainly_rescaled(d, density, seed) for d, seed in zip(deltas, SEEDS, strict=True)]
    )
    column = torch.tensor(weights)
    change = _merge(values, column, method == "frequency", vote == "weighted", divisor) * 0.7
    same_rows(merged, deltas[0].base, change)


def same_rows(merged: Delta, base: torch.Tensor, change: torch.Tensor) -> None:
    """Base plus change, by values: zeros of both signs are alike here."""
    columns = len(base) // ROWS
    for start, stop in ranges():
        low, high = start * columns, stop * columns
        rows = add_rows(base[low:high], [WeightedDelta(merged)], start, stop)
        expected = base[low:high].to(torch.float32) + change[low:high]
        assert torch.equal(rows, expected.to(base.dtype))


def test_what_nobody_changes_keeps_its_bits():
    deltas = fine_tunes(torch.bfloat16, torch.bfloat16, 1030, 2)
    masks = RandomMasks("w", SEEDS[:2])
    merged = dare_ties(deltas, [1.0, 1.0], density=0.1, rescale="l1", masks=masks)
    rows = add_rows(deltas[0].base, [WeightedDelta(merged)], 0, ROWS)
    index = merged.read(0, ROWS)[0]
    assert index is not None
    untouched = torch.ones(len(rows), dtype=torch.bool)
    untouched[index] = False
    bits = [values.view(torch.int16)[untouched] for values in (rows, deltas[0].base)]
    assert torch.equal(*bits)
    assert (bits[1] == -0x8000).any()
