"""fisher, against its formula written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dare_adapters.combine import vectors
from dare_adapters.combine.fisher import fisher
from dare_adapters.errors import CombinationError
from tests.combine.whole import SHARES, Models, assert_near, flat, models

EPSILONS = st.sampled_from([0.0, 1e-6, 1e-2])


def information(drawn: Models, seed: int, *, zeros: bool) -> list[torch.Tensor]:
    """Squared gradients of very different sizes, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number, _ in enumerate(drawn.tuned):
        gradients = torch.randn(drawn.base.shape, generator=generator) * 10.0 ** (-2 * number)
        if zeros:
            gradients *= torch.rand(drawn.base.shape, generator=generator) < 0.5
        found.append(gradients.square())
    return found


def averaged(drawn: Models, weights: list[float]) -> list[float]:
    return [
        math.fsum(w * v for w, v in zip(weights, values, strict=True)) / math.fsum(weights)
        for values in zip(*map(flat, drawn.tuned), strict=True)
    ]


@settings(max_examples=60, deadline=None)
@given(
    drawn=models(2, 4),
    data=st.data(),
    seed=st.integers(0, 1000),
    epsilon=EPSILONS,
    normalize=st.booleans(),
    zeros=st.booleans(),
)
def test_is_the_formula(
    drawn: Models, data: st.DataObject, seed: int, epsilon: float, normalize: bool, zeros: bool
) -> None:
    count = len(drawn.tuned)
    weights = data.draw(st.lists(SHARES, min_size=count, max_size=count))
    norms = data.draw(st.lists(st.floats(1e-4, 1e4), min_size=count, max_size=count))
    diagonals = information(drawn, seed, zeros=zeros)
    c = [w / (norm + epsilon) if normalize else w for w, norm in zip(weights, norms, strict=True)]
    expected = averaged(drawn, weights)
    for place in range(drawn.base.numel()):
        trust = [ci * (flat(f)[place] + epsilon) for ci, f in zip(c, diagonals, strict=True)]
        if sum(trust) > 0:
            values = [flat(theta)[place] for theta in drawn.tuned]
            total = math.fsum(t * value for t, value in zip(trust, values, strict=True))
            expected[place] = total / math.fsum(trust)
    found = fisher(
        drawn.tuned,
        weights,
        epsilon=epsilon,
        normalize=normalize,
        norms=norms if normalize else None,
        statistics=diagonals,
    )
    assert_near(found, expected)


@settings(max_examples=60, deadline=None)
@given(drawn=models(2, 4), data=st.data(), value=st.sampled_from([0.0, 1e-9, 3.0]))
def test_with_equal_information_is_the_weighted_average(
    drawn: Models, data: st.DataObject, value: float
) -> None:
    count = len(drawn.tuned)
    weights = data.draw(st.lists(SHARES, min_size=count, max_size=count))
    equal = [torch.full(drawn.base.shape, value)] * count
    assert_near(fisher(drawn.tuned, weights, statistics=equal), averaged(drawn, weights))


@settings(max_examples=60, deadline=None)
@given(drawn=models(2, 4), data=st.data(), missing=st.integers(0, 3))
def test_without_all_statistics_is_the_weighted_average(
    drawn: Models, data: st.DataObject, missing: int
) -> None:
    count = len(drawn.tuned)
    weights = data.draw(st.lists(SHARES, min_size=count, max_size=count))
    some: list[torch.Tensor | None] = list(information(drawn, 0, zeros=False))
    some[missing % count] = None
    assert_near(fisher(drawn.tuned, weights, statistics=some), averaged(drawn, weights))


@settings(max_examples=60, deadline=None)
@given(drawn=models(2, 4), seed=st.integers(0, 1000))
def test_lies_between_the_models(drawn: Models, seed: int) -> None:
    found = fisher(
        drawn.tuned, [1.0] * len(drawn.tuned), statistics=information(drawn, seed, zeros=True)
    )
    every = torch.stack(drawn.tuned)
    slack = 1e-6 * every.abs().amax(dim=0)
    assert bool((found >= every.amin(dim=0) - slack).all())
    assert bool((found <= every.amax(dim=0) + slack).all())


@settings(max_examples=60, deadline=None)
@given(drawn=models(1, 1), weight=SHARES)
def test_of_one_adapter_is_that_adapter_bit_for_bit(drawn: Models, weight: float) -> None:
    statistics = information(drawn, 0, zeros=True)
    assert torch.equal(fisher(drawn.tuned, [weight], statistics=statistics), drawn.tuned[0])


def test_the_model_that_is_sure_of_an_entry_decides_it() -> None:
    tuned = [torch.tensor([1.0, 1.0]), torch.tensor([3.0, 3.0])]
    sure = [torch.tensor([1e6, 0.0]), torch.tensor([0.0, 1e6])]
    found = fisher(tuned, [1, 1], statistics=sure)
    torch.testing.assert_close(found, torch.tensor([1.0, 3.0]))


def test_normalising_undoes_the_scale_of_a_models_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    tuned = list(torch.randn(2, 3, 4, generator=generator))
    first, second = torch.rand(2, 3, 4, generator=generator)
    merged = [
        fisher(
            tuned,
            [1, 1],
            epsilon=0,
            normalize=True,
            norms=[float(first.norm()), scale * float(second.norm())],
            statistics=[first, scale * second],
        )
        for scale in (1.0, 1000.0)
    ]
    torch.testing.assert_close(*merged)


def test_steps_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    *tuned, first, second = torch.rand(4, 9, 10, generator=torch.Generator().manual_seed(1))
    whole = fisher(tuned, [1, 2], statistics=[first, second])
    monkeypatch.setattr(vectors, "STEP_ENTRIES", 7)
    assert torch.equal(fisher(tuned, [1, 2], statistics=[first, second]), whole)


def test_refuses_what_it_cannot_use() -> None:
    two, ones = [torch.ones(2)] * 2, torch.ones(2)
    with pytest.raises(CombinationError, match="fisher takes weights of at least 0"):
        fisher(two, [1, -1], statistics=[ones, ones])
    with pytest.raises(CombinationError, match=r"epsilon is -1; it must be .* at least 0"):
        fisher(two, [1, 1], epsilon=-1, statistics=[ones, ones])
    with pytest.raises(CombinationError, match="normalize needs norms"):
        fisher(two, [1, 1], normalize=True, statistics=[ones, ones])
    with pytest.raises(CombinationError, match="norms has 1 values for 2 adapters"):
        fisher(two, [1, 1], normalize=True, norms=[1], statistics=[ones, ones])
    with pytest.raises(CombinationError, match=r"Fisher of adapter 1 has the shape \[3\]"):
        fisher(two, [1, 1], statistics=[ones, torch.ones(3)])
    for wrong in (-1.0, math.nan):
        with pytest.raises(CombinationError, match="adapter 1 has entries that are negative or Na"):
            fisher(two, [1, 1], statistics=[ones, torch.tensor([1.0, wrong])])
