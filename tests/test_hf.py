"""The methods that every transformers model gets: what they do, and what they refuse."""

from __future__ import annotations

import copy
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    BertForSequenceClassification,
    BertModel,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
)

import dare_adapters
from dare_adapters.adapter import Adapter
from dare_adapters.errors import (
    AdapterExistsError,
    AdapterFormatError,
    AdapterNotFoundError,
    ArchitectureMismatchError,
    BaseMismatchError,
    DareError,
    PatchedModelError,
    PatchedStateWarning,
    UnusedParametersWarning,
)
from tests.conftest import Pack, PackMaker, all_bytes, read_checkpoint, tiny_llama
from tests.test_live import bert_config
from tests.test_patch import EXACT, assert_holds, dense_deltas, expected_sum

TOKENS = torch.tensor([[1, 5, 9, 30, 2, 77]])


@pytest.fixture
def pack(make_pack: PackMaker) -> Pack:
    return make_pack("plain")


@pytest.fixture
def model(pack: Pack) -> PreTrainedModel:
    """The base with adapters a, b and c loaded, none active."""
    model = pack.live()
    for name, path in pack.adapters.items():
        model.load_dare_adapter(path, name, activate=False)
    return model


def expect(pack: Pack, chosen: dict[str, float]) -> dict[str, torch.Tensor]:
    parts = [(dense_deltas(pack, name), weight) for name, weight in chosen.items()]
    return expected_sum(read_checkpoint(pack.base), parts)


def task_pack(make_pack: PackMaker) -> Pack:
    """A classifier with three labels, fine-tuned from a bare encoder."""
    return make_pack(
        "classifier",
        BertModel,
        bert_config(),
        finetuned_class=BertForSequenceClassification,
        kinds={"a": EXACT, "b": {"drop_rate": 0.5, "bits": 8}},
        num_labels=3,
    )


# Loading


def test_a_loaded_adapter_is_active_under_the_name_of_its_directory(pack: Pack):
    model = pack.live()
    assert model.dare_adapters == model.active_dare_adapters == []
    assert model.load_dare_adapter(f"{pack.adapters['a']}/") == "a"
    assert model.dare_adapters == model.active_dare_adapters == ["a"]
    assert_holds(model, expect(pack, {"a": 1.0}))


def test_an_opened_adapter_and_a_path_load_alike(pack: Pack):
    one, other = pack.live(), pack.live()
    assert one.load_dare_adapter(Adapter.open(pack.adapters["b"])) == "b"
    other.load_dare_adapter(pack.adapters["b"], "mine")
    assert all_bytes(one) == all_bytes(other)


def test_without_activation_loading_changes_nothing(pack: Pack):
    model = pack.live()
    before = all_bytes(model)
    model.load_dare_adapter(pack.adapters["a"], activate=False)
    assert model.dare_adapters == ["a"]
    assert model.active_dare_adapters == []
    assert all_bytes(model) == before


def test_a_newly_loaded_adapter_replaces_the_active_ones(pack: Pack):
    model = pack.live()
    model.load_dare_adapter(pack.adapters["a"])
    model.load_dare_adapter(pack.adapters["c"])
    assert model.dare_adapters == ["a", "c"]
    assert model.active_dare_adapters == ["c"]
    assert_holds(model, expect(pack, {"c": 1.0}))


def test_a_list_of_sources_is_a_weighted_sum_under_one_name(pack: Pack):
    model = pack.live()
    sources = [pack.adapters["a"], Adapter.open(pack.adapters["b"])]
    assert model.load_dare_adapter(sources, weight=[0.25, -2.0]) == "a+b"
    assert model.dare_adapters == ["a+b"]
    assert_holds(model, expect(pack, {"a": 0.25, "b": -2.0}))


def test_one_weight_counts_for_every_source(pack: Pack):
    model = pack.live()
    model.load_dare_adapter([pack.adapters["a"], pack.adapters["b"]], "mix", weight=0.5)
    assert_holds(model, expect(pack, {"a": 0.5, "b": 0.5}))
    model.load_dare_adapter(pack.adapters["c"], "half", weight=0.5)
    assert_holds(model, expect(pack, {"c": 0.5}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"adapter_name": ""}, "adapter_name"),
        ({"adapter_name": 3}, "adapter_name"),
        ({"weight": float("nan")}, "finite"),
        ({"weight": float("inf")}, "finite"),
        ({"weight": True}, "finite"),
        ({"weight": [1.0, 2.0]}, "2 weights for 1"),
        ({"combination_type": "ties"}, "density is needed"),
    ],
)
def test_loading_refuses_what_makes_no_sense(
    pack: Pack, arguments: dict[str, object], message: str
):
    model = pack.live()
    with pytest.raises(ValueError, match=message):
        model.load_dare_adapter(pack.adapters["a"], **arguments)
    assert model.dare_adapters == []


@pytest.mark.parametrize("name", [None, "nothing"])
def test_an_empty_list_of_sources_is_refused(pack: Pack, name: str | None):
    model = pack.live()
    with pytest.raises(ValueError, match="no adapter"):
        model.load_dare_adapter([], name)
    assert model.dare_adapters == []


def test_a_taken_name_is_refused_and_the_first_adapter_stays(model: PreTrainedModel, pack: Pack):
    model.set_dare_adapter("a")
    before = all_bytes(model)
    with pytest.raises(AdapterExistsError, match=r"'a' is loaded already.*'b'"):
        model.load_dare_adapter(pack.adapters["b"], "a")
    assert model.active_dare_adapters == ["a"]
    assert all_bytes(model) == before


def test_what_is_no_adapter_is_refused(pack: Pack, tmp_path: Path):
    model = pack.live()
    for source in (tmp_path, pack.base, tmp_path / "nowhere", tmp_path / "a b" / "c" / "d"):
        with pytest.raises(AdapterNotFoundError):
            model.load_dare_adapter(source)
    with pytest.raises(FileNotFoundError):
        model.load_dare_adapter(tmp_path / "nowhere")
    assert model.dare_adapters == []


def spoil_one_byte(directory: Path) -> None:
    file = directory / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def cut_short(directory: Path) -> None:
    file = directory / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def edit_config(directory: Path) -> None:
    file = directory / "adapter_config.json"
    file.write_text(file.read_text().replace('"seed": ', '"seed": 1'))


@pytest.mark.parametrize("damage", [spoil_one_byte, cut_short, edit_config])
def test_a_damaged_adapter_leaves_the_model_as_it_was(
    model: PreTrainedModel, pack: Pack, tmp_path: Path, damage: Callable[[Path], None]
):
    model.set_dare_adapter(["a", "b"], weights=[0.5, 2.0])
    before = all_bytes(model)
    shutil.copytree(pack.adapters["c"], tmp_path / "damaged")
    damage(tmp_path / "damaged")
    with pytest.raises(AdapterFormatError):
        model.load_dare_adapter(tmp_path / "damaged")
    assert model.dare_adapters == ["a", "b", "c"]
    assert model.active_dare_adapters == ["a", "b"]
    assert all_bytes(model) == before
    model.disable_dare_adapters()
    assert all_bytes(model) == all_bytes(pack.live())


def test_an_adapter_that_cannot_be_activated_is_not_loaded_either(
    pack: Pack, monkeypatch: pytest.MonkeyPatch
):
    model = pack.live()
    model.load_dare_adapter(pack.adapters["a"])
    before = all_bytes(model)
    state = type(model._dare_live_adapters)
    real = state._apply

    def failing(self: object, model: PreTrainedModel, weights: dict[str, float]) -> None:
        if "b" in weights:
            raise MemoryError
        real(self, model, weights)

    monkeypatch.setattr(state, "_apply", failing)
    with pytest.raises(MemoryError):
        model.load_dare_adapter(pack.adapters["b"])
    assert model.dare_adapters == model.active_dare_adapters == ["a"]
    assert all_bytes(model) == before


# Switching


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


# Mixing


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


# Saving


def test_an_adapter_can_be_saved_over_the_directory_it_came_from(pack: Pack, tmp_path: Path):
    shutil.copytree(pack.adapters["a"], tmp_path / "adapter")
    model = pack.live()
    model.load_dare_adapter(tmp_path / "adapter")
    model.save_dare_adapter(tmp_path / "adapter", overwrite=True)
    model.disable_dare_adapters()
    model.set_dare_adapter("adapter")
    assert_holds(model, expect(pack, {"a": 1.0}))
    for file in pack.adapters["a"].iterdir():
        assert (tmp_path / "adapter" / file.name).read_bytes() == file.read_bytes()


def test_a_saved_adapter_loads_again_with_the_same_effect(
    model: PreTrainedModel, pack: Pack, tmp_path: Path
):
    model.set_dare_adapter("c")  # what is active does not matter
    model.save_dare_adapter(tmp_path / "copy", "b")
    again = pack.live()
    again.load_dare_adapter(tmp_path / "copy")
    assert_holds(again, expect(pack, {"b": 1.0}))
    with pytest.raises(AdapterExistsError):
        model.save_dare_adapter(tmp_path / "copy", "a")
    model.save_dare_adapter(tmp_path / "copy", "a", overwrite=True)
    again.load_dare_adapter(tmp_path / "copy", "new")
    assert_holds(again, expect(pack, {"a": 1.0}))


def test_the_name_may_be_left_out_where_there_is_one(pack: Pack, tmp_path: Path):
    model = pack.live()
    with pytest.raises(ValueError, match="adapter_name is needed"):
        model.save_dare_adapter(tmp_path / "copy")
    model.load_dare_adapter(pack.adapters["a"])
    model.save_dare_adapter(tmp_path / "copy")
    assert (
        Adapter.open(tmp_path / "copy").config.seed == Adapter.open(pack.adapters["a"]).config.seed
    )
    model.load_dare_adapter(pack.adapters["b"])
    with pytest.raises(ValueError, match="a, b"):
        model.save_dare_adapter(tmp_path / "other")


def test_a_mix_is_saved_as_the_adapter_that_it_stands_for(
    model: PreTrainedModel, pack: Pack, tmp_path: Path
):
    model.add_weighted_adapter(["a", "b"], [1.0, -0.5], "mix")
    model.load_dare_adapter(pack.adapters["a"], "half", weight=0.5)
    before = all_bytes(model)
    for name, parts in (("mix", {"a": 1.0, "b": -0.5}), ("half", {"a": 0.5})):
        model.save_dare_adapter(tmp_path / name, name)
        stored = dict(Adapter.open(tmp_path / name).deltas())
        for parameter, kept in stored.items():
            parameters = [(dense_deltas(pack, part), w) for part, w in parts.items()]
            expected = sum(delta[parameter] * w for delta, w in parameters)
            # Each input's finest bits: 16 for "b", 4 for "a".
            error = (kept.dense() - expected).norm() / expected.norm()
            assert error < (0.005 if name == "mix" else 0.2), parameter
    assert all_bytes(model) == before


def test_a_merged_model_is_saved_as_an_ordinary_fine_tune(
    model: PreTrainedModel, pack: Pack, tmp_path: Path
):
    model.set_dare_adapter({"a": 1.0, "b": 0.5})
    assert model.merge_dare_adapters() == ["a", "b"]
    assert model.dare_adapters == model.active_dare_adapters == []
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert_holds(again, expect(pack, {"a": 1.0, "b": 0.5}))
    model.disable_dare_adapters()
    assert all_bytes(model) == all_bytes(again)


def test_merging_nothing_unloads_all_and_leaves_the_base(model: PreTrainedModel, pack: Pack):
    assert model.merge_dare_adapters() == []
    assert model.dare_adapters == []
    assert_holds(model, read_checkpoint(pack.base))


def test_save_pretrained_is_refused_while_an_adapter_is_active(
    model: PreTrainedModel, pack: Pack, tmp_path: Path
):
    model.set_dare_adapter("b")
    with pytest.raises(PatchedModelError, match=r"while b is active.*merge_dare_adapters"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    model.disable_dare_adapters()
    model.save_pretrained(tmp_path / "model")
    saved = read_checkpoint(tmp_path / "model")
    base = read_checkpoint(pack.base)
    assert saved.keys() == base.keys()
    assert all(torch.equal(saved[name], value) for name, value in base.items())


def test_save_pretrained_of_the_inner_model_is_refused_too(model: PreTrainedModel, tmp_path: Path):
    model.set_dare_adapter("b")
    with pytest.raises(PatchedModelError):
        model.model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    model.disable_dare_adapters()
    model.model.save_pretrained(tmp_path / "model")


def test_a_state_dict_warns_while_an_adapter_is_active(model: PreTrainedModel, pack: Pack):
    model.state_dict()  # no warning
    model.set_dare_adapter("b")
    with pytest.warns(PatchedStateWarning, match="base with b"):
        state = model.state_dict()
    expected = expect(pack, {"b": 1.0})
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    with pytest.warns(PatchedStateWarning):
        torch.nn.ModuleDict({"inside": model}).state_dict()
    model.disable_dare_adapters()
    model.state_dict()


def test_load_state_dict_is_refused_while_an_adapter_is_active(model: PreTrainedModel, pack: Pack):
    state = {name: value.clone() + 1 for name, value in model.state_dict().items()}
    model.set_dare_adapter("b")
    before = all_bytes(model)
    with pytest.raises(PatchedModelError, match="while b is active"):
        model.load_state_dict(state)
    assert all_bytes(model) == before
    model.disable_dare_adapters()
    model.load_state_dict(state)
    assert_holds(model, state)


# Casting, moving, copying


@pytest.mark.parametrize("start", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "cast",
    [
        lambda model: model.to(torch.float32),
        lambda model: model.to(torch.bfloat16),
        lambda model: model.half(),
        lambda model: model.double(),
        lambda model: torch.nn.ModuleDict({"inside": model}).half(),
    ],
    ids=["float32", "bfloat16", "half", "double", "half from outside"],
)
def test_a_cast_with_adapters_is_the_cast_base_with_adapters(
    make_pack: PackMaker, start: torch.dtype, cast: Callable[[PreTrainedModel], object]
):
    pack = make_pack(f"cast-{start}", dtype=start)
    model, plain = pack.live(), pack.live()
    cast(plain)
    base = {name: value.clone() for name, value in plain.state_dict().items()}
    for name, path in pack.adapters.items():
        model.load_dare_adapter(path, name, activate=False)
    model.set_dare_adapter({"a": 1.0, "b": 0.5})
    cast(model)
    assert model.dtype == plain.dtype
    assert model.active_dare_adapters == ["a", "b"]
    parts = [(dense_deltas(pack, "a"), 1.0), (dense_deltas(pack, "b"), 0.5)]
    assert_holds(model, expected_sum(base, parts))
    model.disable_dare_adapters()
    assert all_bytes(model) == all_bytes(plain)


def copy_of(model: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(model)


def pickled(model: PreTrainedModel) -> PreTrainedModel:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("duplicate", [copy_of, pickled])
def test_a_copy_of_a_model_with_active_adapters_lives_on_its_own(
    model: PreTrainedModel,
    pack: Pack,
    duplicate: Callable[[PreTrainedModel], PreTrainedModel],
    tmp_path: Path,
):
    model.set_dare_adapter({"a": 1.0, "c": 0.5})
    other = duplicate(model)
    before = all_bytes(model)
    assert all_bytes(other) == before
    assert other.dare_adapters == ["a", "b", "c"]
    assert other.active_dare_adapters == ["a", "c"]
    with pytest.raises(PatchedModelError):
        other.save_pretrained(tmp_path / "copy")
    with pytest.warns(PatchedStateWarning):
        other.state_dict()
    other.set_dare_adapter("b")
    assert_holds(other, expect(pack, {"b": 1.0}))
    other.disable_dare_adapters()
    assert_holds(other, read_checkpoint(pack.base))
    other.delete_dare_adapter("a")
    assert all_bytes(model) == before
    assert model.active_dare_adapters == ["a", "c"]
    assert model.dare_adapters == ["a", "b", "c"]
    model.disable_dare_adapters()
    assert_holds(model, read_checkpoint(pack.base))
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, other(TOKENS).logits)


def test_a_pickled_model_is_not_much_larger_than_its_weights(model: PreTrainedModel):
    plain = len(pickle.dumps(LlamaForCausalLM(tiny_llama()).to(torch.bfloat16)))
    model.set_dare_adapter("a")
    assert len(pickle.dumps(model)) < 2.5 * plain


# The base


def test_another_base_is_refused_with_its_parameters_and_the_right_base(pack: Pack):
    torch.manual_seed(1)
    other = LlamaForCausalLM(tiny_llama()).to(torch.bfloat16)
    before = all_bytes(other)
    with pytest.raises(BaseMismatchError) as raised:
        other.load_dare_adapter(pack.adapters["a"])
    assert re.search(r"model\.layers\.\d\.\S+\.weight \(off by 0\.\d+\)", str(raised.value))
    assert str(pack.base) in str(raised.value)
    assert other.dare_adapters == []
    assert all_bytes(other) == before


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.o_proj.weight", "model.norm.weight"])
def test_one_unit_in_the_last_place_of_one_parameter_is_another_base(pack: Pack, name: str):
    model = pack.live()
    model.get_parameter(name).data.view(torch.int16).add_(1)
    with pytest.raises(BaseMismatchError, match=f"1 of 21 .*{re.escape(name)}"):
        model.load_dare_adapter(pack.adapters["a"])
    model.load_dare_adapter(pack.adapters["a"], check_base=False)
    assert model.active_dare_adapters == ["a"]


@pytest.mark.parametrize(
    ("stored", "live", "through"),
    [
        (torch.float32, torch.bfloat16, None),
        (torch.float32, torch.float16, None),
        (torch.float32, torch.float32, torch.bfloat16),
        (torch.float32, torch.float32, torch.float16),
        (torch.bfloat16, torch.float32, None),
        (torch.bfloat16, torch.float16, None),
        (torch.bfloat16, torch.float32, torch.float16),
        (torch.float16, torch.float32, None),
        (torch.float16, torch.bfloat16, None),
    ],
    ids=str,
)
def test_the_base_in_another_dtype_is_the_base(
    make_pack: PackMaker, stored: torch.dtype, live: torch.dtype, through: torch.dtype | None
):
    pack = make_pack(f"cast-{stored}", dtype=stored)
    model = pack.live(through or live).to(live)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_dare_adapter(pack.adapters["a"])
    assert_holds(model, expected_sum(base, [(dense_deltas(pack, "a"), 1.0)]))


def test_another_architecture_is_refused_with_what_there_is(pack: Pack):
    other = BertModel(bert_config())
    with pytest.raises(ArchitectureMismatchError, match=r"LlamaForCausalLM.*BertModel has none"):
        other.load_dare_adapter(pack.adapters["a"])
    wide = LlamaForCausalLM(tiny_llama(intermediate_size=140))
    with pytest.raises(ArchitectureMismatchError, match=r"\[64, 140\].*\[64, 136\]"):
        wide.load_dare_adapter(pack.adapters["a"])
    shallow = LlamaForCausalLM(tiny_llama(num_hidden_layers=1))
    with pytest.raises(ArchitectureMismatchError, match=r"9 parameters.*model\.layers\.1\."):
        shallow.load_dare_adapter(pack.adapters["a"])


def test_without_strict_what_fits_is_loaded_and_the_rest_told(pack: Pack):
    model = pack.live()
    del model.model.layers[1]
    with pytest.warns(UnusedParametersWarning, match=r"9 parameters.*model\.layers\.1\."):
        model.load_dare_adapter(pack.adapters["a"], strict=False)
    expected = expect(pack, {"a": 1.0})
    assert_holds(model, {n: v for n, v in expected.items() if ".layers.1." not in n})


def test_a_head_comes_and_goes_with_the_adapter(make_pack: PackMaker):
    pack = task_pack(make_pack)
    model = BertForSequenceClassification.from_pretrained(pack.base, num_labels=3, dtype="auto")
    before = all_bytes(model)
    model.load_dare_adapter(pack.adapters["a"])
    assert_holds(model, read_checkpoint(pack.finetuned["a"]))
    model.disable_dare_adapters()
    assert all_bytes(model) == before
    model.load_dare_adapter(pack.adapters["b"], "half", weight=0.5)
    finetuned = read_checkpoint(pack.finetuned["b"])
    assert torch.equal(model.classifier.weight, finetuned["classifier.weight"])


def test_a_head_for_another_number_of_labels_is_refused_with_advice(make_pack: PackMaker):
    pack = task_pack(make_pack)
    model = BertForSequenceClassification.from_pretrained(pack.base, num_labels=2, dtype="auto")
    with pytest.raises(
        ArchitectureMismatchError, match=r"classifier\.\w+ has the shape \[2.*\[3.*num_labels"
    ):
        model.load_dare_adapter(pack.adapters["a"])


def test_a_bare_model_takes_all_but_the_head_and_tells_so(make_pack: PackMaker):
    pack = task_pack(make_pack)
    model = AutoModel.from_pretrained(pack.base, dtype="auto")
    with pytest.warns(UnusedParametersWarning, match=r"2 parameters.*classifier\.weight"):
        model.load_dare_adapter(pack.adapters["a"])
    finetuned = read_checkpoint(pack.finetuned["a"])
    bert = {n.removeprefix("bert."): v for n, v in finetuned.items() if n.startswith("bert.")}
    assert_holds(model, bert)


def test_an_adapter_of_a_head_alone_is_left_out_of_a_bare_model(
    make_pack: PackMaker, tmp_path: Path
):
    pack = task_pack(make_pack)
    probe = BertForSequenceClassification.from_pretrained(pack.base, num_labels=3, dtype="auto")
    probe.save_pretrained(tmp_path / "probe")  # the encoder is the base's own
    dare_adapters.extract(pack.base, tmp_path / "probe", tmp_path / "adapter", progress=False)
    model = AutoModel.from_pretrained(pack.base, dtype="auto")
    with pytest.warns(UnusedParametersWarning, match=r"2 parameters.*classifier\.weight"):
        model.load_dare_adapter(tmp_path / "adapter")
    assert all_bytes(model) == all_bytes(AutoModel.from_pretrained(pack.base, dtype="auto"))
    task = BertForSequenceClassification.from_pretrained(pack.base, num_labels=3, dtype="auto")
    task.load_dare_adapter(tmp_path / "adapter")
    assert_holds(task, read_checkpoint(tmp_path / "probe"))


def test_a_bare_decoder_takes_an_adapter_of_the_model_with_a_head(pack: Pack):
    model = LlamaModel.from_pretrained(pack.base, dtype="auto")
    with pytest.warns(UnusedParametersWarning, match=r"lm_head\.weight"):
        model.load_dare_adapter(pack.adapters["a"])
    expected = expect(pack, {"a": 1.0})
    del expected["lm_head.weight"]
    assert_holds(model, {name.removeprefix("model."): v for name, v in expected.items()})


def test_a_fine_tune_that_unties_its_head_needs_an_untied_base(
    make_pack: PackMaker, tmp_path: Path
):
    def untie(model: PreTrainedModel) -> None:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())

    config = tiny_llama(tie_word_embeddings=True)
    pack = make_pack("untied", config=config, kinds={"a": EXACT}, change=untie)
    finetuned = read_checkpoint(pack.finetuned["a"])
    assert not torch.equal(finetuned["lm_head.weight"], finetuned["model.embed_tokens.weight"])
    with pytest.warns(UnusedParametersWarning, match=r"lm_head\.weight.*tie_word_embeddings=False"):
        pack.live().load_dare_adapter(pack.adapters["a"])
    model = LlamaForCausalLM.from_pretrained(
        pack.base, dtype="auto", tie_word_embeddings=False
    ).eval()
    model.load_dare_adapter(pack.adapters["a"])
    assert_holds(model, finetuned)
    full = dare_adapters.export(pack.base, pack.adapters["a"], tmp_path / "full", progress=False)
    assert_holds(LlamaForCausalLM.from_pretrained(full, dtype="auto"), finetuned)


def test_the_base_is_verified_and_not_the_patched_weights(pack: Pack):
    model = pack.live()
    model.load_dare_adapter(pack.adapters["b"])
    patched = all_bytes(model)
    model.load_dare_adapter(pack.adapters["a"], activate=False)
    assert all_bytes(model) == patched
    torch.manual_seed(1)
    other = LlamaForCausalLM(tiny_llama()).to(torch.bfloat16)
    other.load_dare_adapter(pack.adapters["b"], check_base=False)
    with pytest.raises(BaseMismatchError):
        other.load_dare_adapter(pack.adapters["a"])
    assert other.active_dare_adapters == ["b"]


# The rest of the world


def test_importing_the_library_imports_none_of_the_heavy_optional_ones():
    program = (
        "import sys, dare_adapters; "
        "print([m for m in ('vllm', 'datasets', 'evaluate', 'peft') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_installing_the_methods_twice_changes_nothing():
    call = PreTrainedModel.__call__
    dare_adapters.hf.install()
    assert PreTrainedModel.__call__ is call


def test_a_compiled_model_sees_every_switch_of_adapters(model: PreTrainedModel):
    plain = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    seen = []
    with torch.no_grad():
        for chosen in ([], ["a"], ["b", "c"], []):
            model.set_dare_adapter(chosen)
            plain.set_dare_adapter(chosen)
            seen.append(compiled(TOKENS).logits)
            torch.testing.assert_close(seen[-1], plain(TOKENS).logits)
    torch._dynamo.reset()
    assert torch.equal(seen[0], seen[3])
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_a_compiled_model_without_adapters_compiles_in_one_graph(pack: Pack):
    torch._dynamo.reset()
    model = pack.live()
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)(TOKENS).logits
        torch.testing.assert_close(compiled, model(TOKENS).logits)
    torch._dynamo.reset()


def test_every_error_is_a_dare_error_with_its_builtin_kin():
    assert issubclass(AdapterNotFoundError, FileNotFoundError)
    assert issubclass(AdapterExistsError, FileExistsError)
    for error in (AdapterFormatError, ArchitectureMismatchError, BaseMismatchError):
        assert issubclass(error, DareError)
