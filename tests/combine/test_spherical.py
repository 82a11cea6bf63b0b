"""slerp, nuslerp, multislerp and karcher, against their formulas written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dare_adapters.combine import get_method, vectors
from dare_adapters.combine.spherical import karcher, multislerp, nuslerp, slerp
from dare_adapters.errors import CombinationError
from tests.combine.whole import SHARES, Models, assert_near, dot, flat, models, norm, plus, times

PLACES = st.sampled_from([0.0, 0.1, 0.5, 0.73, 1.0, -0.2, 1.3])


def unit(*values: float) -> torch.Tensor:
    vector = torch.tensor(values)
    return vector / vector.norm()


def arc(a: list[float], b: list[float], t: float) -> list[float]:
    """Between two vectors that are neither zero nor on one line."""
    angle = math.acos(max(-1.0, min(1.0, dot(a, b) / norm(a) / norm(b))))
    first, second = math.sin((1 - t) * angle), math.sin(t * angle)
    return plus(times(first / math.sin(angle), a), times(second / math.sin(angle), b))


def straight(a: list[float], b: list[float], t: float) -> list[float]:
    return plus(times(1 - t, a), times(t, b))


class TestSlerp:
    @settings(max_examples=60, deadline=None)
    @given(drawn=models(2, 2), t=PLACES)
    def test_is_the_formula(self, drawn: Models, t: float) -> None:
        a, b = map(flat, drawn.tuned)
        assume(norm(a) > 1e-3 and norm(b) > 1e-3)
        linear = abs(dot(a, b)) > 0.9995 * norm(a) * norm(b)
        expected = (straight if linear else arc)(a, b, t)
        assert_near(slerp(drawn.tuned, [1, 1], t=t), expected)

    @settings(max_examples=60, deadline=None)
    @given(drawn=models(2, 2))
    def test_starts_at_the_first_and_ends_at_the_second(self, drawn: Models) -> None:
        assert torch.equal(slerp(drawn.tuned, [1, 1], t=0), drawn.tuned[0])
        assert torch.equal(slerp(drawn.tuned, [1, 1], t=1), drawn.tuned[1])

    @settings(max_examples=60, deadline=None)
    @given(seed=st.integers(0, 1000), t=st.floats(0, 1))
    def test_keeps_the_length_of_unit_vectors(self, seed: int, t: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        both = [unit(*torch.randn(50, generator=generator)) for _ in range(2)]
        assert slerp(both, [1, 1], t=t).norm() == pytest.approx(1, abs=1e-6)

    @settings(max_examples=60, deadline=None)
    @given(drawn=models(2, 2), first=SHARES, second=SHARES)
    def test_weights_say_t(self, drawn: Models, first: float, second: float) -> None:
        expected = slerp(drawn.tuned, [1, 1], t=second / (first + second))
        assert torch.equal(slerp(drawn.tuned, [first, second]), expected)

    def test_turns_by_equal_angles(self) -> None:
        quarter = slerp([torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])], [1, 1], t=1 / 3)
        torch.testing.assert_close(quarter, torch.tensor([math.sqrt(3) / 2, 0.5]))

    def test_of_equal_parameters_is_that_parameter(self) -> None:
        one = torch.randn(4, 5)
        torch.testing.assert_close(slerp([one, one.clone()], [1, 1], t=0.3), one)

    def test_of_opposite_parameters_is_linear(self) -> None:
        one = torch.tensor([3.0, 4.0])
        torch.testing.assert_close(slerp([one, -one], [1, 1], t=0.25), one / 2)

    def test_with_a_zero_parameter_is_finite(self) -> None:
        one = torch.tensor([3.0, 4.0])
        expected = one * math.sqrt(0.5)
        torch.testing.assert_close(slerp([torch.zeros(2), one], [1, 1], t=0.5), expected)
        assert not slerp([torch.zeros(2), torch.zeros(2)], [1, 1], t=0.5).any()

    def test_refuses_weights_beside_t(self) -> None:
        with pytest.raises(CombinationError, match=r"no weights.* and say with t"):
            slerp([torch.ones(2), torch.ones(2)], [1, 0.5], t=0.5)

    def test_refuses_weights_that_cancel(self) -> None:
        with pytest.raises(CombinationError, match="sum to zero; give slerp a t"):
            slerp([torch.ones(2), torch.ones(2)], [1, -1])

    @pytest.mark.parametrize("t", [True, "0.5", math.nan, math.inf])
    def test_refuses_what_is_no_number(self, t: object) -> None:
        with pytest.raises(CombinationError, match=r"t is .*; it must be a number"):
            slerp([torch.ones(2), torch.ones(2)], [1, 1], t=t)  # type: ignore[arg-type]

    def test_takes_two(self) -> None:
        with pytest.raises(CombinationError, match="slerp combines 2 adapters, 3 are given"):
            get_method("slerp").check({}, 3)


class TestNuslerp:
    @settings(max_examples=60, deadline=None)
    @given(drawn=models(2, 2), first=SHARES, second=SHARES, on_deltas=st.booleans())
    def test_is_the_formula(
        self, drawn: Models, first: float, second: float, on_deltas: bool
    ) -> None:
        a, b = drawn.deltas if on_deltas else map(flat, drawn.tuned)
        assume(norm(a) > 1e-3 and norm(b) > 1e-3)
        t, cosine = second / (first + second), dot(a, b) / norm(a) / norm(b)
        expected = (straight if 1 - cosine**2 < 1e-12 else arc)(a, b, t)
        if on_deltas:
            expected = plus(expected, flat(drawn.base))
        found = nuslerp(drawn.tuned, [first, second], on_deltas=on_deltas, base=drawn.base)
        assert_near(found, expected)

    @settings(max_examples=60, deadline=None)
    @given(drawn=models(2, 2, [(5, 8), (1, 9), (3, 4, 5)]), row_wise=st.booleans())
    def test_turns_rows_or_columns(self, drawn: Models, row_wise: bool) -> None:
        found = nuslerp(
            drawn.tuned, [1, 3], flatten=False, row_wise=row_wise, on_deltas=False, base=drawn.base
        )
        dim = 0 if row_wise else -1
        parts = [tensor.transpose(dim, -1).reshape(-1, tensor.shape[dim]) for tensor in drawn.tuned]
        found = found.transpose(dim, -1).reshape(-1, found.shape[dim])
        for own, a, b in zip(found, *parts, strict=True):
            c = dot(flat(a), flat(b)) / norm(flat(a)) / norm(flat(b))
            assert_near(own, (straight if 1 - c * c < 1e-12 else arc)(flat(a), flat(b), 0.75))

    @settings(max_examples=60, deadline=None)
    @given(drawn=models(2, 2))
    def test_ends_at_what_has_all_the_weight(self, drawn: Models) -> None:
        for weights, end in (([2, 0], 0), ([0, 2], 1)):
            found = nuslerp(drawn.tuned, weights, base=drawn.base)
            torch.testing.assert_close(found, drawn.tuned[end], rtol=0, atol=1e-6)

    def test_of_weights_that_cancel_is_half_way(self) -> None:
        a, b, base = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.zeros(2)
        expected = nuslerp([a, b], [1, 1], base=base)
        assert torch.equal(nuslerp([a, b], [1, -1], base=base), expected)

    def test_where_nothing_changed_is_the_base(self) -> None:
        base = torch.randn(3, 4)
        assert torch.equal(nuslerp([base.clone(), base.clone()], [1, 1], base=base), base)

    def test_refuses_a_flag_that_is_none(self) -> None:
        with pytest.raises(CombinationError, match="row_wise is 1; it must be True or False"):
            nuslerp([torch.ones(2)] * 2, [1, 1], row_wise=1, base=torch.ones(2))  # type: ignore[arg-type]


class TestMultislerp:
    @settings(max_examples=60, deadline=None)
    @given(drawn=models(2, 4), data=st.data(), on_deltas=st.booleans(), normalize=st.booleans())
    def test_is_the_formula_with_its_tangent_step(
        self, drawn: Models, data: st.DataObject, on_deltas: bool, normalize: bool
    ) -> None:
        count = len(drawn.tuned)
        weights = data.draw(st.lists(SHARES, min_size=count, max_size=count))
        given_ = drawn.deltas if on_deltas else [flat(one) for one in drawn.tuned]
        w = [weight / math.fsum(weights) for weight in weights] if normalize else weights
        units = [times(1 / (norm(x) + 1e-8), x) for x in given_]
        mean = plus(*(times(a, u) for a, u in zip(w, units, strict=True)))
        assume(norm(mean) > 0.01 * sum(w))
        mean = times(1 / norm(mean), mean)
        tangent = plus(
            *(times(a, plus(u, times(-dot(u, mean), mean))) for a, u in zip(w, units, strict=True))
        )
        step = norm(tangent) + 1e-8
        turned = plus(times(math.cos(step), mean), times(math.sin(step) / step, tangent))
        expected = times(math.fsum(a * norm(x) for a, x in zip(w, given_, strict=True)), turned)
        if on_deltas:
            expected = plus(expected, flat(drawn.base))
        found = multislerp(
            drawn.tuned,
            weights,
            normalize_weights=normalize,
            on_deltas=on_deltas,
            base=drawn.base,
        )
        assert_near(found, expected)

    @settings(max_examples=60, deadline=None)
    @given(drawn=models(1, 1))
    def test_of_one_adapter_is_that_adapter_bit_for_bit(self, drawn: Models) -> None:
        assert torch.equal(multislerp(drawn.tuned, [1], base=drawn.base), drawn.tuned[0])

    def test_of_two_that_cancel_is_their_sum(self) -> None:
        base, delta = torch.ones(2), torch.tensor([1.0, 2.0])
        found = multislerp([base + delta, base - 3 * delta], [1, 1], base=base)
        torch.testing.assert_close(found, base - delta)

    def test_refuses_three_that_cancel(self) -> None:
        third = torch.tensor([-0.5, math.sqrt(3) / 2])
        three = [torch.tensor([1.0, 0.0]), third, third * torch.tensor([1.0, -1.0])]
        with pytest.raises(CombinationError, match=r"directions of 3 adapters.* cancel out"):
            multislerp(three, [1, 1, 1], base=torch.zeros(2))

    def test_where_nothing_changed_is_the_base(self) -> None:
        base = torch.randn(3, 4)
        assert torch.equal(multislerp([base.clone()] * 3, [1, 1, 1], base=base), base)

    def test_refuses_weights_that_sum_to_zero(self) -> None:
        with pytest.raises(CombinationError, match=r"sum to zero.*normalize_weights=False"):
            multislerp([torch.ones(2)] * 2, [1, -1], base=torch.zeros(2))

    def test_refuses_a_negative_eps(self) -> None:
        with pytest.raises(CombinationError, match=r"eps is -1; it must be a number of at least 0"):
            multislerp([torch.ones(2)], [1], eps=-1, base=torch.zeros(2))


def angle(a: list[float], b: list[float]) -> float:
    return math.acos(max(-1.0, min(1.0, dot(a, b) / norm(a) / norm(b))))


class TestKarcher:
    @settings(max_examples=60, deadline=None)
    @given(drawn=models(2, 4), data=st.data(), max_iter=st.integers(0, 12))
    def test_is_the_iteration(self, drawn: Models, data: st.DataObject, max_iter: int) -> None:
        count = len(drawn.tuned)
        weights = data.draw(st.lists(SHARES, min_size=count, max_size=count))
        given_ = [flat(one) for one in drawn.tuned]
        assume(all(norm(x) > 1e-3 for x in given_))
        alphas = [weight / math.fsum(weights) for weight in weights]
        units = [times(1 / norm(x), x) for x in given_]
        mean = plus(*(times(a, u) for a, u in zip(alphas, units, strict=True)))
        assume(norm(mean) > 0.2)
        mean = times(1 / norm(mean), mean)
        for _ in range(max_iter):
            tangent = times(0, mean)
            for alpha, u in zip(alphas, units, strict=True):
                turn = angle(u, mean)
                assume(turn < 3.1)
                if turn >= 1e-5:
                    away = plus(u, times(-dot(u, mean), mean))
                    tangent = plus(tangent, times(alpha * turn / math.sin(turn), away))
            length = norm(tangent)
            if length < 1e-5:
                break
            mean = plus(times(math.cos(length), mean), times(math.sin(length) / length, tangent))
            mean = times(1 / norm(mean), mean)
        scale = math.fsum(a * norm(x) for a, x in zip(alphas, given_, strict=True))
        found = karcher(drawn.tuned, weights, max_iter=max_iter)
        assert_near(found, times(scale, mean), 3e-5)

    @settings(max_examples=60, deadline=None)
    @given(seed=st.integers(0, 1000), nudge=st.integers(0, 1000))
    def test_no_direction_is_nearer_to_all(self, seed: int, nudge: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        three = [torch.randn(6, generator=generator) + 1 for _ in range(3)]
        found = karcher(three, [1, 1, 1], max_iter=50, tol=1e-9)
        other = found + 0.05 * torch.randn(6, generator=torch.Generator().manual_seed(nudge))

        def spread(point: torch.Tensor) -> float:
            return math.fsum(angle(flat(point), flat(one)) ** 2 for one in three)

        assert spread(found) <= spread(other) + 1e-6

    @settings(max_examples=60, deadline=None)
    @given(drawn=models(1, 1), count=st.integers(1, 4))
    def test_of_equal_parameters_is_that_parameter(self, drawn: Models, count: int) -> None:
        assert_near(karcher(drawn.tuned * count, [1.0] * count), flat(drawn.tuned[0]), 1e-6)

    @settings(max_examples=60, deadline=None)
    @given(drawn=models(1, 1))
    def test_of_one_adapter_is_that_adapter_bit_for_bit(self, drawn: Models) -> None:
        assert torch.equal(karcher(drawn.tuned, [1]), drawn.tuned[0])

    @settings(max_examples=60, deadline=None)
    @given(drawn=models(2, 2, [(7,), (5, 8)]), t=st.floats(0.1, 0.9))
    def test_of_two_unit_vectors_is_slerp(self, drawn: Models, t: float) -> None:
        both = [unit(*flat(one)) for one in drawn.tuned]
        assume(abs(float(both[0] @ both[1])) < 0.99)
        found = karcher(both, [1 - t, t], max_iter=100, tol=1e-9)
        torch.testing.assert_close(found, slerp(both, [1, 1], t=t), atol=1e-5, rtol=0)

    def test_on_a_circle_the_first_step_arrives(self) -> None:
        both = [torch.tensor([1.0, 0.0]), torch.tensor([math.cos(2.2), math.sin(2.2)])]
        found = karcher(both, [8, 2], max_iter=1)
        torch.testing.assert_close(found, torch.tensor([math.cos(0.44), math.sin(0.44)]))

    def test_zero_parameters_count_as_lengths_only(self) -> None:
        found = karcher([torch.zeros(4), torch.ones(4)], [1, 1])
        torch.testing.assert_close(found, torch.full((4,), 0.5))
        assert not karcher([torch.zeros(4)] * 2, [1, 1]).any()

    def test_of_opposite_parameters_is_finite(self) -> None:
        one = torch.tensor([3.0, 4.0])
        assert karcher([one, -one], [1, 1]).isfinite().all()

    def test_refuses_weights_that_are_no_shares(self) -> None:
        for weights in ([1, -1], [0, 0]):
            with pytest.raises(CombinationError, match="karcher takes weights of at least 0"):
                karcher([torch.ones(2)] * 2, weights)

    def test_refuses_options_out_of_range(self) -> None:
        with pytest.raises(CombinationError, match=r"max_iter is 1.5; it must be a whole number"):
            karcher([torch.ones(2)], [1], max_iter=1.5)  # type: ignore[arg-type]
        with pytest.raises(CombinationError, match=r"tol is -1; it must be a number of at least 0"):
            karcher([torch.ones(2)], [1], tol=-1)


@settings(max_examples=60, deadline=None)
@given(drawn=models(2, 3))
def test_no_method_changes_what_it_is_given(drawn: Models) -> None:
    before = [one.clone() for one in (drawn.base, *drawn.tuned)]
    ones = [1.0] * len(drawn.tuned)
    multislerp(drawn.tuned, ones, base=drawn.base, eps=1e-6)
    karcher(drawn.tuned, ones)
    slerp(drawn.tuned[:2], [1, 1], t=0.5)
    nuslerp(drawn.tuned[:2], [1, 1], base=drawn.base)
    for kept, one in zip(before, (drawn.base, *drawn.tuned), strict=True):
        assert torch.equal(kept, one)


@pytest.mark.parametrize("entries", [1, 3, 7, 16])
def test_tiles_do_not_change_the_result(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    base, *tuned = torch.randn(4, 9, 10, generator=torch.Generator().manual_seed(1))
    rows = {"flatten": False, "row_wise": True, "base": base}
    whole = [nuslerp(tuned[:2], [1, 2], **rows), multislerp(tuned, [1, 2, 3], base=base)]
    monkeypatch.setattr(vectors, "STEP_ENTRIES", entries)
    again = [nuslerp(tuned[:2], [1, 2], **rows), multislerp(tuned, [1, 2, 3], base=base)]
    torch.testing.assert_close(again, whole)
