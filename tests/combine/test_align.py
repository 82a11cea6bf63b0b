"""Names of one parameter in several sources are made one, and no others are."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dare_adapters.combine.align import align_names, align_to
from dare_adapters.combine.combination import Combination
from dare_adapters.delta import DenseDelta, NewParameter
from dare_adapters.errors import BaseMismatchError
from dare_adapters.source import DeltaSource, Renamed
from dare_adapters.witness import encode_witness
from tests.combine.sources import MemorySource, distinct

BARE = ["embeddings.weight", "encoder.0.weight", "encoder.1.weight", "pooler.weight"]
TASK = [f"bert.{name}" for name in BARE]
HEAD = ["classifier.bias", "classifier.weight"]


def source(names: Sequence[str], label: str = "source", new: Sequence[str] = ()) -> MemorySource:
    deltas = {
        name: NewParameter(torch.ones(2)) if name in new else DenseDelta(distinct((3, 4), number))
        for number, name in enumerate(names)
    }
    return MemorySource(deltas, label)


@pytest.mark.parametrize(
    ("own", "known", "expected"),
    [
        (BARE, TASK, TASK),
        (TASK, BARE, BARE),
        (BARE, [*TASK, *HEAD], TASK),
        ([*TASK, *HEAD], BARE, [*BARE, *HEAD]),
        ([*TASK, *HEAD], [*BARE, *HEAD], [*BARE, *HEAD]),
        # A LoRA changes few, and the first may change fewer.
        (["bert.encoder.0.weight"], BARE, ["encoder.0.weight"]),
        (BARE, ["bert.encoder.0.weight"], ["bert.encoder.0.weight", BARE[0], *BARE[2:]]),
        # A legacy adapter that says nothing of the prefix at the top.
        (["model.layers.0.weight", "lm_head.weight"], ["layers.0.weight"], None),
    ],
)
def test_one_prefix_is_added_or_stripped_where_names_agree_then(
    own: list[str], known: list[str], expected: list[str] | None
):
    found = align_to(source(own), set(known))
    expected = ["layers.0.weight", "lm_head.weight"] if expected is None else expected
    assert set(found) == set(expected)
    assert isinstance(found, Renamed)
    for name, other in found.names.items():
        assert name == other or name.endswith(other) or other.endswith(name)
        assert found[name] is found.source[other]


@pytest.mark.parametrize(
    ("own", "known"),
    [
        (TASK, TASK),
        (BARE, [*BARE, "bert.encoder.0.weight"]),
        ([*TASK, *HEAD], HEAD),
        (BARE, ["decoder.weight", "lm_head.weight"]),
        (["weight"], ["bias"]),
        ([], BARE),
        (BARE, []),
    ],
)
def test_names_that_agree_best_as_they_are_stay(own: list[str], known: list[str]):
    given = source(own)
    assert align_to(given, set(known)) is given


def test_two_parameters_never_become_one():
    # Stripped, the first would be the second.
    given = source(["bert.encoder.0.weight", "encoder.0.weight", "bert.encoder.1.weight"])
    found = align_to(given, {"encoder.0.weight", "encoder.1.weight"})
    assert len(found) == len(given)
    assert found is given


@settings(max_examples=100, deadline=None)
@given(
    own=st.sets(st.text("ab.", min_size=1, max_size=6), max_size=8),
    known=st.sets(st.text("ab.", min_size=1, max_size=6), max_size=8),
)
def test_whatever_the_names_nothing_is_lost_and_no_fewer_agree(own: set[str], known: set[str]):
    given = source(sorted(own))
    found = align_to(given, known)
    assert len(found) == len(given)
    assert len(known & set(found)) >= len(known & own)
    names = found.names if isinstance(found, Renamed) else {name: name for name in found}
    assert set(names.values()) == own
    assert all(found[name] is given[other] for name, other in names.items())


def test_the_first_source_gives_the_names():
    sources = [source([*TASK, *HEAD], "task"), source(BARE, "bare"), source(TASK, "other")]
    found = align_names(sources)
    assert found[0] is sources[0]
    assert found[2] is sources[2]
    assert set(found[1]) == set(TASK)
    assert [one.label for one in found] == ["task", "bare", "other"]
    merged = Combination(found, [1.0, 2.0, 3.0])
    for bare, task in zip(BARE, TASK, strict=True):
        parts = [sources[0][task], sources[1][bare], sources[2][task]]
        expected = sum(n * part.dense() for n, part in enumerate(parts, 1))
        torch.testing.assert_close(merged[task].dense(), expected)
    assert set(merged) == {*TASK, *HEAD}


def test_a_renamed_source_is_the_source_but_for_names():
    given = source([*TASK, *HEAD], "task", new=HEAD)
    given.base_parameter_count, given.revision = 17, "main"
    found = align_to(given, set(BARE))
    assert (found.label, found.identity, found.revision) == ("task", given.identity, "main")
    assert (found.base_parameter_count, found.base_architectures) == (17, ["ToyModel"])
    assert found.base_model_name_or_path == given.base_model_name_or_path
    assert [name for name in found if found.is_new(name)] == HEAD
    assert found.mask_seed(5) == given.mask_seed(5)
    assert "encoder.0.weight" in found
    assert "bert.encoder.0.weight" not in found
    with pytest.raises(KeyError):
        found["bert.encoder.0.weight"]


def test_a_renamed_combination_reads_its_base_under_its_own_names():
    inner = Combination([source(TASK, "a"), source(TASK, "b")], [1, 1], "karcher")
    found = align_names([source(BARE, "bare"), inner])[1]
    asked: list[str] = []

    def base(name: str) -> torch.Tensor:
        asked.append(name)
        return torch.ones(3, 4)

    assert bool(found.parameter("encoder.0.weight", base).dense().any())
    assert asked == ["encoder.0.weight"]


# --- which base


def with_witness(names: Sequence[str], values: torch.Tensor, label: str) -> MemorySource:
    found = source(names, label)
    found.witness = {name: encode_witness(name, values) for name in names}
    return found


def test_the_same_base_under_other_names_is_the_same_base():
    values = torch.randn(30, 40)
    # Which entries a witness holds depends on the name.
    task = with_witness([*TASK, *HEAD], values, "task")
    bare = with_witness(BARE, values, "bare")
    assert task.witness[TASK[1]] != bare.witness[BARE[1]]
    for pair in ([task, bare], [bare, task]):
        aligned: list[DeltaSource] = align_names(pair)
        merged = Combination(aligned, [1, 1])
        # What a reader will compare with the base is true of it.
        for name, text in merged.witness.items():
            assert text == encode_witness(name, values)
        assert set(merged.witness) >= set(pair[0])


def test_another_base_under_the_same_names_is_still_refused():
    one = with_witness(TASK, torch.randn(30, 40), "one")
    other = with_witness(TASK, torch.randn(30, 40), "other")
    apart = with_witness(["h.0.weight"], torch.randn(30, 40), "apart")
    for pair in ([one, other], [one, apart]):
        with pytest.raises(BaseMismatchError, match="were made over different bases"):
            Combination(align_names(pair), [1, 1])
