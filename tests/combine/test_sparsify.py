"""Deltas made sparser: by magnitude against a stable sort, at random against the published rule."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dare_adapters.combine.rescale import rescaled_to_l1
from dare_adapters.combine.select import Threshold
from dare_adapters.combine.sparsify import (
    RandomMasks,
    densities,
    drop_at_random,
    keep_largest,
    per_delta,
)
from dare_adapters.delta import Delta, DenseDelta, NoChange
from dare_adapters.errors import CombinationError
from dare_adapters.mask import BernoulliSupport, BlockedSupport, matrix_shape
from tests.combine.sources import (
    DENSITIES,
    KINDS,
    SHAPES,
    aligned_deltas,
    close,
    delta_of,
    distinct,
    in_pieces,
    keep_top,
    kept_at_random,
    levels,
    normal,
    range_starts,
    stack,
    supports,
)

MASKS = ("auto", "bernoulli")


def flat(delta: Delta) -> np.ndarray:
    return stack([delta])[0]


def l1(values: np.ndarray) -> float:
    return float(np.abs(values).sum())


# --- by magnitude


@settings(max_examples=150, deadline=None)
@given(deltas=aligned_deltas(most=1), density=DENSITIES)
def test_the_largest_stay_as_they_are_and_of_equal_ones_the_first(deltas, density):
    whole = flat(deltas[0])
    kept = flat(keep_largest(deltas[0], density))
    assert np.array_equal(kept, keep_top(whole, int(density * whole.size)))


@settings(max_examples=60, deadline=None)
@given(shape=st.sampled_from(SHAPES), seed=st.integers(0, 99), density=DENSITIES)
@example(shape=(3, 5, 4), seed=0, density=0.7)  # 0.7 * 3 * 20 is below 0.7 * 60
def test_of_many_equal_magnitudes_exactly_as_many_stay_as_asked(shape, seed, density):
    values = levels(shape, seed)
    values[values == 0] = 2.0**-10  # so that what is kept can be counted
    kept, whole = flat(keep_largest(DenseDelta(values), density)), np.abs(values.numpy()).ravel()
    keep = int(density * whole.size)
    assert np.count_nonzero(kept) == keep
    assert np.array_equal(
        np.sort(np.abs(kept[kept != 0])), np.sort(whole)[whole.size - keep :].astype(np.float64)
    )


@settings(max_examples=60, deadline=None)
@given(deltas=aligned_deltas(most=1), density=DENSITIES, data=st.data())
def test_which_are_the_largest_does_not_depend_on_how_rows_are_read(deltas, density, data):
    kept = keep_largest(deltas[0], density)
    starts = data.draw(range_starts(kept.rows))
    assert torch.equal(in_pieces(kept, starts), kept.dense().view(-1))


def test_a_density_of_one_keeps_the_very_delta():
    delta = DenseDelta(normal((3, 5), 0))
    assert keep_largest(delta, 1.0) is delta
    assert drop_at_random(delta, 1.0, RandomMasks("w", [1]), 0) is delta
    assert rescaled_to_l1(delta, delta) is delta


def test_at_least_as_many_stay_as_must():
    delta = DenseDelta(distinct((3, 5), 0))
    assert np.count_nonzero(flat(keep_largest(delta, 0.01))) == 0
    assert np.count_nonzero(flat(keep_largest(delta, 0.01, least=1))) == 1
    assert np.count_nonzero(flat(keep_largest(delta, 0.5, least=1))) == 7


def test_a_cutoff_of_the_model_takes_the_place_of_the_density():
    delta = DenseDelta(distinct((4, 5), 0))
    kept = keep_largest(delta, 0.1, cutoff=Threshold(13 * 2.0**-10))
    assert np.count_nonzero(flat(kept)) == 8


def test_a_threshold_is_sought_when_it_is_needed_and_once():
    class Counting(DenseDelta):
        reads = 0

        def read(self, start: int, stop: int) -> tuple[None, torch.Tensor]:
            self.reads += 1
            return super().read(start, stop)

    delta = Counting(distinct((4, 5), 0))
    kept = keep_largest(delta, 0.5)
    assert delta.reads == 0
    kept.read(0, 4)
    sought = delta.reads
    kept.read(0, 4)
    assert delta.reads == sought + 1


# --- at random


@settings(max_examples=120, deadline=None)
@given(
    deltas=aligned_deltas(most=1),
    density=DENSITIES,
    kind=st.sampled_from(MASKS),
    seed=st.integers(0, 2**64 - 1),
    rescale=st.booleans(),
)
def test_survivors_are_those_of_the_published_rule_times_one_over_the_density(
    deltas, density, kind, seed, rescale
):
    delta = deltas[0]
    masks = RandomMasks("a.weight", [seed], kind)
    dropped = drop_at_random(delta, density, masks, 0, rescale=rescale).dense().view(-1)
    kept = kept_at_random(seed, "a.weight", delta.rows, delta.columns, density, kind)
    factor = 1 / density if rescale and 0 < density < 1 else 1.0
    expected = torch.where(torch.from_numpy(kept), delta.dense().view(-1) * factor, 0.0)
    assert torch.equal(dropped, expected)


@settings(max_examples=80, deadline=None)
@given(
    deltas=aligned_deltas(most=1),
    density=DENSITIES,
    kind=st.sampled_from(MASKS),
    data=st.data(),
)
def test_who_survives_does_not_depend_on_how_rows_are_read(deltas, density, kind, data):
    dropped = drop_at_random(deltas[0], density, RandomMasks("w", [3], kind), 0)
    starts = data.draw(range_starts(dropped.rows))
    assert torch.equal(in_pieces(dropped, starts), dropped.dense().view(-1))


@pytest.mark.parametrize("density", [0.1, 0.3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_masks_depend_on_seed_and_name_and_not_on_other_adapters(shape, density):
    delta = DenseDelta(torch.ones(shape))
    alone = drop_at_random(delta, density, RandomMasks("w", [7]), 0)
    third = drop_at_random(delta, density, RandomMasks("w", [1, 2, 7]), 2)
    assert torch.equal(alone.dense(), third.dense())
    if math.prod(shape) > 100:
        for masks in (RandomMasks("v", [7]), RandomMasks("w", [8])):
            other = drop_at_random(delta, density, masks, 0)
            assert not torch.equal(alone.dense(), other.dense())


def test_a_mask_is_blocked_where_it_can_be_unless_asked_otherwise():
    delta = NoChange((3, 50))
    for density, kind, expected in (
        (0.1, "auto", BlockedSupport),
        (1 / 3, "blocked", BlockedSupport),
        (0.3, "auto", BernoulliSupport),
        (0.1, "bernoulli", BernoulliSupport),
    ):
        assert type(RandomMasks("w", [1], kind).support(0, delta, density)) is expected
    with pytest.raises(CombinationError, match=r"density of 1/B .* not 0.3; use mask='bernoulli'"):
        RandomMasks("w", [1], "blocked").support(0, delta, 0.3)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("density", [5e-324, 1e-20, 1e-12])
def test_a_density_next_to_nothing_keeps_nothing(density, kind):
    delta = DenseDelta(torch.ones(20, 50))
    assert not drop_at_random(delta, density, RandomMasks("w", [1], kind), 0).dense().any()


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(
    ("density", "shape"),
    [(0.5, (6, 40)), (0.25, (6, 43)), (0.1, (7,)), (0.7, (6, 40)), (0.03, (2, 100))],
)
def test_over_many_seeds_the_mean_is_the_delta(density, shape, kind):
    values, seeds = distinct(shape, 1), 2000
    total = torch.zeros(values.numel(), dtype=torch.float64)
    for seed in range(seeds):
        dropped = drop_at_random(DenseDelta(values), density, RandomMasks("w", [seed], kind), 0)
        index, survivors = dropped.read(0, dropped.rows)
        total[index] += survivors.double()  # assigns: repeated positions count once
    spread = values.view(-1).double().abs() * math.sqrt((1 - density) / density / seeds)
    deviations = (total / seeds - values.view(-1)) / spread
    assert float(deviations.abs().max()) < 5
    assert abs(float(deviations.square().mean()) - 1) < 5 * math.sqrt(2 / len(deviations))


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("density", [0.5, 0.3, 0.1, 0.01])
@pytest.mark.parametrize("of", ["float32", "bernoulli", "stored"])
def test_the_share_that_survives_is_the_density(of, density, kind):
    delta = delta_of(of, distinct((200, 503), 1), 1)
    before = int(np.count_nonzero(flat(delta)))
    kept = np.count_nonzero(flat(drop_at_random(delta, density, RandomMasks("w", [5], kind), 0)))
    assert abs(kept - density * before) < 4 * math.sqrt(before * density * (1 - density))


@settings(max_examples=80, deadline=None)
@given(deltas=aligned_deltas(most=1), density=DENSITIES, kind=st.sampled_from(MASKS))
def test_rescaled_to_l1_the_magnitudes_sum_to_what_they_did(deltas, density, kind):
    delta = deltas[0]
    pruned = drop_at_random(delta, density, RandomMasks("w", [4], kind), 0, rescale=False)
    scaled = flat(rescaled_to_l1(pruned, delta))
    assert np.array_equal(scaled != 0, flat(pruned) != 0)
    if scaled.any():
        assert math.isclose(l1(scaled), l1(flat(delta)), rel_tol=1e-6)


@pytest.mark.parametrize("density", [0.5, 0.3])
def test_every_delta_that_stores_all_takes_the_supports_key(density):
    masks = RandomMasks("w", [1, 1, 2])
    dropped = [drop_at_random(DenseDelta(normal((4, 50), n)), density, masks, n) for n in range(3)]
    keys = [delta.support_key for delta in dropped]
    assert keys[0] == keys[1] == masks.support(0, dropped[0], density).key
    assert keys[2] != keys[0]
    assert rescaled_to_l1(dropped[0], DenseDelta(normal((4, 50), 0))).support_key == keys[0]
    assert torch.equal(dropped[0].read(1, 3)[0], dropped[1].read(1, 3)[0])
    sparse = drop_at_random(delta_of("blocked", normal((4, 50), 0), 1), density, masks, 0)
    assert sparse.support_key is None
    assert keep_largest(dropped[0], density).support_key is None


# --- supports


@settings(max_examples=80, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    seed=st.integers(0, 99),
    kind=st.sampled_from(["blocked", "bernoulli", "stored"]),
    data=st.data(),
)
def test_a_support_contains_what_it_has_slots_for(shape, seed, kind, data):
    rows, columns = matrix_shape(shape)
    support = supports(rows, columns, seed)[kind]
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    slots = support.slots(start, stop)
    expected = torch.zeros((stop - start) * columns, dtype=torch.bool)
    expected[slots.compact(slots.index)] = True
    everything = torch.arange(len(expected))
    assert torch.equal(support.contains(everything, start, stop), expected)
    some = torch.tensor(data.draw(st.lists(st.sampled_from(range(len(expected))))), dtype=int)
    assert torch.equal(support.contains(some, start, stop), expected[some])
    square = everything[: len(everything) // 2 * 2].view(2, -1)
    assert torch.equal(support.contains(square, start, stop), expected[square])


# --- options


def test_one_value_stands_for_all():
    assert densities(0.5, 3) == [0.5, 0.5, 0.5]
    assert densities([0, 0.5, 1], 3) == densities((0, 0.5, 1), 3) == [0.0, 0.5, 1.0]
    assert per_delta("a", 2, "option") == ["a", "a"]


@pytest.mark.parametrize("density", [-0.1, 1.1, math.nan, math.inf, True, "0.5", [0.5, 2.0]])
def test_a_density_out_of_range_is_refused(density):
    with pytest.raises(CombinationError, match=r"density is .*; it must be a number in 0 … 1"):
        densities(density, 2)


def test_a_density_is_needed_and_one_for_each():
    with pytest.raises(CombinationError, match="density is needed: the share of entries"):
        densities(None, 2)
    with pytest.raises(CombinationError, match="density has 3 values for 2 adapters"):
        densities([0.1, 0.2, 0.3], 2)


@pytest.mark.parametrize("kind", KINDS)
def test_forgetting_is_passed_on(kind):
    delta = delta_of(kind, normal((5, 16), 1), 1)
    released = []
    delta.release = lambda: released.append(1)  # type: ignore[method-assign]
    keep_largest(delta, 0.5).release()
    dropped = drop_at_random(delta, 0.5, RandomMasks("w", [1]), 0)
    dropped.release()
    rescaled_to_l1(dropped, delta).release()
    assert released == [1, 1, 1]
    assert close(keep_largest(delta, 0.5), keep_top(flat(delta), 40))
