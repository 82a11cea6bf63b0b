"""PEFT's and transformers' loaders refuse another base, as `load_dare_adapter` does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig, PreTrainedModel

from dare_adapters import DareConfig
from dare_adapters.config import AdapterConfig
from dare_adapters.errors import AdapterFormatError, BaseMismatchError, PatchedStateWarning
from tests.conftest import Pack, PackMaker, all_bytes
from tests.tuner.architectures import ARCHITECTURES, logits

LLAMA = ARCHITECTURES["llama"]


@pytest.fixture
def pack(make_pack: PackMaker) -> Pack:
    return LLAMA.pack(make_pack, "llama")


@pytest.fixture
def other(pack: Pack) -> PreTrainedModel:
    """Of the base's class and sizes; one matrix, which no test looks at, was trained on."""
    model = pack.live()
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight.mul_(1.01)
    return model


def by_peft(model: PreTrainedModel, path: Path) -> nn.Module:
    return PeftModel.from_pretrained(model, path)


def by_peft_without_memory(model: PreTrainedModel, path: Path) -> nn.Module:
    return PeftModel.from_pretrained(model, path, low_cpu_mem_usage=True)


def by_transformers(model: PreTrainedModel, path: Path) -> nn.Module:
    model.load_adapter(str(path), adapter_name="math")
    return model


ROUTES = [by_peft, by_peft_without_memory, by_transformers]


@pytest.mark.parametrize("route", ROUTES)
def test_another_base_of_the_same_shapes_is_refused_and_left_as_it_was(
    route: Callable[[PreTrainedModel, Path], nn.Module], pack: Pack, other: PreTrainedModel
) -> None:
    before, modules = all_bytes(other), [type(module) for module in other.modules()]
    with pytest.raises(BaseMismatchError, match=r"not the base of adapter .*down_proj.*check_base"):
        route(other, pack.adapters["a"])
    assert all_bytes(other) == before
    assert [type(module) for module in other.modules()] == modules


def test_a_base_named_by_the_adapter_that_is_another_by_now_is_refused(
    pack: Pack, other: PreTrainedModel, tmp_path: Path
) -> None:
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    other.save_pretrained(base)
    PeftModel.from_pretrained(pack.live(), pack.adapters["a"]).save_pretrained(adapter)
    config = DareConfig.from_pretrained(adapter)
    with pytest.raises(BaseMismatchError, match="down_proj"):
        PeftModel.from_pretrained(pack.model_class.from_pretrained(base), adapter, config=config)


def test_check_base_false_loads_over_it(pack: Pack, other: PreTrainedModel) -> None:
    path = pack.adapters["a"]
    found = logits(PeftModel.from_pretrained(other, path, check_base=False), LLAMA.inputs())
    model = pack.live()
    model.load_state_dict(
        {
            name: one * 1.01 if name.endswith("layers.1.mlp.down_proj.weight") else one
            for name, one in model.state_dict().items()
        }
    )
    model.load_dare_adapter(path, check_base=False)
    assert torch.equal(found, logits(model, LLAMA.inputs()))


def test_transformers_takes_a_config_that_does_not_check(
    pack: Pack, other: PreTrainedModel
) -> None:
    config = DareConfig.from_pretrained(pack.adapters["a"], check_base=False)
    other.load_adapter(str(pack.adapters["a"]), adapter_name="math", peft_config=config)
    assert other.active_adapters() == ["math"]


def test_a_file_cannot_turn_its_check_off(
    pack: Pack, other: PreTrainedModel, tmp_path: Path
) -> None:
    for file in pack.adapters["a"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "check_base": False}))
    with pytest.raises(BaseMismatchError):
        PeftModel.from_pretrained(other, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_base_in_another_dtype_is_the_base(pack: Pack, dtype: torch.dtype) -> None:
    model = PeftModel.from_pretrained(pack.live(dtype), pack.adapters["a"])
    assert model.active_adapters == ["default"]


def test_the_base_is_known_under_what_is_merged_or_patched(pack: Pack) -> None:
    model = PeftModel.from_pretrained(pack.live(), pack.adapters["a"])
    model.merge_adapter()
    model.load_adapter(pack.adapters["b"], "b")
    patched = pack.live()
    patched.load_dare_adapter(pack.adapters["a"], "a")
    answers = logits(patched, LLAMA.inputs())
    with pytest.warns(PatchedStateWarning):  # transformers looks at the state dict
        patched.load_adapter(str(pack.adapters["b"]), adapter_name="b")
    patched.disable_adapters()
    assert torch.equal(logits(patched, LLAMA.inputs()), answers)


def test_the_base_is_known_under_a_merged_lora(pack: Pack) -> None:
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(pack.live(), config)
    model.merge_adapter()
    PeftModel.from_pretrained(model, pack.adapters["a"])


def test_a_lora_merged_for_good_makes_another_base(pack: Pack) -> None:
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(pack.live(), config).merge_and_unload()
    with pytest.raises(BaseMismatchError, match="q_proj"):
        PeftModel.from_pretrained(model, pack.adapters["a"])


def test_a_trained_head_goes_on_a_base_whose_own_head_is_random(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=48, num_labels=3,
    )  # fmt: skip
    AutoModelForSequenceClassification.from_config(config).bert.save_pretrained(tmp_path / "base")

    def base() -> PreTrainedModel:
        return AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)

    recipe = DareConfig(task_type="SEQ_CLS", drop_rate=0.9, init_weights=False)
    model = get_peft_model(base(), recipe).eval()
    model.save_pretrained(tmp_path / "adapter")
    other = base()
    tokens = torch.arange(8).view(1, -1)
    assert not torch.equal(model(tokens).logits, other.eval()(tokens).logits)
    loaded = PeftModel.from_pretrained(other, tmp_path / "adapter").eval()
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    patched = base().eval()
    patched.load_dare_adapter(tmp_path / "adapter")
    assert torch.equal(patched(tokens).logits, model(tokens).logits)


def test_a_damaged_witness_is_named(pack: Pack, tmp_path: Path) -> None:
    config = AdapterConfig.load(pack.adapters["a"])
    name = next(iter(config.witness))
    config.witness[name] = "BF16:64:!!"
    weights = load_file(pack.adapters["a"] / "adapter_model.safetensors")
    save_file(weights, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    config.save(tmp_path)
    with pytest.raises(AdapterFormatError, match=name):
        PeftModel.from_pretrained(pack.live(), tmp_path)
