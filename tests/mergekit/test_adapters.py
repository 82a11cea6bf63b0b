"""Models of a recipe that are no checkpoints: `model+lora` as mergekit has it, and our adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import dare_adapters
from tests.conftest import read_checkpoint
from tests.mergekit.models import NEAR_AND_FAR, llama, save_family
from tests.mergekit.test_methods import FLOAT32, assert_same

pytestmark = pytest.mark.mergekit

KINDS = {
    "dropped": {"drop_rate": 0.5, "bits": 8},
    "bernoulli": {"drop_rate": 0.3, "bits": 32, "mask": "bernoulli"},  # no two magnitudes equal
    "rounded": {"drop_rate": 0.9, "bits": 4},
}
LORAS = {
    "narrow": {"r": 2, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "wide": {"r": 8, "lora_alpha": 4, "use_rslora": True, "target_modules": "all-linear"},
    "whole_embedding": {"r": 4, "target_modules": ["up_proj"], "modules_to_save": ["lm_head"]},
    "embedding": {"r": 4, "target_modules": ["embed_tokens", "o_proj"]},
}
WITH_LORAS = {
    "lora_linear": """
merge_method: linear
models:
- {model: $a+$narrow, parameters: {weight: 0.7}}
- {model: $b, parameters: {weight: 0.4}}
""",
    "lora_task_arithmetic": """
merge_method: task_arithmetic
base_model: $base
models:
- {model: $base+$narrow, parameters: {weight: 0.7}}
- {model: $base+$wide, parameters: {weight: [0.2, 0.9]}}
- {model: $base+$embedding, parameters: {weight: 0.3}}
""",
    "lora_ties": """
merge_method: ties
base_model: $base
models:
- {model: $a+$wide, parameters: {weight: 0.7, density: 0.5}}
- {model: $base+$whole_embedding, parameters: {weight: 1, density: 0.8}}
""",
    "lora_slerp": """
merge_method: slerp
base_model: $base
models: [{model: $a+$whole_embedding}]
parameters: {t: 0.3}
""",
    "lora_model_stock": """
merge_method: model_stock
base_model: $base
models: [{model: $base+$wide}, {model: $a+$narrow}]
""",
    "lora_stacked": """
merge_method: passthrough
slices:
- sources: [{model: $base+$wide, layer_range: [0, 3]}]
- sources: [{model: $a+$narrow, layer_range: [2, 4]}]
""",
    "lora_as_the_base": """
merge_method: task_arithmetic
base_model: $base+$narrow
models: [{model: $a, parameters: {weight: 0.5}}]
""",
}
WITH_ADAPTERS = {
    "adapters_linear": """
merge_method: linear
base_model: $base
models:
- {model: $base, parameters: {weight: 0.1}}
- {model: $dropped, parameters: {weight: 0.7}}
- {model: $rounded, parameters: {weight: 0.4}}
""",
    "adapters_task_arithmetic": """
merge_method: task_arithmetic
base_model: $base
models:
- {model: $dropped, parameters: {weight: 0.7}}
- {model: $bernoulli, parameters: {weight: [0.2, 0.9]}}
- {model: $c, parameters: {weight: 0.3}}
""",
    "adapters_ties": """
merge_method: ties
base_model: $base
models:
- {model: $bernoulli, parameters: {weight: 0.7, density: 0.6}}
- {model: $a, parameters: {weight: 0.5, density: 0.3}}
""",
    "adapters_sce": """
merge_method: sce
base_model: $base
models: [{model: $dropped}, {model: $bernoulli}, {model: $c}]
""",
    "adapters_slerp": """
merge_method: slerp
base_model: $base
models: [{model: $bernoulli}]
parameters: {t: [0.1, 0.9]}
""",
    "adapters_model_stock": """
merge_method: model_stock
base_model: $base
models: [{model: $dropped}, {model: $bernoulli}, {model: $rounded}]
""",
    "adapters_stacked": """
merge_method: passthrough
base_model: $base
slices:
- sources: [{model: $dropped, layer_range: [0, 3]}]
- sources: [{model: $base, layer_range: [1, 2]}]
- sources: [{model: $rounded, layer_range: [2, 4]}]
""",
}
Paths = dict[str, Path]


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> Paths:
    root = tmp_path_factory.mktemp("adapters")
    paths = save_family(root, "", llama(), {name: NEAR_AND_FAR[name] for name in "abc"})
    for seed, (name, settings) in enumerate(LORAS.items()):
        torch.manual_seed(seed)
        live = AutoModelForCausalLM.from_pretrained(paths["base"])
        model = get_peft_model(live, LoraConfig(init_lora_weights=False, **settings))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "modules_to_save" in key:
                    parameter.add_(0.02 * torch.randn(parameter.shape))
        paths[name] = root / f"lora-{name}"
        model.save_pretrained(paths[name])
    return paths


@pytest.fixture(scope="module")
def with_adapters(family, tmp_path_factory) -> tuple[Paths, Paths]:
    """The models with adapters of the fine-tunes among them, and with their exports instead."""
    root = tmp_path_factory.mktemp("exported")
    adapters, exported = dict(family), dict(family)
    for finetune, (name, settings) in zip("abc", KINDS.items(), strict=True):
        adapters[name], exported[name] = root / f"adapter-{name}", root / f"export-{name}"
        dare_adapters.extract(
            family["base"],
            family[finetune],
            adapters[name],
            on_large_delta="ignore",
            progress=False,
            **settings,
        )
        dare_adapters.export(family["base"], adapters[name], exported[name], progress=False)
    return adapters, exported


@pytest.fixture(scope="module")
def lora_files(family, write_recipes) -> Paths:
    return write_recipes(WITH_LORAS, family)


@pytest.fixture(scope="module")
def adapter_files(with_adapters, write_recipes) -> tuple[Paths, Paths]:
    adapters, exported = with_adapters
    return write_recipes(WITH_ADAPTERS, adapters), write_recipes(WITH_ADAPTERS, exported)


@pytest.fixture(scope="module")
def theirs(mergekit, lora_files, adapter_files, tmp_path_factory) -> Paths:
    cache = str(tmp_path_factory.mktemp("merged-loras"))
    return mergekit.merge({**lora_files, **adapter_files[1]}, lora_merge_cache=cache)


@pytest.mark.parametrize("name", WITH_LORAS)
def test_a_model_with_a_lora_is_merged_as_mergekit_merges_it(name, lora_files, theirs, tmp_path):
    out = dare_adapters.merge(lora_files[name], tmp_path / "out", progress=False)
    assert_same(read_checkpoint(out), read_checkpoint(theirs[name]), FLOAT32)


@pytest.mark.parametrize("name", WITH_ADAPTERS)
def test_an_adapter_gives_what_mergekit_makes_of_its_export(name, adapter_files, theirs, tmp_path):
    out = dare_adapters.merge(adapter_files[0][name], tmp_path / "out", progress=False)
    assert_same(read_checkpoint(out), read_checkpoint(theirs[name]), FLOAT32)


@pytest.mark.parametrize("name", WITH_ADAPTERS)
def test_an_adapter_gives_what_its_export_gives(name, adapter_files, tmp_path):
    found, expected = (
        read_checkpoint(dare_adapters.merge(files[name], tmp_path / str(number), progress=False))
        for number, files in enumerate(adapter_files)
    )
    assert_same(found, expected, FLOAT32)
