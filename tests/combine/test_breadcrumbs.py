"""Breadcrumbs against a stable sort, and its merges against loops over the entries."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dare_adapters.combine import breadcrumbs as breadcrumbs_module
from dare_adapters.combine import select, sparsify
from dare_adapters.combine.breadcrumbs import breadcrumbs, breadcrumbs_ties, keep_middle
from dare_adapters.delta import DenseDelta
from dare_adapters.errors import CombinationError
from tests.combine.sources import (
    aligned_deltas,
    close,
    densities_for,
    distinct,
    in_pieces,
    levels,
    listed,
    merge_loop,
    range_starts,
    stack,
    weights_for,
)

GAMMAS = st.sampled_from([0.0, 0.01, 0.1, 0.3, 0.8, 1.0])


def middle(row: np.ndarray, density: float, gamma: float) -> np.ndarray:
    """Entries by rank, smallest first: some dropped, those of the density kept, the rest dropped.

    Where the outliers leave too few, the smallest are kept.
    """
    if density >= 1:
        return row
    wanted, outliers = int(density * len(row)), int(gamma * len(row))
    smallest = max(0, len(row) - wanted - outliers)
    ascending = np.argsort(-np.abs(row), kind="stable")[::-1]
    chosen = ascending[smallest : smallest + wanted]
    kept = np.zeros_like(row)
    kept[chosen] = row[chosen]
    return kept


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    deltas=aligned_deltas(most=1),
    density=st.floats(0, 1),
    gamma=st.one_of(GAMMAS, st.floats(0, 1)),
)
def test_the_middle_of_the_magnitudes_stays_however_rows_are_read(data, deltas, density, gamma):
    (delta,) = deltas
    found = in_pieces(
        keep_middle(delta, density, gamma), data.draw(range_starts(delta.rows), "ranges")
    )
    assert torch.equal(found.double(), torch.from_numpy(middle(stack(deltas)[0], density, gamma)))


@settings(max_examples=80, deadline=None)
@given(
    data=st.data(), deltas=aligned_deltas(), gamma=GAMMAS, lambda_=st.sampled_from([-2, 0, 0.3, 1])
)
def test_breadcrumbs_is_the_weighted_sum_of_what_stays(data, deltas, gamma, lambda_):
    weights = data.draw(weights_for(deltas), "weights")
    density = data.draw(densities_for(deltas), "density")
    shares = listed(density, len(deltas))
    kept = [middle(row, share, gamma) for row, share in zip(stack(deltas), shares, strict=True)]
    expected = lambda_ * sum(w * row for w, row in zip(weights, kept, strict=True))
    found = breadcrumbs(deltas, weights, density=density, gamma=gamma, lambda_=lambda_)
    scale = max((abs(w * lambda_) for w in weights), default=0) * max(np.abs(kept).max(), 1e-30)
    assert np.abs(found.dense().reshape(-1).numpy() - expected).max(initial=0) <= 3e-6 * scale


@settings(max_examples=80, deadline=None)
@given(
    data=st.data(),
    deltas=aligned_deltas(values=("levels",), bits=(32,)),
    gamma=GAMMAS,
    majority=st.sampled_from(["total", "frequency"]),
    vote=st.sampled_from(["weighted", "unweighted"]),
    divisor=st.sampled_from(["count", "weights", "none"]),
)
def test_breadcrumbs_ties_elects_among_what_stays(data, deltas, gamma, majority, vote, divisor):
    weights = data.draw(weights_for(deltas), "weights")
    density = data.draw(densities_for(deltas), "density")
    shares = listed(density, len(deltas))
    kept = [middle(row, share, gamma) for row, share in zip(stack(deltas), shares, strict=True)]
    found = breadcrumbs_ties(
        deltas,
        weights,
        density=density,
        gamma=gamma,
        majority_sign_method=majority,
        vote=vote,
        divisor=divisor,
    )
    assert close(found, merge_loop(np.stack(kept), weights, majority, vote, divisor))


def test_every_delta_has_a_gamma_of_its_own():
    deltas = [DenseDelta(distinct((20, 30), seed)) for seed in (1, 2)]
    found = breadcrumbs(deltas, [1, -1], density=[0.3, 0.5], gamma=[0.0, 0.2])
    first, second = stack(deltas)
    assert close(found, middle(first, 0.3, 0.0) - middle(second, 0.5, 0.2))


def test_rescaling_restores_the_sum_of_magnitudes():
    delta = DenseDelta(distinct((20, 30), 1))
    found = breadcrumbs([delta], [1.0], density=0.2, gamma=0.05, rescale="l1")
    assert found.dense().abs().sum() == pytest.approx(float(delta.dense().abs().sum()))
    unscaled = middle(stack([delta])[0], 0.2, 0.05)
    assert close(found, unscaled * np.abs(stack([delta])).sum() / np.abs(unscaled).sum())


@pytest.mark.parametrize("method", [breadcrumbs, breadcrumbs_ties])
def test_a_density_of_one_keeps_the_outliers_too(method):
    delta = DenseDelta(distinct((3, 5), 1))
    assert method([delta], [1.0], density=1, gamma=0.5) is delta


def test_thresholds_are_found_once_whoever_reads_first(monkeypatch):
    calls, largest = [], select.largest
    for module in (breadcrumbs_module, sparsify):
        monkeypatch.setattr(module, "largest", lambda *a: calls.append(a) or largest(*a))
    kept = keep_middle(DenseDelta(levels((64, 32), 1)), 0.3, 0.1)
    assert not calls
    together = threading.Barrier(4)

    def read(_: int) -> torch.Tensor:
        together.wait()
        return kept.dense()

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(read, range(4)))
    assert all(torch.equal(dense, found[0]) for dense in found)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "density is needed"),
        ({"density": 0.5, "gamma": 1.5}, "gamma is 1.5"),
        ({"density": 0.5, "gamma": [0.1]}, "gamma has 1 values for 2 adapters"),
        ({"density": 0.5, "rescale": "density"}, "rescale is 'density'; there are none, l1"),
    ],
)
@pytest.mark.parametrize("method", [breadcrumbs, breadcrumbs_ties])
def test_options_out_of_range_are_named(method, options, message):
    deltas = [DenseDelta(levels((3, 5), seed)) for seed in (1, 2)]
    with pytest.raises(CombinationError, match=message):
        method(deltas, [1.0, 1.0], **options)
