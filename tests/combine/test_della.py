"""DELLA: every mask and rescaling from the published generator, and what they are on average."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dare_adapters.combine import Combination
from dare_adapters.combine import della as module
from dare_adapters.combine.della import della, della_linear, magprune
from dare_adapters.combine.sparsify import RandomMasks, drop_at_random
from dare_adapters.delta import Delta, DenseDelta
from dare_adapters.errors import CombinationError
from dare_adapters.sparse_delta import SparseDelta
from dare_adapters.stored_support import StoredSupport
from tests import reference
from tests.combine.sources import (
    MemorySource,
    aligned_deltas,
    close,
    delta_of,
    distinct,
    in_pieces,
    levels,
    merge_loop,
    normal,
    range_starts,
    stack,
    weights_for,
)

# density, epsilon: narrow and wide, up to certain survival and almost to certain death.
WINDOWS = [(0.1, 0.05), (0.5, 0.0), (0.5, 0.15), (0.75, 0.25), (0.3, 0.299), (0.9, 0.1)]


def probabilities(row: np.ndarray, density: float, epsilon: float) -> np.ndarray:
    """Of survival, by rank among magnitudes; of equal ones the later ranks higher."""
    if len(row) == 1:
        return np.array([density])
    rank = np.empty(len(row))
    rank[np.argsort(np.abs(row), kind="stable")] = np.arange(len(row))
    return density - epsilon + 2 * epsilon * rank / (len(row) - 1)


def magprune_loop(
    delta: Delta, density: float, epsilon: float, seed: int, name: str, rescale: bool = True
) -> np.ndarray:
    """Row by row, entry by entry."""
    rows = delta.dense().double().numpy().reshape(delta.rows, delta.columns)
    pruned = np.zeros_like(rows)
    for number, row in enumerate(rows):
        lanes = reference.row_lanes(seed, name, number, delta.columns, 32)
        for column, p in enumerate(probabilities(row, density, epsilon)):
            if lanes[column] < round(p * 2**32):
                pruned[number, column] = row[column] / (p if rescale else 1)
    return pruned.reshape(-1)


@settings(max_examples=150, deadline=None)
@given(
    deltas=aligned_deltas(most=1),
    window=st.sampled_from(WINDOWS),
    seed=st.integers(0, 2**64 - 1),
    rescale=st.booleans(),
)
def test_entries_survive_by_rank_in_their_row_and_are_divided_by_their_probability(
    deltas, window, seed, rescale
):
    masks = RandomMasks("a.weight", [seed])
    found = magprune(deltas[0], *window, masks, 0, rescale=rescale)
    assert close(found, magprune_loop(deltas[0], *window, seed, "a.weight", rescale))


@settings(max_examples=80, deadline=None)
@given(data=st.data(), deltas=aligned_deltas(most=1), step=st.sampled_from([1, 50, 300, 1 << 17]))
def test_what_survives_does_not_depend_on_how_rows_are_read(data, deltas, step):
    starts = data.draw(range_starts(deltas[0].rows))
    pruned = magprune(deltas[0], 0.5, 0.3, RandomMasks("w", [7]), 0)
    whole = in_pieces(pruned, [0, pruned.rows])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_RANKED_ENTRIES", step)
        assert torch.equal(in_pieces(pruned, starts), whole)


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    deltas=aligned_deltas(values=("levels", "distinct"), bits=(32,)),
    window=st.sampled_from(WINDOWS),
    majority=st.sampled_from(["total", "frequency"]),
    vote=st.sampled_from(["weighted", "unweighted"]),
    divisor=st.sampled_from(["count", "weights", "none"]),
)
def test_della_elects_among_survivors(data, deltas, window, majority, vote, divisor):
    weights = data.draw(weights_for(deltas), "weights")
    masks = RandomMasks("w", [number + 5 for number in range(len(deltas))])
    density, epsilon = window
    # Unscaled: sums of such values are exact, so that no rounding decides an election.
    expected = np.stack(
        [
            magprune_loop(d, *window, seed, "w", False)
            for d, seed in zip(deltas, masks.seeds, strict=True)
        ]
    )
    found = della(
        deltas,
        weights,
        density=density,
        epsilon=epsilon,
        majority_sign_method=majority,
        rescale="none",
        vote=vote,
        divisor=divisor,
        masks=masks,
    )
    assert close(found, merge_loop(expected, weights, majority, vote, divisor))


def test_della_divides_before_it_elects():
    deltas: list[Delta] = [
        DenseDelta(distinct((6, 40), 1)),
        delta_of("stored", normal((6, 40), 2), 2),
    ]
    masks = RandomMasks("w", [5, 6])
    expected = [magprune_loop(d, 0.5, 0.3, s, "w") for d, s in zip(deltas, (5, 6), strict=True)]
    found = della(deltas, [1.0, -0.5], density=0.5, epsilon=0.3, lambda_=2.0, masks=masks)
    assert close(found, 2 * merge_loop(np.stack(expected), [1.0, -0.5]))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), deltas=aligned_deltas(values=("levels",), bits=(32,)))
def test_della_linear_is_the_weighted_sum_with_a_window_for_each(data, deltas):
    weights = data.draw(weights_for(deltas), "weights")
    windows = data.draw(
        st.lists(st.sampled_from(WINDOWS), min_size=len(deltas), max_size=len(deltas)), "windows"
    )
    masks = RandomMasks("w", [number + 5 for number in range(len(deltas))])
    found = della_linear(
        deltas,
        weights,
        density=[density for density, _ in windows],
        epsilon=[epsilon for _, epsilon in windows],
        lambda_=0.5,
        masks=masks,
    )
    pruned = [
        magprune_loop(delta, *window, seed, "w")
        for delta, window, seed in zip(deltas, windows, masks.seeds, strict=True)
    ]
    parts = np.stack([w * row for w, row in zip(weights, pruned, strict=True)])
    error = np.abs(found.dense().reshape(-1).numpy() - 0.5 * parts.sum(axis=0))
    assert error.max(initial=0) <= 1e-6 * np.abs(parts).sum(axis=0).max(initial=1e-30)


@pytest.mark.parametrize("kind", ["float32", "stored"])
def test_without_a_window_it_is_dare_bit_for_bit(kind):
    delta, masks = delta_of(kind, normal((9, 53), 1), 1), RandomMasks("w", [3], "bernoulli")
    found, dare = magprune(delta, 0.3, 0.0, masks, 0), drop_at_random(delta, 0.3, masks, 0)
    assert torch.equal(found.dense() != 0, dare.dense() != 0)
    assert close(found, dare.dense())


def test_a_sparse_delta_is_ranked_like_the_dense_one_that_it_stands_for():
    values = distinct((40, 60), 1)
    masks = RandomMasks("w", [3])
    for kind in ("blocked", "bernoulli", "stored"):
        sparse = delta_of(kind, values, 4)
        dense = DenseDelta(sparse.dense())
        assert torch.equal(
            magprune(sparse, 0.6, 0.4, masks, 0).dense(),
            magprune(dense, 0.6, 0.4, masks, 0).dense(),
        )


def test_no_position_comes_twice_and_none_that_is_not_stored():
    # A row of four entries beside one of none: the second is nowhere.
    support = StoredSupport.from_positions(np.array([0, 1, 2, 3]), 2, 4)
    delta = SparseDelta((2, 4), support, 32, torch.tensor([1.0, -2.0, 3.0, 4.0]))
    for seed in range(50):
        index, _ = magprune(delta, 0.75, 0.25, RandomMasks("w", [seed]), 0).read(0, 2)
        assert len(index.unique()) == len(index)
        assert set(index.tolist()) <= {0, 1, 2, 3}
        assert 3 in index  # the largest survives with certainty


# --- on average


def trials(delta: Delta, density: float, epsilon: float, count: int, rescale: bool) -> np.ndarray:
    """float64 (count, n): the delta pruned with so many seeds."""
    found = [
        magprune(delta, density, epsilon, RandomMasks("w", [seed]), 0, rescale=rescale).dense()
        for seed in range(count)
    ]
    return torch.stack(found).double().reshape(count, -1).numpy()


@pytest.mark.parametrize(("density", "epsilon"), WINDOWS)
@pytest.mark.parametrize("kind", ["float32", "stored"])
def test_the_kept_share_grows_by_rank_from_density_minus_to_plus_epsilon(kind, density, epsilon):
    delta, count = delta_of(kind, distinct((3, 16), 1), 1), 2000
    changed = delta.dense().reshape(-1).numpy() != 0
    kept = (trials(delta, density, epsilon, count, False) != 0).mean(axis=0)
    rows = delta.dense().double().numpy()
    expected = np.concatenate([probabilities(row, density, epsilon) for row in rows])
    deviation = np.sqrt(expected * (1 - expected) / count)
    assert (np.abs(kept - expected) <= 4.5 * deviation + 1e-9)[changed].all()


@pytest.mark.parametrize(("density", "epsilon"), WINDOWS)
def test_on_average_a_rescaled_delta_is_the_delta(density, epsilon):
    values = distinct((3, 16), 1)
    count = 4000
    found = trials(DenseDelta(values), density, epsilon, count, True)
    wanted = values.double().reshape(-1).numpy()
    p = np.concatenate([probabilities(row, density, epsilon) for row in values.numpy()])
    deviation = np.abs(wanted) * np.sqrt((1 - p) / p / count)
    # Of the rarest too few survive for their mean to be near; those that do are compared above.
    often = p * count > 25
    assert (np.abs(found.mean(axis=0) - wanted) <= 5 * deviation + 1e-6 * np.abs(wanted))[
        often
    ].all()


def test_the_density_is_that_asked_for_where_magnitudes_are_equal():
    delta = DenseDelta(torch.full((200, 500), 0.25))
    kept = (magprune(delta, 0.3, 0.25, RandomMasks("w", [1]), 0).dense() != 0).double().mean()
    assert float(kept) == pytest.approx(0.3, abs=5 * (0.21 / 100_000) ** 0.5)


# --- determinism


def test_adapters_and_parameters_have_masks_of_their_own():
    delta = DenseDelta(normal((50, 60), 1))
    kept = [
        magprune(delta, 0.5, 0.1, RandomMasks(name, [seed]), 0).dense() != 0
        for name, seed in (("a", 1), ("a", 2), ("b", 1))
    ]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert 0.4 < float((kept[first] == kept[second]).double().mean()) < 0.6


@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_the_order_of_adapters_does_not_matter(method):
    one = MemorySource({"w": DenseDelta(normal((20, 60), 1))}, "one")
    two = MemorySource({"w": delta_of("blocked", normal((20, 60), 2), 2)}, "two")
    options = {"density": 0.4, "epsilon": 0.2}
    found, turned = (
        Combination(sources, weights, method, options, seed=3, check_base=False)["w"].dense()
        for sources, weights in (([one, two], [0.5, -2.0]), ([two, one], [-2.0, 0.5]))
    )
    assert torch.equal(found, turned)
    assert found.count_nonzero() > 0


def test_threads_that_read_at_once_read_the_same():
    pruned = magprune(DenseDelta(normal((64, 200), 1)), 0.3, 0.2, RandomMasks("w", [1]), 0)
    whole, together = pruned.dense(), threading.Barrier(4)

    def read(part: int) -> torch.Tensor:
        together.wait()
        return in_pieces(pruned, sorted({0, 7 * part, 64}))

    with ThreadPoolExecutor(4) as threads:
        assert all(torch.equal(f.view(64, 200), whole) for f in threads.map(read, range(4)))


# --- options


def test_rescaling_to_l1_restores_the_sum_of_magnitudes_and_favours_nothing():
    delta, masks = DenseDelta(distinct((20, 30), 1)), RandomMasks("w", [1])
    found = della_linear([delta], [1.0], density=0.3, epsilon=0.2, rescale="l1", masks=masks)
    survivors = magprune_loop(delta, 0.3, 0.2, 1, "w", rescale=False)
    assert close(found, survivors * np.abs(stack([delta])).sum() / np.abs(survivors).sum())


@pytest.mark.parametrize("method", [della, della_linear])
def test_a_density_of_one_changes_nothing_and_of_zero_leaves_nothing(method):
    delta, masks = DenseDelta(normal((5, 7), 1)), RandomMasks("w", [1])
    assert method([delta], [1.0], density=1.0, masks=masks) is delta
    assert method([delta], [1.0], density=0, masks=masks).dense().count_nonzero() == 0


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("auto", {}, "density is needed"),
        ("auto", {"density": 0.1}, "density 0.1 ± epsilon 0.15 .* epsilon below 0.1"),
        ("auto", {"density": 0.9, "epsilon": 0.2}, "epsilon below 0.1"),
        ("auto", {"density": 0.5, "epsilon": -0.1}, "epsilon is -0.1"),
        ("auto", {"density": 0.5, "epsilon": [0.1]}, "epsilon has 1 values for 2 adapters"),
        ("auto", {"density": 0.5, "rescale": "density"}, "there are probability, l1, none"),
        ("blocked", {"density": 0.5}, "use mask='bernoulli'"),
    ],
)
@pytest.mark.parametrize("method", [della, della_linear])
def test_options_out_of_range_are_named(method, kind, options, message):
    deltas = [DenseDelta(levels((3, 5), seed)) for seed in (1, 2)]
    with pytest.raises(CombinationError, match=message):
        method(deltas, [1.0, 1.0], **options, masks=RandomMasks("w", [1, 2], kind))
