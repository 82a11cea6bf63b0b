"""Sources combined: what takes part, what comes from whom, and that nothing else matters."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dare_adapters.combine import registry
from dare_adapters.combine.combination import Combination
from dare_adapters.combine.registry import parameter_method
from dare_adapters.delta import Delta, DenseDelta, NewParameter
from dare_adapters.errors import (
    ArchitectureMismatchError,
    BaseMismatchError,
    CombinationError,
)
from tests.combine.sources import (
    MemorySource,
    aligned_deltas,
    close,
    delta_of,
    distinct,
    keep_top,
    kept_at_random,
    levels,
    mask_seed,
    merge_loop,
    normal,
    stack,
    weights_for,
)
from tests.conftest import raw_bytes

NAME = "layers.0.weight"
# Every method that drops, trims or elects, and one that does not.
METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "magnitude_prune": {"density": 0.5},
    "ties": {"density": 0.5},
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.25},
}
SHAPES = {"a": (12, 40), "b": (7, 53), "c": (131,), "d": (3, 5, 4), "e": ()}


def sources_of(deltas: Sequence[Delta], name: str = NAME) -> list[MemorySource]:
    return [MemorySource({name: delta}, f"source {n}") for n, delta in enumerate(deltas)]


def model(number: int, kind: str = "float32") -> MemorySource:
    """Deltas of several parameters of different scales."""
    deltas = {
        name: delta_of(kind, distinct(shape, 10 * number + place) * 4.0**place, place + 1)
        for place, (name, shape) in enumerate(SHAPES.items())
    }
    return MemorySource(deltas, f"model {number}")


def constant(value: float, *shape: int) -> DenseDelta:
    return DenseDelta(torch.full(shape, value))


@pytest.fixture
def on_parameters() -> Iterator[None]:
    """Toy methods on whole parameters, for the length of a test."""
    registry.method_names()
    before = dict(registry._methods)

    @parameter_method("toy_slerp")
    def toy_slerp(
        parameters: Sequence[torch.Tensor],
        weights: Sequence[float],
        *,
        t: float,
        base: torch.Tensor,
    ) -> torch.Tensor:
        return base + t * sum(w * (p - base) for p, w in zip(parameters, weights, strict=True))

    @parameter_method("toy_fisher", statistics="fisher")
    def toy_fisher(
        parameters: Sequence[torch.Tensor],
        weights: Sequence[float],
        *,
        statistics: Sequence[torch.Tensor | None],
    ) -> torch.Tensor:
        fisher = [torch.ones(()) if s is None else s for s in statistics]
        return sum(f * p for f, p in zip(fisher, parameters, strict=True)) / sum(fisher)

    @parameter_method("toy_base")
    def toy_base(
        parameters: Sequence[torch.Tensor],
        weights: Sequence[float],
        *,
        base: torch.Tensor,
        view: bool = False,
    ) -> torch.Tensor:
        return base.view(base.shape) if view else base

    @parameter_method("toy_wrong")
    def toy_wrong(parameters: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
        return parameters[0].sum()

    yield
    registry._methods.clear()
    registry._methods.update(before)


# --- one source, or several in any order


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "blocked", "bernoulli", "stored"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("linear", {}),
        ("average", {}),
        ("magnitude_prune", {"density": 1.0}),
        ("ties", {"density": 1.0}),
        ("ties", {"density": 1.0, "trim_scope": "model"}),
        ("dare_linear", {"density": 1}),
        ("dare_ties", {"density": 1.0, "rescale": "l1"}),
    ],
)
def test_one_source_with_weight_one_reads_bit_for_bit_the_same(method, options, kind):
    delta = delta_of(kind, normal((7, 53), 1), 1)
    source = MemorySource({NAME: delta})
    found = Combination([source], [1.0], method, options)[NAME]
    assert found is delta
    for start in range(7):
        (index, values), (own_index, own_values) = found.read(start, 7), delta.read(start, 7)
        assert raw_bytes(values) == raw_bytes(own_values)
        assert index is own_index is None or torch.equal(index, own_index)


@settings(max_examples=60, deadline=None)
@given(
    deltas=aligned_deltas(least=2, values=("levels", "distinct"), bits=(32, 16, 4)), data=st.data()
)
@pytest.mark.parametrize(("method", "options"), METHODS.items())
def test_the_order_of_sources_does_not_matter(method, options, deltas, data):
    weights, order = data.draw(weights_for(deltas)), data.draw(st.permutations(range(len(deltas))))
    sources = sources_of(deltas)
    found = Combination(sources, weights, method, options)[NAME]
    again = Combination([sources[n] for n in order], [weights[n] for n in order], method, options)
    merged = again[NAME]
    assert close(merged, found.dense())
    for start in range(found.rows):
        one, other = found.read(start, found.rows)[0], merged.read(start, found.rows)[0]
        assert one is other is None or set(one.tolist()) == set(other.tolist())


@settings(max_examples=60, deadline=None)
@given(deltas=aligned_deltas(least=2), seed=st.integers(0, 2**32), data=st.data())
@pytest.mark.parametrize("mask", ["auto", "bernoulli"])
def test_what_is_dropped_of_a_source_does_not_depend_on_who_else_takes_part(
    mask, deltas, seed, data
):
    sources = sources_of(deltas)
    number = data.draw(st.integers(0, len(deltas) - 1))
    among = [float(n == number) for n in range(len(deltas))]
    how = {"combination_type": "dare_linear", "options": {"density": 0.25}, "seed": seed}
    alone = Combination([sources[number]], [1.0], mask=mask, **how)[NAME]
    together = Combination(sources, among, mask=mask, **how)[NAME]
    assert torch.equal(alone.dense(), together.dense())
    kept = kept_at_random(
        mask_seed(seed, f"source {number}"), NAME, alone.rows, alone.columns, 0.25, mask
    )
    assert np.array_equal(stack([alone])[0], np.where(kept, stack([deltas[number]])[0] * 4, 0))


def test_seeds_identities_and_names_give_masks_of_their_own():
    def mask(seed: int = 0, identity: str = "x", name: str = NAME) -> torch.Tensor:
        source = MemorySource({name: constant(1.0, 40, 50)}, identity=identity)
        how = {"options": {"density": 0.5}, "seed": seed}
        return Combination([source], [1.0], "dare_linear", **how)[name].dense() != 0

    first = mask()
    assert torch.equal(first, mask())
    for other in (mask(seed=1), mask(identity="y"), mask(name="layers.1.weight")):
        assert 800 < int((first == other).sum()) < 1200


# --- who has what


@pytest.mark.parametrize(("method", "options"), METHODS.items())
def test_a_parameter_that_a_source_lacks_is_one_it_does_not_change(method, options):
    both, lacking = {"a": distinct((5, 16), 1), "b": distinct((5, 16), 2)}, distinct((5, 16), 3)
    with_zeros = {"a": DenseDelta(lacking), "b": constant(0.0, 5, 16)}
    one = MemorySource({name: DenseDelta(values) for name, values in both.items()}, "one")
    two = MemorySource({"a": DenseDelta(lacking)}, "two")
    expected = MemorySource(with_zeros, "two")
    for weights in ([1.0, 1.0], [0.5, -2.0]):
        found = Combination([one, two], weights, method, options)
        dense = Combination([one, expected], weights, method, options)
        assert list(found) == list(dense) == ["a", "b"]
        for name in found:
            assert torch.equal(found[name].dense(), dense[name].dense())


def test_names_are_those_of_all_sources_in_order():
    one = MemorySource({"b": constant(1.0, 2), "a": constant(1.0, 2)}, "one")
    two = MemorySource({"c": NewParameter(torch.ones(2)), "b": constant(1.0, 2)}, "two")
    found = Combination([one, two], [1, 1])
    assert list(found) == ["a", "b", "c"]
    assert len(found) == 3
    assert [name in found for name in "abcd"] == [True, True, True, False]
    assert [found.is_new(name) for name in "abc"] == [False, False, True]
    with pytest.raises(KeyError):
        found["d"]


def test_a_new_parameter_comes_from_the_first_source_that_has_it():
    heads = [NewParameter(torch.full((2, n), float(n))) for n in (3, 4)]
    plain = MemorySource({NAME: constant(1.0, 2)}, "plain")
    first, second = (MemorySource({"head": head, NAME: constant(2.0, 2)}, "h") for head in heads)
    assert Combination([plain, first, second], [1, 0, 5])["head"] is heads[0]
    assert (
        Combination([second, plain, first], [0, 1, 5], "ties", {"density": 0.5})["head"]
        is (heads[1])
    )


@pytest.mark.parametrize("scope", ["parameter", "model"])
def test_of_a_head_that_one_changes_and_one_replaces_the_first_decides(scope):
    # Fine-tunes of one base: for one its head has the right size, for the other another.
    change, replace = constant(1.0, 2, 3), NewParameter(torch.ones(5, 3))
    one = MemorySource({"head": change, NAME: distinct_delta()}, "one")
    two = MemorySource({"head": replace, NAME: distinct_delta()}, "two")
    options = {"density": 0.5, "trim_scope": scope}
    found = Combination([one, two], [1, 1], "ties", options)
    assert not found.is_new("head")
    assert found["head"].shape == (2, 3)
    found = Combination([two, one], [1, 1], "ties", options)
    assert found.is_new("head")
    assert found["head"] is replace
    assert isinstance(found[NAME], Delta)


def distinct_delta() -> DenseDelta:
    return DenseDelta(distinct((3, 4), 1))


@pytest.mark.parametrize(("method", "options"), METHODS.items())
def test_added_rows_come_from_the_first_and_what_is_beyond_from_others(method, options):
    def grown(rows: int, value: float, dtype: torch.dtype = torch.float32) -> DenseDelta:
        added = torch.full((rows, 3), value, dtype=dtype) if rows else None
        return DenseDelta(torch.ones(4, 3), added)

    deltas = [grown(0, 0.0), grown(2, 1.0), grown(1, 2.0), grown(4, 3.0, torch.bfloat16)]
    merged = Combination(sources_of(deltas), [1, 1, 1, 1], method, options)[NAME]
    assert merged.shape == (4, 3)
    assert merged.added_rows.dtype == torch.float32
    assert merged.added_rows[:, 0].tolist() == [1.0, 1.0, 3.0, 3.0]
    combination = Combination(sources_of(deltas), [1, 1, 1, 1], method, options)
    assert combination.added_row_count(NAME) == 4
    assert Combination(sources_of(deltas[:1]), [2], method, options)[NAME].added_rows is None
    alone = Combination(sources_of(deltas[1:2]), [1], method, options)[NAME]
    assert torch.equal(alone.added_rows, deltas[1].added_rows)
    assert len(deltas[1].added_rows) == 2


# --- several sources in one


@pytest.mark.parametrize("weights", [[0.5, 0.25], [2.0, -1.0]])
def test_a_sum_of_sums_is_a_sum(weights):
    sources = [model(n) for n in range(3)]
    inner = Combination(sources[:2], [1.0, 2.0])
    nested = Combination([inner, sources[2]], weights)
    plain = Combination(sources, [weights[0], 2 * weights[0], weights[1]])
    for name in SHAPES:
        assert close(nested[name], plain[name].dense())


def test_looking_for_a_name_reads_nothing():
    class Unreadable(MemorySource):
        def __getitem__(self, name: str) -> Delta | NewParameter:
            raise AssertionError(f"{name} was read")

        def __contains__(self, name: object) -> bool:
            return name in self._deltas

        def is_new(self, name: str) -> bool:
            return False

    source = Unreadable({"a": constant(1.0, 2)})
    found = Combination([Combination([source], [1.0]), source], [1.0, 1.0])
    assert "a" in found
    assert "b" not in found
    assert not found.is_new("a")


# --- the whole model's largest


def trimmed_over_the_model(sources: Sequence[Mapping[str, Delta]], keep: int) -> np.ndarray:
    """Each source as one vector, all but its `keep` largest entries zero, (k, n)."""
    flat = [np.concatenate([stack([source[name]])[0] for name in SHAPES]) for source in sources]
    return np.stack([keep_top(values, keep) for values in flat])


def flattened(source: Mapping[str, Delta]) -> np.ndarray:
    return np.concatenate([stack([source[name]])[0] for name in SHAPES])


@pytest.mark.parametrize("kinds", [("float32", "float32"), ("blocked", "bernoulli", "stored")])
@pytest.mark.parametrize("density", [0.0, 0.01, 0.2, 0.5, 0.9, 1.0])
def test_over_the_model_ties_is_that_of_mergelm(density, kinds):
    # MergeLM flattens all parameters into one vector, in the order of their names.
    sources = [model(number, kind) for number, kind in enumerate(kinds)]
    total = sum(values.size for values in [flattened(sources[0])])
    trimmed = trimmed_over_the_model(sources, int(density * total))
    expected = 0.7 * merge_loop(trimmed, [1.0] * len(kinds))
    options = {"density": density, "trim_scope": "model", "lambda_": 0.7}
    found = Combination(sources, [1.0] * len(kinds), "ties", options)
    assert close(torch.from_numpy(flattened(found)), expected)


def test_over_the_model_every_source_has_a_density_of_its_own():
    sources = [model(number) for number in range(3)]
    total, shares = flattened(sources[0]).size, (0.1, 1.0, 0.0)
    parts = [
        trimmed_over_the_model([source], int(share * total))[0]
        for source, share in zip(sources, shares, strict=True)
    ]
    options = {"density": list(shares), "trim_scope": "model"}
    found = Combination(sources, [1, 1, 1], "ties", options)
    assert close(torch.from_numpy(flattened(found)), merge_loop(np.stack(parts), [1.0] * 3))


def test_over_the_model_what_no_adapter_stores_counts_as_unchanged():
    source = model(1)
    source.base_parameter_count = 2 * flattened(source).size
    found = Combination([source], [1], "ties", {"density": 0.2, "trim_scope": "model"})
    keep = int(0.2 * source.base_parameter_count)
    assert np.array_equal(flattened(found), keep_top(flattened(source), keep))


def test_over_the_model_of_equal_magnitudes_as_many_stay_as_asked():
    deltas = {name: DenseDelta(levels((40, 50), n, largest=1)) for n, name in enumerate("abc")}
    source = MemorySource(deltas)
    found = Combination([source], [1], "ties", {"density": 0.3, "trim_scope": "model"})
    flat = np.concatenate([stack([source[name]])[0] for name in "abc"])
    merged = np.concatenate([stack([found[name]])[0] for name in "abc"])
    assert np.array_equal(merged, keep_top(flat, 1800))


@pytest.mark.parametrize("prune", ["dare", "drop_only", "magnitude"])
def test_over_the_model_the_largest_are_those_of_what_was_pruned(prune):
    source = model(1)
    how = {"prune": prune, "drop_rate": 0.75, "seed": 3}
    pruned = Combination([source], [1], **how)
    options = {"density": 0.1, "trim_scope": "model"}
    found = Combination([source], [1], "ties", options, **how)
    keep = int(0.1 * flattened(source).size)
    assert np.array_equal(flattened(found), keep_top(flattened(pruned), keep))


@pytest.mark.parametrize("density", [None, 2.0, "0.5", [0.5], [0.5, 0.5, 0.5]])
def test_over_the_model_a_density_that_cannot_be_is_refused(density):
    options = {"density": density, "trim_scope": "model"}
    found = Combination([model(1), model(2)], [1, 1], "ties", options)
    with pytest.raises(CombinationError, match="density"):
        found["a"]


# --- pruned before


@pytest.mark.parametrize(("prune", "factor"), [("dare", 4.0), ("drop_only", 1.0)])
def test_pruning_at_random_comes_before_the_method_with_a_mask_of_its_own(prune, factor):
    source = MemorySource({NAME: constant(1.0, 100, 200)})
    how = {"prune": prune, "drop_rate": 0.75, "seed": 9}
    pruned = Combination([source], [1.0], **how)[NAME].dense()
    assert set(pruned.unique().tolist()) == {0.0, factor}
    assert int((pruned != 0).sum()) == 5000
    # Half of those, and not all or none, survive the method's own.
    both = Combination([source], [1.0], "dare_linear", {"density": 0.25}, **how)[NAME].dense()
    assert bool((pruned[both != 0] != 0).all())
    assert 1000 < int((both != 0).sum()) < 1500


def test_pruning_by_magnitude_comes_before_the_method():
    sources = [model(number) for number in range(2)]
    found = Combination(sources, [1.0, 0.5], prune="magnitude", drop_rate=0.5)
    expected = Combination(sources, [1.0, 0.5], "magnitude_prune", {"density": 0.5})
    assert np.array_equal(flattened(found), flattened(expected))


@pytest.mark.parametrize("size", [1000, 1005, 997])
@pytest.mark.parametrize("drop_rate", [0.9, 0.7, 0.99])
def test_pruning_by_magnitude_keeps_what_is_not_dropped(drop_rate, size):
    # 1 - 0.9 is a little less than 0.1, and a thousand times that a little less than 100.
    source = MemorySource({NAME: DenseDelta(distinct((size,), 1))})
    found = Combination([source], [1.0], prune="magnitude", drop_rate=drop_rate)[NAME]
    assert int((found.dense() != 0).sum()) == int(Fraction(str(drop_rate)) * -size + size)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prune": "dare"}, "prune and drop_rate belong together"),
        ({"drop_rate": 0.5}, "prune and drop_rate belong together"),
        ({"prune": "random", "drop_rate": 0.5}, "'random'; there are dare, drop_only, magnitude"),
        ({"prune": "dare", "drop_rate": 1.0}, "drop_rate is 1.0; it must be at least 0 and below"),
        ({"prune": "dare", "drop_rate": -0.1}, "drop_rate is -0.1; it must be at least 0"),
        ({"prune": "dare", "drop_rate": True}, "drop_rate is True"),
        ({"mask": "random"}, "mask is 'random'; there are auto, blocked, bernoulli"),
        ({"combination_type": "svd"}, "combination_type is 'svd'; there are .*dare_ties.*linear"),
        ({"options": {"lamda": 1.0}}, "linear has no option lamda; .* normalize, lambda_"),
        ({"combination_type": "average", "options": {"density": 1}}, "its options are: none"),
    ],
)
def test_what_cannot_be_is_refused_at_once_naming_what_can(arguments, message):
    with pytest.raises(CombinationError, match=message):
        Combination([model(1)], [1.0], **arguments)


def test_there_is_a_weight_for_every_source_and_a_source_at_all():
    with pytest.raises(CombinationError, match="1 weights for 2 adapters"):
        Combination([model(1), model(2)], [1.0])
    with pytest.raises(CombinationError, match="combines at least 1 adapters, 0 are given"):
        Combination([], [])


# --- sources that do not fit


@pytest.mark.parametrize("first", [{}, {"other": constant(1.0, 1)}])
def test_shapes_that_differ_are_refused_naming_the_two_that_have_them(first):
    sources = [
        MemorySource(first, "adapters/none"),
        MemorySource({NAME: constant(1.0, 3, 4)}, "adapters/one"),
        MemorySource({NAME: constant(1.0, 4, 3)}, "adapters/two"),
    ]
    with pytest.raises(
        ArchitectureMismatchError,
        match=rf"adapters/two changes {NAME} as \[4, 3\], adapters/one as \[3, 4\]",
    ):
        Combination(sources, [1, 1, 1])[NAME]


def witnessed(*witnesses: dict[str, str]) -> list[MemorySource]:
    return [
        MemorySource({NAME: constant(1.0, 2)}, f"adapters/{n}", witness=witness)
        for n, witness in enumerate(witnesses)
    ]


@pytest.mark.parametrize(
    ("witnesses", "labels"),
    [
        ([{"w": "x"}, {"w": "y"}], (0, 1)),
        ([{"w": "x", "v": "x"}, {"w": "x", "v": "y"}], (0, 1)),
        ([{"w": "x"}, {"w": "x"}, {"w": "y"}], (0, 2)),
        ([{"w": "x"}, {"v": "x"}], (0, 1)),
        ([{}, {"w": "x"}, {"w": "y"}], (1, 2)),
        ([{"w": "x"}, {"w": "x", "v": "x"}, {"w": "x", "v": "y"}], (1, 2)),
    ],
)
def test_witnesses_that_differ_are_refused_naming_two_sources(witnesses, labels):
    sources = witnessed(*witnesses)
    one, other = labels
    with pytest.raises(
        BaseMismatchError, match=f"adapters/{one} and adapters/{other} were made over different"
    ):
        Combination(sources, [1.0] * len(sources))
    assert Combination(sources, [1.0] * len(sources), check_base=False)[NAME].shape == (2,)


def test_a_source_without_a_witness_fits_any():
    for witnesses in ([{}, {}], [{}, {"w": "x"}], [{"w": "x"}, {}, {"w": "x", "v": "y"}]):
        sources = witnessed(*witnesses)
        assert Combination(sources, [1.0] * len(sources))[NAME].shape == (2,)


# --- methods on whole parameters


BASES = {"a": distinct((12, 40), 50), "d": distinct((3, 5, 4), 51), "e": distinct((), 52)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["float32", "blocked", "bernoulli"])
@pytest.mark.usefixtures("on_parameters")
def test_a_method_on_parameters_gives_the_change_that_makes_its_result(kind, dtype):
    sources, weights = [model(n, kind) for n in range(3)], [1.0, -0.5, 0.25]
    base = {name: value.to(dtype) for name, value in BASES.items()}
    found = Combination(sources, weights, "toy_slerp", {"t": 0.5}, base=base.__getitem__)
    for name, value in base.items():
        whole = value.reshape(-1).double().numpy()
        parameters = [whole + stack([source[name]])[0] for source in sources]
        mix = whole + 0.5 * sum(w * (p - whole) for w, p in zip(weights, parameters, strict=True))
        delta = found[name]
        assert delta.shape == value.shape
        assert close(delta, mix - whole)
        for start in range(delta.rows):
            index, values = delta.read(start, delta.rows)
            assert index is delta.positions(start, delta.rows) is None
            assert torch.equal(values, delta.dense().view(-1)[start * delta.columns :])


@pytest.mark.usefixtures("on_parameters")
def test_what_was_computed_is_kept_until_it_is_released_and_then_computed_again():
    asked: list[str] = []

    def base(name: str) -> torch.Tensor:
        asked.append(name)
        return BASES[name]

    found = Combination([model(1)], [1.0], "toy_slerp", {"t": 1.0}, base=base)
    delta = found["a"]
    assert asked == []
    first = delta.dense()
    delta.read(0, 1)[1].fill_(9)  # the caller's own
    assert torch.equal(delta.dense(), first)
    assert asked == ["a"]
    delta.release()
    assert torch.equal(delta.dense(), first)
    assert asked == ["a", "a"]


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.usefixtures("on_parameters")
def test_a_method_may_return_the_base_itself_which_stays_as_it_is(view):
    base = BASES["a"].clone()
    found = Combination([model(1)], [1.0], "toy_base", {"view": view}, base=lambda _: base)
    assert not found["a"].dense().any()
    assert torch.equal(base, BASES["a"])


@pytest.mark.usefixtures("on_parameters")
def test_a_method_on_parameters_needs_a_base_now_or_later():
    found = Combination([model(1)], [1.0], "toy_slerp", {"t": 1.0})
    assert "a" in found
    with pytest.raises(CombinationError, match=r"toy_slerp works on whole .* pass base="):
        found["a"]
    assert close(found.parameter("a", BASES.__getitem__), model(1)["a"].dense())
    around = Combination([found, model(2)], [1.0, 1.0])
    expected = stack([model(1)["a"], model(2)["a"]]).sum(axis=0)
    assert close(around.parameter("a", BASES.__getitem__), expected)


@pytest.mark.usefixtures("on_parameters")
def test_over_the_model_a_base_that_is_given_later_is_used_too():
    inner = {name: model(1)[name] for name in BASES}
    found = Combination([MemorySource(inner, "one")], [1.0], "toy_slerp", {"t": 1.0})
    around = Combination([found], [1.0], "ties", {"density": 0.5, "trim_scope": "model"})
    plain = Combination(
        [MemorySource(inner, "one")], [1.0], "ties", {"density": 0.5, "trim_scope": "model"}
    )
    for name in BASES:
        assert close(around.parameter(name, BASES.__getitem__), plain[name].dense())


@pytest.mark.usefixtures("on_parameters")
def test_statistics_reach_the_method_by_parameter():
    fisher = [{"a": torch.full((12, 40), 3.0)}, {}]
    sources = [MemorySource({"a": constant(value, 12, 40)}, f"{value}") for value in (1.0, 5.0)]
    how = {"base": BASES.__getitem__, "statistics": fisher}
    found = Combination(sources, [1, 1], "toy_fisher", **how)
    assert close(found["a"], torch.full((12, 40), 2.0))
    with pytest.raises(CombinationError, match="toy_fisher needs the fisher statistics"):
        Combination(sources, [1, 1], "toy_fisher")


@pytest.mark.usefixtures("on_parameters")
def test_a_method_that_returns_another_shape_is_refused():
    found = Combination([model(1)], [1.0], "toy_wrong", base=BASES.__getitem__)
    with pytest.raises(CombinationError, match=r"toy_wrong made .* of a, .* the shape \[12, 40\]"):
        found["a"].dense()


# --- a source like any other


def test_what_is_known_of_the_base_is_known_of_the_combination():
    one, two = model(1), model(2)
    one.base_parameter_count, two.base_parameter_count = 5, 7
    found = Combination([one, two], [1, 1], "ties", {"density": 0.5})
    assert found.base_model_name_or_path == one.base_model_name_or_path
    assert found.base_architectures == ["ToyModel"]
    assert found.base_parameter_count == 7
    assert found.label == "ties(model 1, model 2)"


def test_its_identity_is_its_content():
    def identity(**changes: Any) -> str:
        how = {"combination_type": "ties", "options": {"density": 0.5}, "seed": 1, **changes}
        sources = how.pop("sources", [model(1), model(2)])
        return Combination(sources, how.pop("weights", [1.0, 0.5]), **how).identity

    same = [MemorySource(model(n), "elsewhere", identity=f"model {n}") for n in (1, 2)]
    assert identity() == identity() == identity(sources=same)
    others = [
        identity(weights=[1.0, 0.25]),
        identity(seed=2),
        identity(mask="bernoulli"),
        identity(options={"density": 0.25}),
        identity(combination_type="dare_ties"),
        identity(prune="dare", drop_rate=0.5),
        identity(prune="dare", drop_rate=0.25),
        identity(sources=[model(1), model(3)]),
    ]
    assert len({identity(), *others}) == len(others) + 1


def test_it_survives_copying_and_pickling():
    options = {"density": 0.5, "trim_scope": "model"}
    found = Combination([model(1), model(2)], [1, 0.5], "ties", options, base=lambda name: None)
    expected = flattened(found)
    assert np.array_equal(flattened(copy.deepcopy(found)), expected)
    again = pickle.loads(pickle.dumps(found))
    assert np.array_equal(flattened(again), expected)
    assert again.identity == found.identity
