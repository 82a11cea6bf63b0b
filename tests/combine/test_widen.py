"""widen, against its formula written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dare_adapters.combine import widen as module
from dare_adapters.combine.widen import widen
from dare_adapters.errors import CombinationError
from tests.combine.whole import Models, assert_near, columns, dot, flat, models, norm

RATIOS = st.sampled_from([0.0, 0.7, 1.0, 1.4])
VALUES = st.sampled_from([0.0, 0.5, 1.0, 2.0])


def scored(changes: list[list[float]], above: list[list[bool]], value: float) -> list[list[float]]:
    """Softmax over the models, but `value` where a change is above the mean."""
    scores = []
    for own, high in zip(changes, above, strict=True):
        scores.append(
            [
                value
                if high[place]
                else math.exp(own[place]) / math.fsum(math.exp(other[place]) for other in changes)
                for place in range(len(own))
            ]
        )
    return scores


def ranked(changes: list[list[float]], ratio: float, value: float) -> list[list[float]]:
    ranks, above = [], []
    for own in changes:
        order = sorted(range(len(own)), key=own.__getitem__)
        places = [order.index(place) for place in range(len(own))]
        ranks.append([place / len(own) for place in places])
        above.append([2 * place > ratio * (len(own) - 1) for place in places])
    return scored(ranks, above, value)


def widened(
    base: list[list[float]], tuned: list[list[list[float]]], ratio: float, value: float
) -> list[list[float]]:
    """Of columns: base (n, length), each of tuned (n, length)."""
    magnitudes = [[abs(norm(x) - norm(b)) for x, b in zip(one, base, strict=True)] for one in tuned]
    directions = [
        [1 - dot(x, b) / norm(x) / norm(b) for x, b in zip(one, base, strict=True)] for one in tuned
    ]
    by_norm, by_angle = ranked(magnitudes, ratio, value), ranked(directions, ratio, value)
    merged = []
    for place, column in enumerate(base):
        merged.append(
            [
                b
                + math.fsum(
                    0.5 * (s[place] + c[place]) * (one[place][entry] - b)
                    for s, c, one in zip(by_norm, by_angle, tuned, strict=True)
                )
                for entry, b in enumerate(column)
            ]
        )
    return merged


@settings(max_examples=60, deadline=None)
@given(drawn=models(1, 4, [(5, 8), (6, 7), (9, 3)]), ratio=RATIOS, value=VALUES)
def test_is_the_formula(drawn: Models, ratio: float, value: float) -> None:
    expected = widened(columns(drawn.base), [columns(one) for one in drawn.tuned], ratio, value)
    found = widen(
        drawn.tuned,
        [1.0] * len(drawn.tuned),
        above_average_value_ratio=ratio,
        score_calibration_value=value,
        name="model.layers.0.self_attn.q_proj.weight",
        base=drawn.base,
    )
    assert_near(found.T, [value for column in expected for value in column])


@settings(max_examples=60, deadline=None)
@given(drawn=models(2, 3, [(5, 8), (6, 7)]), name=st.sampled_from(["wte.weight", "x.weight"]))
def test_an_embedding_has_a_score_for_each_row(drawn: Models, name: str) -> None:
    ones = [1.0] * len(drawn.tuned)
    turned = [one.T.contiguous() for one in drawn.tuned]
    by_row = ["wte.weight", "x.weight"]
    found = widen(drawn.tuned, ones, by_row=by_row, name=name, base=drawn.base)
    expected = widen(turned, ones, name="lm_head.weight", base=drawn.base.T.contiguous())
    torch.testing.assert_close(found, expected.T)


@settings(max_examples=60, deadline=None)
@given(drawn=models(1, 4, [(), (1,), (7,)]), ratio=RATIOS, value=VALUES)
def test_vectors_have_a_score_for_each_entry(drawn: Models, ratio: float, value: float) -> None:
    changes = [[abs(delta) for delta in one] for one in drawn.deltas]
    above = [
        [change > ratio * math.fsum(own) / len(own) + 1e-12 for change in own] for own in changes
    ]
    scores = scored(changes, above, value)
    expected = [
        b + math.fsum(s[place] * d[place] for s, d in zip(scores, drawn.deltas, strict=True))
        for place, b in enumerate(flat(drawn.base))
    ]
    found = widen(
        drawn.tuned,
        [1.0] * len(drawn.tuned),
        above_average_value_ratio=ratio,
        score_calibration_value=value,
        base=drawn.base,
    )
    assert_near(found, expected)


@settings(max_examples=60, deadline=None)
@given(drawn=models(1, 1))
def test_of_one_adapter_is_that_adapter_bit_for_bit(drawn: Models) -> None:
    assert torch.equal(widen(drawn.tuned, [1], base=drawn.base), drawn.tuned[0])


@settings(max_examples=60, deadline=None)
@given(drawn=models(1, 1), count=st.integers(2, 3))
def test_where_nothing_changed_the_base_stays(drawn: Models, count: int) -> None:
    found = widen([drawn.base.clone()] * count, [1.0] * count, base=drawn.base)
    assert torch.equal(found, drawn.base)


def test_columns_of_zeros_are_finite_and_unmoved() -> None:
    base, one, other = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    for tensor in (base, one, other):
        tensor[:, 2] = 0
    one[:, 4] = 0
    found = widen([one, other], [1, 1], base=base)
    assert bool(found.isfinite().all())
    assert not found[:, 2].any()


def test_what_changed_most_in_both_is_the_sum_of_both_deltas() -> None:
    base = torch.eye(4)
    change = torch.diag(torch.tensor([0.0, 0.0, 0.5, 1.0])) + torch.tensor([0, 0, 0.1, 0.3])
    found = widen([base + change, base + 2 * change], [1, 1], base=base)
    torch.testing.assert_close(found[:, 2:], (base + 3 * change)[:, 2:])
    assert torch.equal(found[:, :2], base[:, :2])


def test_stacks_are_seen_as_matrices() -> None:
    base, one, other = torch.randn(3, 2, 3, 130, generator=torch.Generator().manual_seed(0))
    found = widen([one, other], [1, 1], base=base)
    flattened = [tensor.reshape(6, 130) for tensor in (base, one, other)]
    expected = widen(flattened[1:], [1, 1], base=flattened[0])
    assert torch.equal(found.reshape(6, 130), expected)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
def test_ranges_of_rows_do_not_change_the_result(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, *tuned = torch.randn(3, 9, 10, generator=torch.Generator().manual_seed(1))
    whole = widen(tuned, [1, 1], name=name, base=base)
    monkeypatch.setattr(module, "STEP_ENTRIES", 20)
    torch.testing.assert_close(widen(tuned, [1, 1], name=name, base=base), whole)


def test_refuses_what_it_cannot_use() -> None:
    one, base = [torch.ones(2, 2)], torch.ones(2, 2)
    with pytest.raises(CombinationError, match="widen has no weights"):
        widen(one, [2], base=base)
    with pytest.raises(CombinationError, match=r"above_average_value_ratio is -1; .* at least 0"):
        widen(one, [1], above_average_value_ratio=-1, base=base)
    with pytest.raises(CombinationError, match="score_calibration_value is 'x'; it must be a num"):
        widen(one, [1], score_calibration_value="x", base=base)  # type: ignore[arg-type]
