"""Switching between loaded adapters, and mixing them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import PreTrainedModel

from dare_adapters.errors import AdapterExistsError, AdapterNotFoundError
from tests.conftest import Pack, all_bytes, read_checkpoint
from tests.hf.packs import expect
from tests.test_patch import assert_holds


@pytest.mark.parametrize(
    ("adapters", "weights", "chosen"),
    [
        ("b", None, {"b": 1.0}),
        (["c"], None, {"c": 1.0}),
        (("a", "c"), None, {"a": 1.0, "c": 1.0}),
        (["c", "a"], [2, 0.5], {"c": 2.0, "a": 0.5}),
        ({"a": 0.5, "b": -1}, None, {"a": 0.5, "b": -1.0}),
        ("b", [3.0], {"b": 3.0}),
        ([], None, {}),
        ({}, None, {}),
    ],
)
def test_the_chosen_adapters_are_active_with_their_weights(
    model: PreTrainedModel,
    pack: Pack,
    adapters: object,
    weights: list[float] | None,
    chosen: dict[str, float],
):
    model.set_dare_adapter("a")
    model.set_dare_adapter(adapters, weights=weights)
    assert model.active_dare_adapters == list(chosen)
    assert_holds(model, expect(pack, chosen))


@pytest.mark.parametrize(
    ("adapters", "weights", "message"),
    [
        (["a", "a"], None, "named twice"),
        (["a", "b"], [1.0], "1 weights for 2"),
        (["a"], [float("inf")], "finite"),
        ({"a": float("nan")}, None, "finite"),
        ({"a": float("inf")}, None, "finite"),
        ({"a": True}, None, "finite"),
        ({"a": 1.0}, [1.0], "weights"),
    ],
)
def test_choices_that_make_no_sense_change_nothing(
    model: PreTrainedModel, adapters: object, weights: list[float] | None, message: str
):
    model.set_dare_adapter("c")
    before = all_bytes(model)
    with pytest.raises(ValueError, match=message):
        model.set_dare_adapter(adapters, weights=weights)
    assert model.active_dare_adapters == ["c"]
    assert all_bytes(model) == before


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.set_dare_adapter("z"),
        lambda model: model.set_dare_adapter(["a", "z"]),
        lambda model: model.delete_dare_adapter("z"),
        lambda model: model.add_weighted_adapter(["a", "z"], [1, 1], "new"),
        lambda model: model.save_dare_adapter("unused", "z"),
        lambda model: model.dare_adapter("z").__enter__(),
    ],
)
def test_an_unknown_name_is_refused_with_those_there_are(
    model: PreTrainedModel, call: Callable[[PreTrainedModel], object]
):
    model.set_dare_adapter("c")
    before = all_bytes(model)
    with pytest.raises(AdapterNotFoundError, match=r"no adapter 'z' is loaded.*'a', 'b', 'c'"):
        call(model)
    assert model.dare_adapters == ["a", "b", "c"]
    assert model.active_dare_adapters == ["c"]
    assert all_bytes(model) == before


def test_a_model_without_adapters_says_so(pack: Pack):
    with pytest.raises(AdapterNotFoundError, match="none"):
        pack.live().set_dare_adapter("a")
    model = pack.live()
    model.disable_dare_adapters()
    assert model.active_dare_adapters == []


def test_the_lists_of_names_are_copies(model: PreTrainedModel):
    model.set_dare_adapter("a")
    model.dare_adapters.clear()
    model.active_dare_adapters.clear()
    assert model.dare_adapters == ["a", "b", "c"]
    assert model.active_dare_adapters == ["a"]


def test_deleting_an_active_adapter_keeps_the_others_active(model: PreTrainedModel, pack: Pack):
    model.set_dare_adapter({"a": 0.5, "b": 1.0, "c": 2.0})
    model.delete_dare_adapter("b")
    assert model.dare_adapters == model.active_dare_adapters == ["a", "c"]
    assert_holds(model, expect(pack, {"a": 0.5, "c": 2.0}))
    model.load_dare_adapter(pack.adapters["a"], "b")  # the name is free again


def test_deleting_an_inactive_adapter_changes_no_weight(model: PreTrainedModel):
    model.set_dare_adapter("a")
    before = all_bytes(model)
    model.delete_dare_adapter("c")
    assert model.active_dare_adapters == ["a"]
    assert all_bytes(model) == before


def test_inside_the_block_its_adapters_and_after_it_those_before(
    model: PreTrainedModel, pack: Pack
):
    model.set_dare_adapter({"a": 0.5})
    before = all_bytes(model)
    with model.dare_adapter("b") as inside:
        assert inside is model
        assert_holds(model, expect(pack, {"b": 1.0}))
        with model.dare_adapter({"b": 2.0, "c": 1.0}):
            assert_holds(model, expect(pack, {"b": 2.0, "c": 1.0}))
        with model.dare_adapter([]):
            assert_holds(model, read_checkpoint(pack.base))
        assert_holds(model, expect(pack, {"b": 1.0}))
    assert model.active_dare_adapters == ["a"]
    assert all_bytes(model) == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_block_with_the_adapters_before_it(
    model: PreTrainedModel, error: type[BaseException]
):
    before = all_bytes(model)
    with pytest.raises(error), model.dare_adapter("b"), model.dare_adapter("c"):
        raise error
    assert model.active_dare_adapters == []
    assert all_bytes(model) == before


def test_a_block_ends_well_where_an_adapter_before_it_was_deleted(
    model: PreTrainedModel, pack: Pack
):
    model.set_dare_adapter(["a", "c"])
    with model.dare_adapter("b"):
        model.delete_dare_adapter("a")
    assert model.active_dare_adapters == ["c"]
    assert_holds(model, expect(pack, {"c": 1.0}))


def test_a_weighted_adapter_is_the_dense_sum(model: PreTrainedModel, pack: Pack):
    before = all_bytes(model)
    model.add_weighted_adapter(["a", "b"], [0.3, -1.5], "mix")
    assert model.dare_adapters == ["a", "b", "c", "mix"]
    assert all_bytes(model) == before
    model.set_dare_adapter("mix")
    assert_holds(model, expect(pack, {"a": 0.3, "b": -1.5}))


def test_weights_of_mixes_of_mixes_multiply_and_parts_may_be_deleted(
    model: PreTrainedModel, pack: Pack
):
    model.add_weighted_adapter(["a", "b"], [0.5, 2.0], "mix")
    model.add_weighted_adapter(["mix", "c"], [0.5, 1.0], "more")
    model.delete_dare_adapter("a")
    model.delete_dare_adapter("mix")
    model.set_dare_adapter({"more": 2.0})
    assert_holds(model, expect(pack, {"a": 0.5, "b": 2.0, "c": 2.0}))


def test_a_weighted_adapter_can_be_made_while_others_are_active(model: PreTrainedModel, pack: Pack):
    model.set_dare_adapter("b")
    before = all_bytes(model)
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "mix")
    assert model.active_dare_adapters == ["b"]
    assert all_bytes(model) == before


def test_unknown_combinations_are_refused_with_those_there_are(model: PreTrainedModel, pack: Pack):
    for call in (
        lambda: model.add_weighted_adapter(["a"], [1.0], "mix", combination_type="dare_tie"),
        lambda: model.load_dare_adapter(pack.adapters["a"], "mix", combination_type="dare_tie"),
    ):
        with pytest.raises(ValueError, match=r"'dare_tie'.*dare_ties.*linear"):
            call()
    assert "mix" not in model.dare_adapters


def test_mixes_that_make_no_sense_are_refused(model: PreTrainedModel):
    with pytest.raises(AdapterExistsError):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c")
    with pytest.raises(ValueError, match="1 weights for 2"):
        model.add_weighted_adapter(["a", "b"], [1.0], "mix")
    with pytest.raises(ValueError, match="adapter_name"):
        model.add_weighted_adapter(["a"], [1.0], "")
    with pytest.raises(ValueError, match="no adapter"):
        model.add_weighted_adapter([], [], "mix")
    assert model.dare_adapters == ["a", "b", "c"]
