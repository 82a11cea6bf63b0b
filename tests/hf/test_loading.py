"""Loading adapters into a live model: names, weights, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from dare_adapters.adapter import Adapter
from dare_adapters.errors import AdapterExistsError, AdapterFormatError, AdapterNotFoundError
from tests.conftest import Pack, all_bytes
from tests.hf.packs import expect
from tests.test_patch import assert_holds


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
