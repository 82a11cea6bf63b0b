"""SCE against loops over the entries, with variances as exact fractions."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dare_adapters.combine import Combination
from dare_adapters.combine import sce as module
from dare_adapters.combine.sce import sce
from dare_adapters.delta import Delta, DenseDelta, NoChange
from dare_adapters.errors import CombinationError
from tests.combine.sources import (
    MemorySource,
    aligned_deltas,
    close,
    delta_of,
    distinct,
    in_pieces,
    levels,
    normal,
    range_starts,
    stack,
    weights_for,
)

TOPKS = st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.9, 1.0])


def selected(values: np.ndarray, select_topk: float) -> np.ndarray:
    """Which entries are among those of largest variance, bool (n,); of equal ones the first."""
    if select_topk == 1:
        return np.ones(values.shape[1], dtype=bool)
    variances = []
    for entry in values.T:
        numbers = [Fraction(v) for v in entry.tolist()]
        mean = sum(numbers) / len(numbers)
        variances.append(sum((v - mean) ** 2 for v in numbers) / len(numbers))
    keep = int(sum(v != 0 for v in variances) * select_topk)
    ranked = sorted(range(len(variances)), key=lambda place: (-variances[place], place))
    found = np.zeros(len(variances), dtype=bool)
    found[ranked[:keep]] = True
    return found


def sce_loop(
    values: np.ndarray,
    weights: list[float],
    select_topk: float,
    everything: bool = False,
    floor: float = 0.0,
) -> np.ndarray:
    """Select, calculate, erase: values (k, n) -> (n,)."""
    chosen = selected(values, select_topk)
    energies = [(row[chosen] ** 2).sum() / len(row) for row in values]
    total = sum(energies)
    even = total == 0 or total < floor
    eta = [1 / len(values) if even else energy / total for energy in energies]
    merged = np.zeros(values.shape[1])
    for place, entry in enumerate(values.T):
        if not (chosen[place] or everything):
            continue
        elected = 1 if entry.sum() >= 0 else -1
        agree = [number for number, v in enumerate(entry) if np.sign(v) == elected]
        above = sum(weights[number] * eta[number] * entry[number] for number in agree)
        below = max(sum(eta[number] for number in agree), floor)
        merged[place] = above / below if below else 0.0
    return merged


@settings(max_examples=200, deadline=None)
@given(
    data=st.data(),
    deltas=aligned_deltas(values=("levels", "distinct"), bits=(32,)),
    select_topk=TOPKS,
    merged=st.sampled_from(["selected", "all"]),
)
def test_what_varies_most_is_merged_by_energy_where_signs_agree(data, deltas, select_topk, merged):
    weights = data.draw(weights_for(deltas), "weights")
    found = sce(deltas, weights, select_topk=select_topk, merged=merged)
    expected = sce_loop(stack(deltas), weights, select_topk, merged == "all")
    pieces = in_pieces(found, data.draw(range_starts(found.rows), "ranges")).numpy()
    # Weights of both signs may cancel: what is exact is compared with what was added.
    scale = max(map(abs, weights)) * np.abs(stack(deltas)).max(axis=0, initial=0)
    assert (np.abs(pieces - expected) <= 1e-6 * scale).all()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), deltas=aligned_deltas(least=2), select_topk=TOPKS)
def test_what_is_merged_does_not_depend_on_how_rows_are_read(data, deltas, select_topk):
    found = sce(deltas, [1.0] * len(deltas), select_topk=select_topk)
    starts = data.draw(range_starts(found.rows))
    assert torch.equal(in_pieces(found, starts), in_pieces(found, [0, found.rows]))


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "blocked", "stored"])
@pytest.mark.parametrize("select_topk", [0.1, 1.0])
def test_deltas_as_real_ones_are_merged_by_the_formula(kind, select_topk):
    deltas = [delta_of(kind, normal((13, 90), seed) * (seed + 1), seed) for seed in range(3)]
    found = sce(deltas, [1.0, -0.5, 2.0], select_topk=select_topk, lambda_=0.5)
    expected = 0.5 * sce_loop(stack(deltas), [1.0, -0.5, 2.0], select_topk)
    assert close(found, expected)


def test_exactly_the_share_asked_for_is_selected():
    deltas = [DenseDelta(normal((30, 40), seed)) for seed in (1, 2)]
    index, _ = sce(deltas, [1.0, 1.0], select_topk=0.25).read(0, 30)
    assert index is not None
    assert len(index) == 300


def test_entries_in_which_all_agree_do_not_vary():
    same = distinct((4, 8), 1)
    other = same.clone()
    other[2, 3] += 1
    found = sce([DenseDelta(same), DenseDelta(other)], [1.0, 1.0], select_topk=0.999)
    assert found.dense().count_nonzero() == 0  # one entry varies, of which 0.999 is none
    third = same.clone()
    third[2, 3] += 2
    third[0, 0] += 1
    found = sce([DenseDelta(same), DenseDelta(third)], [1.0, 1.0], select_topk=0.5)
    assert found.dense().nonzero().tolist() == [[2, 3]]


def test_variances_too_small_for_single_precision_are_compared_all_the_same():
    tiny = [DenseDelta(distinct((6, 50), seed) * 2.0**-90) for seed in (1, 2)]
    plain = [DenseDelta(distinct((6, 50), seed)) for seed in (1, 2)]
    found = sce(tiny, [1.0, 1.0], select_topk=0.3).dense()
    assert close(found * 2.0**90, sce(plain, [1.0, 1.0], select_topk=0.3).dense())


def test_a_repeated_slot_is_counted_once():
    # 53 columns in blocks of 2: where the last slot of a row is unused, the one before repeats.
    deltas = [delta_of("blocked", distinct((40, 53), seed), 0) for seed in (1, 2)]
    assert deltas[0].support_key == deltas[1].support_key
    index, _ = deltas[0].read(0, 40)
    assert index is not None
    assert len(index.unique()) < len(index)
    found = sce(deltas, [1.0, 1.0], select_topk=0.5)
    assert close(found, sce_loop(stack(deltas), [1.0, 1.0], 0.5))


def test_deltas_of_nothing_are_merged_to_nothing():
    shape = (5, 6)
    assert sce([NoChange(shape), NoChange(shape)], [1.0, 1.0]).dense().count_nonzero() == 0
    zero = DenseDelta(torch.zeros(shape))
    for topk in (0.5, 1.0):
        found = sce([zero, NoChange(shape)], [1.0, 1.0], select_topk=topk)
        assert found.dense().count_nonzero() == 0


def test_one_delta_alone_does_not_vary():
    delta = DenseDelta(normal((5, 6), 1))
    assert sce([delta], [1.0]) is delta
    assert close(sce([delta], [-0.5]), delta.dense() * -0.5)
    assert sce([delta], [1.0], select_topk=0.9).dense().count_nonzero() == 0


@pytest.mark.parametrize("floor", [0.0, 1e-6, 0.05])
def test_below_the_floor_all_count_alike(floor):
    deltas = [DenseDelta(normal((7, 9), seed) * 10**seed) for seed in range(4)]
    for part in (deltas[:2], deltas):
        weights = [1.0] * len(part)
        found = sce(part, weights, select_topk=0.5, floor=floor)
        assert close(found, sce_loop(stack(part), weights, 0.5, floor=floor))


def test_the_plan_is_made_once_whoever_reads_first(monkeypatch):
    calls, largest = [], module.largest
    monkeypatch.setattr(module, "largest", lambda *a: calls.append(a) or largest(*a))
    merged = sce([DenseDelta(normal((64, 32), s)) for s in (1, 2)], [1.0, 1.0], select_topk=0.2)
    assert not calls
    together = threading.Barrier(4)

    def read(_: int) -> torch.Tensor:
        together.wait()
        return merged.dense()

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(read, range(4)))
    assert all(torch.equal(dense, found[0]) for dense in found)
    assert len(calls) == 1


def test_the_order_of_adapters_does_not_matter():
    deltas: list[Delta] = [DenseDelta(normal((20, 60), s)) for s in (1, 2)]
    one, two = (MemorySource({"w": d}, f"number {n}") for n, d in enumerate(deltas))
    options = {"select_topk": 0.3}
    found, turned = (
        Combination(sources, weights, "sce", options, check_base=False)["w"].dense()
        for sources, weights in (([one, two], [0.5, -2.0]), ([two, one], [-2.0, 0.5]))
    )
    assert torch.equal(found, turned)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"select_topk": 1.5}, "select_topk is 1.5"),
        ({"select_topk": True}, "select_topk is True"),
        ({"floor": -1}, "floor is -1"),
        ({"merged": "some"}, "merged is 'some'; there are selected, all"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    deltas = [DenseDelta(levels((3, 5), seed)) for seed in (1, 2)]
    with pytest.raises(CombinationError, match=message):
        sce(deltas, [1.0, 1.0], **options)
