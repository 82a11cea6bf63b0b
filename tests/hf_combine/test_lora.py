"""LoRA adapters on a live model, and combined with DARE adapters."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch

import dare_adapters
from dare_adapters.adapter import Adapter
from dare_adapters.combine.registry import get_method
from tests.combine.test_api import METHODS, dense
from tests.conftest import Pack, all_bytes, read_checkpoint
from tests.hf_combine.combined_models import Tensors, assert_near


@pytest.fixture
def lora(pack: Pack, tmp_path: Path) -> tuple[Path, Tensors]:
    """A LoRA that PEFT saved, and the weights that PEFT makes of it."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    tuned = peft.get_peft_model(pack.live(), config)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.05)
    tuned.save_pretrained(tmp_path / "lora")
    merged = tuned.merge_and_unload()
    return tmp_path / "lora", {n: p.detach().clone() for n, p in merged.named_parameters()}


def test_a_loras_directory_loads_like_an_adapter(pack: Pack, lora: tuple[Path, Tensors]):
    path, merged = lora
    model = pack.live()
    before = all_bytes(model)
    assert model.load_dare_adapter(path) == "lora"
    assert_near(model, merged)
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all_bytes(duplicate) == all_bytes(model)
        duplicate.disable_dare_adapters()
        assert all_bytes(duplicate) == before
    model.disable_dare_adapters()
    assert all_bytes(model) == before


@pytest.mark.parametrize("kind", ["linear", "ties", "slerp", "karcher"])
@pytest.mark.parametrize("order", ["dare first", "lora first"])
def test_a_lora_and_an_adapter_are_combined(
    pack: Pack, lora: tuple[Path, Tensors], tmp_path: Path, kind: str, order: str
):
    path, merged = lora
    base = read_checkpoint(pack.base)
    own = [
        dense(Adapter.open(pack.adapters["b"])),
        {name: value - base[name] for name, value in merged.items()},
    ]
    model, names = pack.live(), ["dare", "lora"]
    before = all_bytes(model)
    model.load_dare_adapter(pack.adapters["b"], "dare", activate=False)
    model.load_dare_adapter(path, activate=False)
    if order == "lora first":
        own, names = own[::-1], names[::-1]
    method, options = get_method(kind), METHODS[kind]
    expected = {}
    for name, start in base.items():
        deltas = [part[name] for part in own]
        if method.on_parameters:
            expected[name] = method.function([start + d for d in deltas], [1, 1], **options)
        else:
            values = [dare_adapters.delta.DenseDelta(delta) for delta in deltas]
            expected[name] = start + method.function(values, [1, 1], **options).dense()
    model.add_weighted_adapter(names, [1, 1], "m", combination_type=kind, **options)
    model.set_dare_adapter("m")
    for name, value in expected.items():
        near = (model.get_parameter(name) - value).abs() <= 1e-6
        assert float(near.float().mean()) > 0.999, name  # but for draws in an election
    model.save_dare_adapter(tmp_path / "saved", "m")
    again = pack.live()
    again.load_dare_adapter(tmp_path / "saved")
    for name, parameter in model.named_parameters():
        error = (again.get_parameter(name) - parameter).norm()
        assert error.item() <= 0.005 * (parameter - base[name]).norm().item() + 1e-6
    model.disable_dare_adapters()
    assert all_bytes(model) == before
