"""DARE before a sum or an election, against plain loops over masks from the published rule."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils

from dare_adapters.combine.consensus import DIVISORS, MAJORITY_SIGN_METHODS, VOTES
from dare_adapters.combine.dare import dare_linear, dare_ties
from dare_adapters.combine.sparsify import RandomMasks
from dare_adapters.delta import Delta, DenseDelta
from dare_adapters.errors import CombinationError
from tests.combine.sources import (
    aligned_deltas,
    close,
    delta_of,
    densities_for,
    distinct,
    in_pieces,
    kept_at_random,
    listed,
    merge_loop,
    normal,
    range_starts,
    stack,
    weights_for,
)

SEEDS = [11, 2**64 - 1, 0, 5, 5]
MASKS = st.sampled_from(["auto", "bernoulli"])
EXACT = {"values": ("levels", "distinct"), "bits": (32, 16, 4)}
# Those by which a division of the values is a product without rounding.
WHOLE = st.sampled_from([0.0, 0.1, 0.25, 1 / 3, 0.5, 1.0])


def dropped(
    deltas: list[Delta], density: float | list[float], kind: str, rescale: str = "density"
) -> np.ndarray:
    """All deltas after dropping, float64 (k, n), an entry at a time."""
    found = []
    shares = listed(density, len(deltas))
    for delta, seed, share, values in zip(deltas, SEEDS, shares, stack(deltas), strict=False):
        if share == 1:
            found.append(values)
            continue
        kept = kept_at_random(seed, "w", delta.rows, delta.columns, share, kind)
        left = [value if keep else 0.0 for value, keep in zip(values, kept, strict=True)]
        factor = 1.0
        if rescale == "density" and share > 0:
            factor = 1 / share
        elif rescale == "l1" and any(left):
            factor = sum(map(abs, values)) / sum(map(abs, left))
        found.append(np.array(left) * factor)
    return np.stack(found)


@settings(max_examples=100, deadline=None)
@given(deltas=aligned_deltas(), kind=MASKS, data=st.data())
@pytest.mark.parametrize("rescale", ["density", "l1", "none"])
def test_a_sum_is_that_of_a_plain_loop_over_the_same_masks(rescale, deltas, kind, data):
    weights, density = data.draw(weights_for(deltas)), data.draw(densities_for(deltas))
    masks = RandomMasks("w", SEEDS, kind)
    found = dare_linear(deltas, weights, density=density, rescale=rescale, masks=masks)
    parts = dropped(deltas, density, kind, rescale) * np.array(weights)[:, None]
    room = 1e-6 * float(np.abs(parts).sum(axis=0).max(initial=0))
    flat = found.dense().view(-1).numpy()
    assert np.allclose(flat, parts.sum(axis=0), rtol=1e-6, atol=room)


@settings(max_examples=80, deadline=None)
@given(deltas=aligned_deltas(**EXACT), density=WHOLE, kind=MASKS, data=st.data())
@pytest.mark.parametrize("method", MAJORITY_SIGN_METHODS)
def test_an_election_is_that_of_peft_over_the_same_masks(method, deltas, density, kind, data):
    weights = data.draw(weights_for(deltas))
    masks = RandomMasks("w", SEEDS, kind)
    found = dare_ties(deltas, weights, density=density, majority_sign_method=method, masks=masks)
    pruned = torch.from_numpy(dropped(deltas, density, kind))
    elected = merge_utils.calculate_majority_sign_mask(pruned, method)
    expected = merge_utils.disjoint_merge(pruned * torch.tensor(weights)[:, None], elected)
    assert close(found, expected)


@settings(max_examples=50, deadline=None)
@given(deltas=aligned_deltas(**EXACT), kind=MASKS, data=st.data())
@pytest.mark.parametrize("vote", VOTES)
@pytest.mark.parametrize("divisor", DIVISORS)
def test_every_convention_is_that_of_a_plain_loop(divisor, vote, deltas, kind, data):
    weights = data.draw(weights_for(deltas))
    density = data.draw(st.one_of(WHOLE, st.lists(WHOLE, min_size=5, max_size=5)))
    if isinstance(density, list):
        density = density[: len(deltas)]
    found = dare_ties(
        deltas,
        weights,
        density=density,
        vote=vote,
        divisor=divisor,
        lambda_=0.5,
        masks=RandomMasks("w", SEEDS, kind),
    )
    pruned = dropped(deltas, density, kind)
    assert close(found, 0.5 * merge_loop(pruned, weights, vote=vote, divisor=divisor))


@settings(max_examples=50, deadline=None)
@given(deltas=aligned_deltas(values=("distinct",), bits=(32,)), kind=MASKS)
def test_mergekits_numbers_are_an_l1_rescale_a_weighted_vote_and_a_sum(deltas, kind):
    weights = [1.0, 0.73105, -0.46211, 0.26894, -0.1192][: len(deltas)]  # no sum is nearly zero
    found = dare_ties(
        deltas,
        weights,
        density=0.3,
        rescale="l1",
        vote="weighted",
        divisor="none",
        masks=RandomMasks("w", SEEDS, kind),
    )
    pruned = dropped(deltas, 0.3, kind, "l1")
    assert close(found, merge_loop(pruned, weights, vote="weighted", divisor="none"))


@pytest.mark.parametrize("kind", ["float32", "blocked", "bernoulli"])
def test_over_many_seeds_the_mean_of_a_sum_is_the_sum(kind):
    deltas = [delta_of(kind, distinct((6, 43), n), 1) for n in range(3)]
    weights, seeds = [1.0, -0.5, 0.25], 1000
    total = torch.zeros(6 * 43, dtype=torch.float64)
    for seed in range(seeds):
        masks = RandomMasks("w", [3 * seed, 3 * seed + 1, 3 * seed + 2])
        merged = dare_linear(deltas, weights, density=[0.25, 0.5, 0.3], masks=masks)
        total += merged.dense().view(-1)
    weighted = stack(deltas) * np.array(weights)[:, None]
    noise = np.array([(1 - d) / d for d in (0.25, 0.5, 0.3)]) @ weighted**2
    deviations = total.numpy() / seeds - weighted.sum(axis=0)
    spread = np.sqrt(noise / seeds)
    assert (np.abs(deviations) <= 5 * spread).all()
    changed = spread > 0
    assert 0.5 < np.mean((deviations[changed] / spread[changed]) ** 2) < 1.5


@settings(max_examples=60, deadline=None)
@given(deltas=aligned_deltas(), kind=MASKS, data=st.data())
@pytest.mark.parametrize("method", [dare_linear, dare_ties])
@pytest.mark.parametrize("rescale", ["density", "l1"])
def test_no_bit_depends_on_how_rows_are_read(rescale, method, deltas, kind, data):
    weights, density = data.draw(weights_for(deltas)), data.draw(densities_for(deltas))
    masks = RandomMasks("w", SEEDS, kind)
    merged = method(deltas, weights, density=density, rescale=rescale, masks=masks)
    starts = data.draw(range_starts(merged.rows))
    assert torch.equal(in_pieces(merged, starts), merged.dense().view(-1))


@pytest.mark.parametrize("method", [dare_linear, dare_ties])
@pytest.mark.parametrize("kind", ["float32", "blocked", "stored"])
def test_one_delta_undropped_with_weight_one_is_that_very_delta(kind, method):
    delta, masks = delta_of(kind, normal((5, 16), 1), 1), RandomMasks("w", SEEDS)
    for rescale in ("density", "l1", "none"):
        assert method([delta], [1.0], density=1.0, rescale=rescale, masks=masks) is delta
        assert not method([delta], [1.0], density=0, rescale=rescale, masks=masks).dense().any()


def test_one_seed_for_all_gives_one_support_and_no_more_entries():
    masks = RandomMasks("w", [3, 3, 3])
    deltas = [DenseDelta(normal((40, 50), n)) for n in range(3)]
    for method in (dare_linear, dare_ties):
        merged = method(deltas, [1, 1, 1], density=0.1, masks=masks)
        assert merged.support_key == masks.support(0, deltas[0], 0.1).key
        assert int((merged.dense() != 0).sum()) <= 40 * 5
        apart = method(deltas, [1, 1, 1], density=0.1, masks=RandomMasks("w", [1, 2, 3]))
        assert apart.support_key is None
        assert math.isclose(int((apart.dense() != 0).sum()), 2000 * (1 - 0.9**3), rel_tol=0.1)


def test_normalizing_divides_by_the_sum_of_weights():
    deltas, masks = [DenseDelta(distinct((5, 16), n)) for n in range(2)], RandomMasks("w", SEEDS)
    plain = dare_linear(deltas, [1, 3], density=0.5, masks=masks)
    found = dare_linear(deltas, [1, 3], density=0.5, normalize=True, lambda_=2, masks=masks)
    assert close(found, plain.dense() / 2)


@pytest.mark.parametrize("method", [dare_linear, dare_ties])
@pytest.mark.parametrize("density", [None, -0.1, 1.5, [0.5, 0.5]])
def test_a_density_that_cannot_be_is_refused(density, method):
    with pytest.raises(CombinationError, match="density"):
        method(
            [DenseDelta(distinct((2, 3), 1))], [1.0], density=density, masks=RandomMasks("w", [1])
        )


@pytest.mark.parametrize("method", [dare_linear, dare_ties])
def test_an_unknown_rescale_is_answered_with_the_valid_ones(method):
    delta, masks = DenseDelta(distinct((2, 3), 1)), RandomMasks("w", [1])
    with pytest.raises(CombinationError, match="rescale is 'l2'; there are density, l1, none"):
        method([delta], [1.0], density=0.5, rescale="l2", masks=masks)
