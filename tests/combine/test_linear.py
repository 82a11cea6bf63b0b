"""Weighted sums, against PEFT's on dense deltas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils

from dare_adapters.combine.linear import average, linear, magnitude_prune
from dare_adapters.combine.registry import get_method
from dare_adapters.delta import DenseDelta
from dare_adapters.errors import CombinationError
from tests.combine.sources import (
    DENSITIES,
    aligned_deltas,
    close,
    delta_of,
    densities_for,
    distinct,
    keep_top,
    listed,
    normal,
    stack,
    weights_for,
)

pytestmark = pytest.mark.filterwarnings("ignore:The density")


@settings(max_examples=100, deadline=None)
@given(deltas=aligned_deltas(), data=st.data())
def test_a_weighted_sum_is_that_of_peft(deltas, data):
    weights = data.draw(weights_for(deltas))
    dense = [delta.dense() for delta in deltas]
    assert close(linear(deltas, weights), merge_utils.task_arithmetic(dense, torch.tensor(weights)))


@settings(max_examples=80, deadline=None)
@given(
    deltas=aligned_deltas(kinds=("float32", "nothing"), values=("distinct",)),
    density=DENSITIES,
    data=st.data(),
)
def test_pruning_by_magnitude_is_that_of_peft_where_no_magnitudes_are_equal(deltas, density, data):
    weights = data.draw(weights_for(deltas))
    dense = [delta.dense() for delta in deltas]
    expected = merge_utils.magnitude_prune(dense, torch.tensor(weights), density)
    assert close(magnitude_prune(deltas, weights, density=density), expected)


@settings(max_examples=100, deadline=None)
@given(deltas=aligned_deltas(), data=st.data())
def test_pruning_by_magnitude_keeps_the_first_of_equal_ones(deltas, data):
    weights, density = data.draw(weights_for(deltas)), data.draw(densities_for(deltas))
    whole, shares = stack(deltas), listed(density, len(deltas))
    expected = np.zeros(whole.shape[1])
    for values, weight, share in zip(whole, weights, shares, strict=True):
        expected += weight * keep_top(values, int(share * values.size))
    found = magnitude_prune(deltas, weights, density=density)
    room = 1e-6 * float(np.abs(whole).max(initial=0)) * sum(map(abs, weights))
    assert np.allclose(found.dense().view(-1).numpy(), expected, rtol=1e-6, atol=room)


@settings(max_examples=60, deadline=None)
@given(
    deltas=aligned_deltas(),
    lambda_=st.sampled_from([-1.5, 0.0, 0.3, 1.0]),
    normalize=st.booleans(),
)
def test_lambda_and_the_sum_of_weights_are_factors_of_the_result(deltas, lambda_, normalize):
    weights = [0.5, -0.25, 2.0, 1.0, 0.125][: len(deltas)]
    factor = lambda_ / sum(weights) if normalize else lambda_
    expected = np.einsum("k,kn->n", weights, stack(deltas)) * factor
    found = linear(deltas, weights, normalize=normalize, lambda_=lambda_)
    assert np.allclose(found.dense().view(-1).numpy(), expected, rtol=1e-5, atol=1e-6)
    pruned = magnitude_prune(deltas, weights, density=1, normalize=normalize, lambda_=lambda_)
    assert torch.equal(pruned.dense(), found.dense())


@settings(max_examples=40, deadline=None)
@given(deltas=aligned_deltas())
def test_the_average_with_equal_weights_is_the_mean(deltas):
    found = average(deltas, [0.7] * len(deltas))
    assert np.allclose(found.dense().view(-1).numpy(), stack(deltas).mean(axis=0), atol=1e-6)


@pytest.mark.parametrize("kind", ["float32", "blocked", "stored"])
def test_one_delta_with_weight_one_is_that_very_delta(kind):
    delta = delta_of(kind, normal((5, 16), 1), 1)
    assert linear([delta], [1.0]) is delta
    assert linear([delta], [0.5], lambda_=2.0) is delta
    assert average([delta], [3.0]) is delta
    assert magnitude_prune([delta], [1.0], density=1.0) is delta
    assert linear([delta], [2.0]) is not delta


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -1.0]])
def test_weights_that_sum_to_zero_divide_nothing(weights):
    deltas = [DenseDelta(distinct((2, 3), number)) for number in range(2)]
    for merge in (average, lambda d, w: linear(d, w, normalize=True)):
        with pytest.raises(CombinationError, match="sum to zero, by which nothing can be divided"):
            merge(deltas, weights)
    assert linear(deltas, weights).dense().isfinite().all()


def test_peft_knows_a_sum_under_several_names():
    names = ("linear", "task_arithmetic", "cat")
    assert {get_method(name).function for name in names} == {linear}


def test_pruning_by_magnitude_needs_a_density():
    deltas = [DenseDelta(distinct((2, 3), 1))]
    with pytest.raises(CombinationError, match="density is needed"):
        magnitude_prune(deltas, [1.0])
    with pytest.raises(CombinationError, match=r"density is 2; it must be a number in 0 … 1"):
        magnitude_prune(deltas, [1.0], density=2)
