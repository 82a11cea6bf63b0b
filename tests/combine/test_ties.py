"""TIES, against PEFT's on dense deltas and a plain loop of the paper, mergekit and MergeLM."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils

from dare_adapters.combine.consensus import DIVISORS, MAJORITY_SIGN_METHODS, VOTES, disjoint_merge
from dare_adapters.combine.ties import ties
from dare_adapters.delta import DenseDelta
from dare_adapters.errors import CombinationError
from tests.combine.sources import (
    DENSITIES,
    aligned_deltas,
    close,
    delta_of,
    densities_for,
    distinct,
    in_pieces,
    keep_top,
    levels,
    listed,
    merge_loop,
    normal,
    range_starts,
    stack,
    weights_for,
)

pytestmark = pytest.mark.filterwarnings("ignore:The density")
# Sums of these are exact, so that a zero sum is zero in any order.
EXACT = {"values": ("levels", "distinct"), "bits": (32, 16, 4)}


@settings(max_examples=120, deadline=None)
@given(
    deltas=aligned_deltas(kinds=("float32", "nothing"), values=("distinct",)),
    density=DENSITIES,
    data=st.data(),
)
@pytest.mark.parametrize("method", MAJORITY_SIGN_METHODS)
def test_by_default_it_is_that_of_peft(method, deltas, density, data):
    weights = data.draw(weights_for(deltas))
    dense = [delta.dense() for delta in deltas]
    expected = merge_utils.ties(dense, torch.tensor(weights), density, method)
    found = ties(deltas, weights, density=density, majority_sign_method=method)
    assert close(found, expected)


@settings(max_examples=120, deadline=None)
@given(deltas=aligned_deltas(**EXACT), data=st.data())
@pytest.mark.parametrize("method", MAJORITY_SIGN_METHODS)
def test_the_election_is_that_of_peft_where_nothing_is_trimmed(method, deltas, data):
    weights = data.draw(weights_for(deltas))
    dense = [delta.dense() for delta in deltas]
    expected = merge_utils.ties(dense, torch.tensor(weights), 1.0, method)
    assert close(ties(deltas, weights, density=1.0, majority_sign_method=method), expected)


@settings(max_examples=25, deadline=None)
@given(deltas=aligned_deltas(**EXACT), data=st.data())
@pytest.mark.parametrize(
    ("method", "vote", "divisor"), list(product(MAJORITY_SIGN_METHODS, VOTES, DIVISORS))
)
def test_every_convention_is_that_of_a_plain_loop(method, vote, divisor, deltas, data):
    weights, density = data.draw(weights_for(deltas)), data.draw(densities_for(deltas))
    trimmed = np.stack(
        [
            keep_top(values, int(share * values.size))
            for values, share in zip(stack(deltas), listed(density, len(deltas)), strict=True)
        ]
    )
    found = ties(
        deltas,
        weights,
        density=density,
        majority_sign_method=method,
        vote=vote,
        divisor=divisor,
        lambda_=0.5,
    )
    assert close(found, 0.5 * merge_loop(trimmed, weights, method, vote, divisor))


def test_a_zero_sum_of_weights_divides_by_one_as_in_mergekit():
    # A negative weight turns a vote: both vote for plus, with weights 1 and -1.
    deltas = [DenseDelta(torch.tensor([3.0, 1.0])), DenseDelta(torch.tensor([-2.0, 1.0]))]
    found = ties(deltas, [1.0, -1.0], density=1, vote="weighted", divisor="weights")
    assert found.dense().tolist() == [3.0 + 2.0, 1.0]


def test_a_sum_of_zero_elects_plus():
    deltas = [DenseDelta(torch.tensor([1.0, 3.0])), DenseDelta(torch.tensor([-1.0, -3.0]))]
    assert ties(deltas, [1, 1], density=1).dense().tolist() == [1.0, 3.0]
    assert ties(deltas, [2, 4], density=1).dense().tolist() == [2.0, 6.0]
    found = ties([DenseDelta(torch.tensor([-1.0]))] * 2, [1, -1], density=1, vote="weighted")
    assert found.dense().tolist() == [1.0]


def test_frequency_counts_heads_and_total_weighs_them():
    deltas = [DenseDelta(torch.tensor([value])) for value in (5.0, -1.0, -2.0)]
    assert ties(deltas, [1] * 3, density=1).dense().item() == 5.0
    found = ties(deltas, [1] * 3, density=1, majority_sign_method="frequency")
    assert found.dense().item() == -1.5


def test_redundant_values_go_and_the_sign_with_more_mass_stays():
    deltas = [
        DenseDelta(torch.tensor([3.0, 0.1, -1.0, 2.0])),
        DenseDelta(torch.tensor([1.0, 0.2, -3.0, -4.0])),
        DenseDelta(torch.tensor([-0.1, 4.0, 2.0, 1.0])),
    ]
    assert ties(deltas, [1] * 3, density=0.75).dense().tolist() == [2.0, 4.0, -2.0, -4.0]


@settings(max_examples=60, deadline=None)
@given(deltas=aligned_deltas(), density=DENSITIES, data=st.data())
def test_no_bit_depends_on_how_rows_are_read(deltas, density, data):
    merged = ties(deltas, data.draw(weights_for(deltas)), density=density, vote="weighted")
    starts = data.draw(range_starts(merged.rows))
    assert torch.equal(in_pieces(merged, starts), merged.dense().view(-1))


@settings(max_examples=60, deadline=None)
@given(deltas=aligned_deltas(least=2, **EXACT), data=st.data())
def test_the_order_of_adapters_does_not_matter(deltas, data):
    weights, order = data.draw(weights_for(deltas)), data.draw(st.permutations(range(len(deltas))))
    found = ties(deltas, weights, density=0.5)
    again = ties([deltas[n] for n in order], [weights[n] for n in order], density=0.5)
    assert close(again, found.dense())


@pytest.mark.parametrize("kind", ["float32", "blocked", "stored"])
def test_one_delta_untrimmed_with_weight_one_is_that_very_delta(kind):
    delta = delta_of(kind, normal((5, 16), 1), 1)
    assert ties([delta], [1.0], density=1.0) is delta
    assert close(ties([delta], [-2.0], density=1.0), -2 * delta.dense())


def test_of_equal_magnitudes_exactly_as_many_stay_as_asked():
    values = levels((40, 50), 1, largest=1)
    values[values == 0] = 2.0**-10
    for density in (0.0, 0.1, 0.3, 0.999):
        found = ties([DenseDelta(values)], [1.0], density=density).dense()
        assert int((found != 0).sum()) == int(density * 2000)


@pytest.mark.parametrize(
    ("option", "value", "valid"),
    [
        ("majority_sign_method", "mean", "total, frequency"),
        ("vote", "none", "unweighted, weighted"),
        ("divisor", "sum", "count, weights, none"),
        ("trim_scope", "layer", "parameter, model"),
    ],
)
def test_an_unknown_value_is_answered_with_the_valid_ones(option, value, valid):
    delta = DenseDelta(distinct((2, 3), 1))
    with pytest.raises(CombinationError, match=f"{option} is '{value}'; there are {valid}"):
        ties([delta], [1.0], density=0.5, **{option: value})


@pytest.mark.parametrize("density", [None, -0.1, 1.5, [0.5, 0.5]])
def test_a_density_that_cannot_be_is_refused(density):
    with pytest.raises(CombinationError, match="density"):
        ties([DenseDelta(distinct((2, 3), 1))], [1.0], density=density)


def test_what_agrees_is_decided_entry_by_entry():
    values = torch.tensor([[1.0, -1.0, 0.0, 2.0], [1.0, 2.0, 0.0, -2.0]])
    merge = disjoint_merge([1.0, 3.0])
    assert merge(values).tolist() == [(1 + 3) / 2, 6.0, 0.0, 2.0]
