"""regmean, against its formula written out, and by what it minimises."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dare_adapters.combine import regmean as module
from dare_adapters.combine.regmean import regmean
from dare_adapters.errors import CombinationError
from tests.combine.whole import SHARES, Models, assert_near, models


@dataclass(frozen=True)
class Layer:
    """A linear layer in several models: weights (outputs, inputs), and what goes into it."""

    weights: list[torch.Tensor]
    inputs: list[torch.Tensor]
    shares: list[float]

    @property
    def grams(self) -> list[torch.Tensor]:
        return [(x.T @ x) / len(x) for x in self.inputs]

    def loss(self, weight: torch.Tensor) -> float:
        """Σ wᵢ ‖Xᵢ W − Xᵢ Wᵢ‖² / nᵢ, in float64."""
        return math.fsum(
            share * float((x @ (weight.double() - own.double()).T).square().sum()) / len(x)
            for share, own, x in zip(self.shares, self.weights, self.inputs, strict=True)
        )


@st.composite
def layers(draw: st.DrawFn, *, rows: int | None = None, square: bool = False) -> Layer:
    inputs = draw(st.integers(1, 8))
    outputs = inputs if square else draw(st.integers(1, 8))
    count = draw(st.integers(2, 4))
    shares = draw(st.lists(SHARES, min_size=count, max_size=count))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    base = torch.randn(outputs, inputs, generator=generator)
    weights = [base + 0.3 * torch.randn(base.shape, generator=generator) for _ in range(count)]
    examples = [
        torch.randn(rows or 40, inputs, generator=generator, dtype=torch.float64)
        for _ in range(count)
    ]
    return Layer(weights, examples, shares)


def solved(matrix: list[list[float]], right: list[list[float]]) -> list[list[float]]:
    """matrix⁻¹ right, by Gauss and Jordan with pivots."""
    size = len(matrix)
    rows = [[*a, *b] for a, b in zip(matrix, right, strict=True)]
    for place in range(size):
        pivot = max(range(place, size), key=lambda row: abs(rows[row][place]))
        rows[place], rows[pivot] = rows[pivot], rows[place]
        rows[place] = [value / rows[place][place] for value in rows[place]]
        for other in range(size):
            if other != place:
                factor = rows[other][place]
                rows[other] = [
                    a - factor * b for a, b in zip(rows[other], rows[place], strict=True)
                ]
    return [row[size:] for row in rows]


@settings(max_examples=60, deadline=None)
@given(layer=layers(), reduce=st.sampled_from([0.0, 0.5, 0.9, 1.0]))
def test_is_the_formula(layer: Layer, reduce: float) -> None:
    outputs, inputs = layer.weights[0].shape
    total = [[0.0] * inputs for _ in range(inputs)]
    target = [[0.0] * outputs for _ in range(inputs)]
    for share, gram, weight in zip(layer.shares, layer.grams, layer.weights, strict=True):
        for i in range(inputs):
            for j in range(inputs):
                g = share * float(gram[i, j]) * (1.0 if i == j else reduce)
                total[i][j] += g
                for k in range(outputs):
                    target[i][k] += g * float(weight[k, j])
    expected = solved(total, target)
    found = regmean(layer.weights, layer.shares, reduce_non_diagonal=reduce, statistics=layer.grams)
    assert_near(found, [expected[j][k] for k in range(outputs) for j in range(inputs)])


@settings(max_examples=60, deadline=None)
@given(layer=layers(), seed=st.integers(0, 1000), size=st.sampled_from([1e-3, 0.1, 1.0]))
def test_no_other_weight_is_nearer_to_every_models_outputs(
    layer: Layer, seed: int, size: float
) -> None:
    found = regmean(layer.weights, layer.shares, statistics=layer.grams)
    noise = torch.randn(found.shape, generator=torch.Generator().manual_seed(seed))
    least = layer.loss(found)
    assert least <= layer.loss(found + size * noise) + 1e-9
    for weight in layer.weights:
        assert least <= layer.loss(weight) + 1e-9


@settings(max_examples=60, deadline=None)
@given(layer=layers(rows=3), precision=st.sampled_from([torch.float32, torch.float64]))
def test_with_fewer_examples_than_inputs_it_still_fits_them(
    layer: Layer, precision: torch.dtype
) -> None:
    """The Gram matrices' sum may be singular."""
    grams = [gram.to(precision) for gram in layer.grams[:2]]
    weights, inputs, shares = layer.weights[:2], layer.inputs[:2], layer.shares[:2]
    found = regmean(weights, shares, statistics=grams)
    least = Layer(weights, inputs, shares).loss
    assert bool(found.isfinite().all())
    average = sum(s * w for s, w in zip(shares, weights, strict=True)) / sum(shares)
    assert least(found) <= least(average) + 1e-6


@settings(max_examples=60, deadline=None)
@given(layer=layers())
def test_inputs_that_never_move_keep_the_average(layer: Layer) -> None:
    for x in layer.inputs:
        x[:, 0] = 0
    found = regmean(layer.weights, layer.shares, statistics=layer.grams)
    average = sum(s * w for s, w in zip(layer.shares, layer.weights, strict=True))
    torch.testing.assert_close(found[:, 0], average[:, 0] / sum(layer.shares))


@settings(max_examples=60, deadline=None)
@given(layer=layers(square=True))
def test_equal_data_give_the_weighted_average(layer: Layer) -> None:
    same = [layer.grams[0]] * len(layer.weights)
    average = sum(s * w for s, w in zip(layer.shares, layer.weights, strict=True))
    found = regmean(layer.weights, layer.shares, statistics=same)
    torch.testing.assert_close(found, average / sum(layer.shares))


@settings(max_examples=60, deadline=None)
@given(layer=layers(square=True))
def test_a_leading_one_says_that_the_inputs_come_first(layer: Layer) -> None:
    expected = regmean(layer.weights, layer.shares, statistics=layer.grams)
    turned = [weight.T.contiguous() for weight in layer.weights]
    grams = [gram[None] for gram in layer.grams]
    torch.testing.assert_close(regmean(turned, layer.shares, statistics=grams), expected.T)


def test_where_only_the_first_dimension_fits_the_inputs_come_first() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = list(torch.randn(2, 5, 3, generator=generator))
    x = torch.randn(2, 20, 3, generator=generator)
    grams = [one.T @ one / 20 for one in x]
    expected = regmean(weights, [1, 1], statistics=grams)
    turned = [weight.T.contiguous() for weight in weights]
    torch.testing.assert_close(regmean(turned, [1, 1], statistics=grams), expected.T)


@settings(max_examples=60, deadline=None)
@given(drawn=models(2, 3), missing=st.integers(0, 2))
def test_without_all_statistics_is_the_average(drawn: Models, missing: int) -> None:
    statistics: list[torch.Tensor | None] = [torch.eye(3)] * len(drawn.tuned)
    statistics[missing % len(statistics)] = None
    found = regmean(drawn.tuned, [1.0] * len(drawn.tuned), statistics=statistics)
    torch.testing.assert_close(found, torch.stack(drawn.tuned).mean(dim=0))


@settings(max_examples=60, deadline=None)
@given(drawn=models(1, 1), weight=SHARES)
def test_of_one_adapter_is_that_adapter_bit_for_bit(drawn: Models, weight: float) -> None:
    assert torch.equal(regmean(drawn.tuned, [weight], statistics=[None]), drawn.tuned[0])


def test_ranges_of_rows_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = list(torch.randn(2, 6, 11, generator=generator))
    grams = [x.T @ x for x in torch.randn(2, 30, 11, generator=generator)]
    whole = regmean(weights, [1, 2], reduce_non_diagonal=0.9, statistics=grams)
    monkeypatch.setattr(module, "STEP_ENTRIES", 40)
    again = regmean(weights, [1, 2], reduce_non_diagonal=0.9, statistics=grams)
    torch.testing.assert_close(again, whole)


def test_refuses_what_it_cannot_use() -> None:
    two, gram = [torch.ones(4, 3)] * 2, torch.eye(3)
    with pytest.raises(CombinationError, match="regmean takes weights of at least 0"):
        regmean(two, [1, -1], statistics=[gram, gram])
    with pytest.raises(CombinationError, match=r"reduce_non_diagonal is 2; .* in 0 … 1"):
        regmean(two, [1, 1], reduce_non_diagonal=2, statistics=[gram, gram])
    with pytest.raises(CombinationError, match=r"ridge is -1; it must be .* at least 0"):
        regmean(two, [1, 1], ridge=-1, statistics=[gram, gram])
    for wrong in (torch.eye(5), torch.ones(3, 4), torch.ones(3), torch.ones(()), gram[None]):
        with pytest.raises(CombinationError, match=r"Gram matrices .* do not fit a weight \[4, 3"):
            regmean(two, [1, 1], statistics=[wrong, wrong])
    with pytest.raises(CombinationError, match=r"\[3, 3\], \[4, 4\] do not fit"):
        regmean(two, [1, 1], statistics=[gram, torch.eye(4)])
    with pytest.raises(CombinationError, match=r"do not fit a weight \[3\]"):
        regmean([torch.ones(3)] * 2, [1, 1], statistics=[gram, gram])
    with pytest.raises(CombinationError, match="singular with ridge 0; set a larger ridge"):
        regmean(two, [1, 1], ridge=0, statistics=[torch.ones(3, 3)] * 2)
    with pytest.raises(CombinationError, match="singular"):
        regmean(two, [1, 1], statistics=[torch.full((3, 3), math.nan)] * 2)
