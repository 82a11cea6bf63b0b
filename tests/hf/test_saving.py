"""Saving adapters of a live model, merging them, and what a patched model refuses to save."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from dare_adapters.adapter import Adapter
from dare_adapters.errors import AdapterExistsError, PatchedModelError, PatchedStateWarning
from tests.conftest import Pack, all_bytes, read_checkpoint
from tests.hf.packs import expect
from tests.test_patch import assert_holds, dense_deltas


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
