"""`DareConfig` is a recipe, or what a directory says; neither is mistaken for the other."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftConfig, get_peft_model
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from dare_adapters import DareConfig
from dare_adapters.errors import AdapterFormatError
from tests.conftest import PackMaker
from tests.tuner.architectures import ARCHITECTURES


@given(
    drop_rate=st.sampled_from([0.0, 0.5, 0.7, 0.99]),
    mask=st.sampled_from(["auto", "bernoulli"]),
    seed=st.none() | st.integers(0, 2**53),
    bits=st.sampled_from([None, 1, 4]),
    targets=st.none() | st.lists(st.sampled_from(["q_proj", "up"]), min_size=1) | st.just("a.*"),
    heads=st.none() | st.just(["classifier"]),
)
def test_a_recipe_reads_what_it_wrote(
    tmp_path_factory: pytest.TempPathFactory, heads: Any, targets: Any, **options: Any
) -> None:
    directory = tmp_path_factory.mktemp("recipe")
    recipe = DareConfig(target_modules=targets, modules_to_save=heads, **options)
    recipe.save_pretrained(directory)
    for read in (DareConfig.from_pretrained(directory), PeftConfig.from_pretrained(directory)):
        assert isinstance(read, DareConfig)
        assert read.to_dict() == recipe.to_dict()
    assert copy.deepcopy(recipe).to_dict() == pickle.loads(pickle.dumps(recipe)).to_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_rate": 1.0}, "drop_rate"),
        ({"mask": "random"}, "mask"),
        ({"mask": "blocked", "drop_rate": 0.7}, "blocked"),
        ({"bits": 3}, "bits"),
        ({"bits": True}, "bits"),
        ({"seed": -1}, "seed"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DareConfig(**options)


def described(make_pack: PackMaker) -> dict[str, Any]:
    pack = ARCHITECTURES["llama"].pack(make_pack, "llama")
    found: dict[str, Any] = json.loads((pack.adapters["a"] / "adapter_config.json").read_text())
    return found


def test_a_directory_describes_every_tensor(make_pack: PackMaker) -> None:
    raw = described(make_pack)
    config = DareConfig(**{key: value for key, value in raw.items() if key != "peft_type"})
    assert config.entries.keys() == raw["parameters"].keys()
    assert config.target_modules is None
    assert config.auto_mapping == {
        "base_model_class": "LlamaForCausalLM",
        "parent_library": "transformers",
    }


@pytest.mark.parametrize("key", ["seed", "parameters", "witness", "sha256"])
def test_fields_that_decoding_depends_on_cannot_be_edited(make_pack: PackMaker, key: str) -> None:
    raw = described(make_pack)
    raw[key] = {"seed": 1, "sha256": "0" * 64}.get(key, {})
    with pytest.raises(AdapterFormatError, match="digest"):
        DareConfig(**raw)
    del raw["digest"]
    raw["sha256"] = "0" * 64
    with pytest.raises(AdapterFormatError, match="no digest"):
        DareConfig(**raw)


def test_a_mix_is_refused_with_what_to_do() -> None:
    with pytest.raises(AdapterFormatError, match="load_dare_adapter"):
        DareConfig(mix={"adapters": []})


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"first.weight", "first.bias", "second.weight", "second.bias"}),
        ({"target_modules": ["first"]}, {"first.weight", "first.bias"}),
        ({"target_modules": "fir.*"}, {"first.weight", "first.bias"}),
        ({"target_modules": "all-linear", "train_vectors": False},
         {"first.weight", "second.weight"}),
        ({"exclude_modules": ["first"]}, {"second.weight", "second.bias"}),
        ({"target_modules": ["first"], "modules_to_save": ["second"]},
         {"first.weight", "first.bias", "second.weight", "second.bias"}),
    ],
)  # fmt: skip
def test_a_recipe_trains_what_it_names(options: dict[str, Any], expected: set[str]) -> None:
    model = get_peft_model(Two(), DareConfig(drop_rate=0.5, **options))
    placed = {
        stored.placement.name
        for module in model.modules()
        for stored in getattr(module, "dare_stored", {}).get("default", ())
    }
    assert placed == expected


def test_modules_that_are_not_there_are_refused() -> None:
    with pytest.raises(NoMatchingPeftModuleError, match="third"):
        get_peft_model(Two(), DareConfig(target_modules=["third"]))


def test_the_same_program_seed_draws_the_same_mask() -> None:
    import torch

    seeds = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        config = DareConfig(drop_rate=0.5)
        get_peft_model(Two(), config)
        seeds.append(config.seed)
    assert seeds[0] == seeds[1] != seeds[2]


def test_saving_beside_a_training_config_keeps_the_recipe(tmp_path: Path) -> None:
    model = get_peft_model(Two(), DareConfig(target_modules=["first"], drop_rate=0.5))
    model.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert raw["target_modules"] is None
    assert raw["training"] == {"target_modules": ["first"]}
