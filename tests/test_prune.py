"""Which entries are kept, and what they are multiplied with."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dare_adapters.difference import ParameterDifference
from dare_adapters.prune import PruneRule, largest_entries
from tests.checkpoints import integers


def difference_of(delta: torch.Tensor, name: str = "layer.weight") -> ParameterDifference:
    """A parameter whose base is zero."""
    flat = delta.reshape(-1)
    return ParameterDifference(name, tuple(delta.shape), torch.zeros_like(flat), flat, None)


def pruned(delta: torch.Tensor, rule: PruneRule, seed: int = 0, step: int = 3) -> torch.Tensor:
    """The delta after pruning, dense; a few rows at a time."""
    difference = difference_of(delta)
    support = rule.support(difference, seed)
    found = torch.zeros(difference.rows, difference.columns)
    for start in range(0, difference.rows, step):
        stop = min(start + step, difference.rows)
        slots = support.slots(start, stop)
        _, values = rule.survivors(difference, support, start, stop)
        part = found[start:stop].view(-1)
        part[slots.compact(slots.index)] = slots.compact(values)
    return found.view(delta.shape)


def largest_by_sorting(delta: np.ndarray, keep: int) -> list[int]:
    """Positions of the `keep` largest, of equal ones the first."""
    order = sorted(range(delta.size), key=lambda place: (-abs(float(delta.flat[place])), place))
    return sorted(order[:keep])


# --- DARE


@pytest.mark.parametrize(
    ("drop_rate", "mask"), [(0.5, "auto"), (0.9, "auto"), (0.9, "bernoulli"), (0.7, "auto")]
)
def test_dare_is_unbiased(drop_rate, mask):
    delta = integers((11, 47))
    rule = PruneRule("dare", drop_rate, mask)
    seeds = 2000
    mean = sum(pruned(delta, rule, seed, step=11).double() for seed in range(seeds)) / seeds
    # One entry has the variance d²·p/(1-p); of 517 none should be six deviations off.
    deviation = delta.double().abs() * math.sqrt(drop_rate / (1 - drop_rate) / seeds)
    assert bool(((mean - delta).abs() <= 6 * deviation + 1e-9).all())


@pytest.mark.parametrize("drop_rate", [0.0, 0.3, 0.5, 0.75, 0.9, 0.99])
def test_survivors_are_rescaled_by_exactly_one_over_one_minus_p(drop_rate):
    delta = integers((20, 333))
    found = pruned(delta, PruneRule("dare", drop_rate))
    kept = found != 0
    expected = delta * torch.tensor(1 / (1 - drop_rate), dtype=torch.float32)
    assert torch.equal(found[kept], expected[kept])


@pytest.mark.parametrize("drop_rate", [0.5, 0.7, 0.9])
def test_drop_only_keeps_the_same_entries_as_they_are(drop_rate):
    delta = integers((20, 333))
    dare, plain = (pruned(delta, PruneRule(kind, drop_rate), 5) for kind in ("dare", "drop_only"))
    kept = plain != 0
    assert torch.equal(kept, dare != 0)
    assert torch.equal(plain[kept], delta[kept])


def test_a_drop_rate_of_zero_keeps_everything_with_every_method():
    delta = integers((5, 60))
    for method in ("dare", "drop_only", "magnitude"):
        for mask in ("auto", "bernoulli"):
            assert torch.equal(pruned(delta, PruneRule(method, 0.0, mask)), delta)


@pytest.mark.parametrize("drop_rate", [0.5, 0.9])
def test_the_expected_error_is_the_measured_one(drop_rate):
    delta = integers((30, 600))
    energy = float(delta.double().square().sum())
    for method in ("dare", "drop_only"):
        rule = PruneRule(method, drop_rate)
        errors = [
            float((pruned(delta, rule, seed, 30).double() - delta).square().sum()) / energy
            for seed in range(20)
        ]
        assert rule.drop_error == pytest.approx(np.mean(errors), rel=0.03)


def test_blocked_is_taken_wherever_it_can_be():
    assert PruneRule("dare", 0.9).block == 10
    assert PruneRule("dare", 0.93).block is None
    assert PruneRule("dare", 0.9, "bernoulli").block is None
    assert PruneRule("magnitude", 0.9).block is None


# --- magnitude


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(
        st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-40]), st.floats(-4, 4, width=32)),
        min_size=1,
        max_size=60,
    ),
    columns=st.integers(1, 9),
    share=st.floats(0, 1),
)
def test_magnitude_keeps_the_largest_and_of_equal_ones_the_first(values, columns, share):
    rows = -(-len(values) // columns)
    delta = torch.tensor(values + [0.5] * (rows * columns - len(values))).view(rows, columns)
    keep = round(share * delta.numel())
    support = largest_entries(difference_of(delta), keep)
    slots = support.slots(0, rows)
    assert slots.compact(slots.index).tolist() == largest_by_sorting(delta.numpy(), keep)


@pytest.mark.parametrize("drop_rate", [0.5, 0.9, 0.97])
def test_magnitude_over_many_steps_equals_a_stable_sort(drop_rate):
    # 2049 rows of 1024 are read in three steps; nine magnitudes, so ties cross the steps, and two
    # of them share the bin in which the threshold lies.
    delta = (integers((2049, 1024)) * 400).round() / 400
    delta[::3] *= 1 + 2**-12
    difference = difference_of(delta)
    support = PruneRule("magnitude", drop_rate).support(difference, seed=0)
    keep = round((1 - drop_rate) * delta.numel())
    order = np.argsort(-np.abs(delta.numpy().reshape(-1)), kind="stable")[:keep]
    expected = np.zeros(delta.numel(), dtype=bool)
    expected[order] = True
    slots = support.slots(0, 2049)
    assert slots.compact(slots.index).tolist() == np.flatnonzero(expected).tolist()


def test_magnitude_is_not_rescaled():
    delta = integers((20, 50))
    found = pruned(delta, PruneRule("magnitude", 0.8))
    kept = found != 0
    assert int(kept.sum()) == 200
    assert torch.equal(found[kept], delta[kept])
    assert float(found[kept].abs().min()) >= float(delta[~kept].abs().max())


def test_half_precision_is_pruned_by_the_float32_difference():
    base = integers((6, 40)).to(torch.bfloat16)
    finetuned = (base.float() + integers((6, 40), 9, 0.1)).to(torch.bfloat16)
    difference = ParameterDifference("w", (6, 40), base.view(-1), finetuned.view(-1), None)
    slots = largest_entries(difference, 30).slots(0, 6)
    delta = finetuned.double().numpy() - base.double().numpy()
    assert slots.compact(slots.index).tolist() == largest_by_sorting(delta, 30)


# --- what is refused


@pytest.mark.parametrize("drop_rate", [-0.1, 1.0, 1.5, math.nan, math.inf])
def test_a_drop_rate_outside_its_range_is_refused(drop_rate):
    with pytest.raises(ValueError, match=f"drop_rate is {drop_rate}; it must be at least 0"):
        PruneRule("dare", drop_rate)


def test_a_blocked_mask_needs_a_reciprocal():
    with pytest.raises(ValueError, match=r"needs drop_rate = 1 - 1/B .* not 0\.7; use mask='ber"):
        PruneRule("dare", 0.7, "blocked")


def test_unknown_methods_and_masks_are_refused_with_what_there_is():
    with pytest.raises(ValueError, match="method is 'della'; there are dare, drop_only, magnitude"):
        PruneRule("della")
    with pytest.raises(ValueError, match="mask is 'random'; there are auto, blocked, bernoulli"):
        PruneRule(mask="random")
