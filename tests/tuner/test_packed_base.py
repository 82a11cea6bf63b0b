"""Over weights that are packed: deltas are added to the output, and merging is refused.

Real layers of torchao and bitsandbytes, on the CPU; those of a package that is absent are skipped.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from dare_adapters import DareConfig
from dare_adapters.errors import UnsupportedParameterError
from tests.conftest import PackMaker
from tests.tuner.architectures import ARCHITECTURES, logits

Packing = Callable[[nn.Linear], nn.Module]
WIDE, NARROW = 128, 64


def of_torchao(config: str, **options: Any) -> Packing:
    """A linear layer with its weight as a tensor of torchao's."""

    def pack(layer: nn.Linear) -> nn.Module:
        quantization = pytest.importorskip("torchao.quantization", reason="torchao is absent")
        model = nn.Sequential(copy.deepcopy(layer))
        quantization.quantize_(model, getattr(quantization, config)(**options))
        return model[0]

    return pack


def of_bitsandbytes(kind: str, **options: Any) -> Packing:
    """A layer of bitsandbytes' own, quantised when it comes to the device."""

    def pack(layer: nn.Linear) -> nn.Module:
        layers = pytest.importorskip("bitsandbytes", reason="bitsandbytes is absent").nn
        made: nn.Module = getattr(layers, kind)(layer.in_features, layer.out_features, **options)
        made.load_state_dict(layer.state_dict())
        return made.to("cpu")

    return pack


def plain() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(WIDE, NARROW)


KINDS: dict[str, Packing] = {
    "torchao int8": of_torchao("Int8WeightOnlyConfig"),
    "torchao int8, activations too": of_torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao int4": of_torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4),
    "bitsandbytes int8": of_bitsandbytes("Linear8bitLt", has_fp16_weights=False),
    "bitsandbytes nf4": of_bitsandbytes(
        "Linear4bit", quant_type="nf4", compute_dtype=torch.float32
    ),
    "bitsandbytes fp4": of_bitsandbytes(
        "Linear4bit", quant_type="fp4", compute_dtype=torch.float32
    ),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]


@pytest.mark.parametrize("bits", [None, 4])
def test_the_output_is_the_bases_and_that_of_the_dense_delta(
    kind: Any, bits: int | None, tmp_path: Path
) -> None:
    recipe = DareConfig(drop_rate=0.75, init_weights=False, bits=bits)
    trained = get_peft_model(nn.Sequential(plain()), recipe)
    trained.save_pretrained(tmp_path)
    trained = PeftModel.from_pretrained(nn.Sequential(plain()), tmp_path)
    layer = trained.get_base_model()[0]
    weight, bias = (layer.effective_of(n, ["default"]) for n in ("weight", "bias"))
    x, packed = torch.randn(3, 5, WIDE), kind(plain())
    change = nn.functional.linear(x, weight - plain().weight, bias - plain().bias)
    model = PeftModel.from_pretrained(nn.Sequential(packed), tmp_path)
    with torch.no_grad():
        assert torch.allclose(model(x), packed(x) + change, atol=1e-5)
        assert torch.allclose(model(x), model(x, adapter_names=["default"] * 3), atol=1e-5)
    assert torch.allclose(model(x), packed(x) + change, atol=1e-5)


def test_values_train_over_a_packed_weight(kind: Any) -> None:
    model = get_peft_model(nn.Sequential(kind(plain())), DareConfig(drop_rate=0.5))
    x, y = torch.randn(16, WIDE), torch.randn(16, NARROW)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(5):
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_merging_into_a_packed_weight_is_refused_with_the_reason(kind: Any) -> None:
    model = get_peft_model(nn.Sequential(kind(plain())), DareConfig(drop_rate=0.5))
    with pytest.raises(UnsupportedParameterError, match=r"weight cannot be patched: it"):
        model.merge_adapter()


def test_a_whole_model_answers_as_its_dequantised_weights_with_the_deltas(
    make_pack: PackMaker,
) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is absent")
    architecture = ARCHITECTURES["llama"]
    pack = architecture.pack(make_pack, "llama")
    inputs = architecture.inputs()
    packed, reference, rows = pack.live(), {}, ["a", "__base__", "b"]
    quantization.quantize_(packed, quantization.Int8WeightOnlyConfig())
    linear = [name for name, one in packed.named_modules() if isinstance(one, nn.Linear)]
    assert linear
    base = dict(pack.live().named_parameters())
    for adapter in ("a", "b"):
        model = pack.live()
        model.load_dare_adapter(pack.adapters[adapter])
        model.merge_dare_adapters()
        with torch.no_grad():
            for name in linear:
                own = model.get_submodule(name).weight
                own += packed.get_submodule(name).weight.dequantize() - base[f"{name}.weight"]
        reference[adapter] = logits(model, inputs)
    reference["__base__"] = logits(packed, inputs)
    tuned = PeftModel.from_pretrained(packed, pack.adapters["a"], adapter_name="a")
    tuned.load_adapter(pack.adapters["b"], "b")
    for adapter in ("a", "b"):
        tuned.set_adapter(adapter)
        assert torch.allclose(logits(tuned, inputs), reference[adapter], atol=1e-4)
    found = logits(tuned, {**inputs, "adapter_names": rows})
    expected = torch.stack([reference[name][row] for row, name in enumerate(rows)])
    assert torch.allclose(found, expected, atol=1e-4)
    assert (reference["a"] - reference["__base__"]).abs().max() > 1e-2


def test_patching_a_packed_model_in_place_is_refused_by_name(make_pack: PackMaker) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is absent")
    pack = ARCHITECTURES["llama"].pack(make_pack, "llama")
    model = pack.live()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    before = logits(model, ARCHITECTURES["llama"].inputs())
    with pytest.raises(
        UnsupportedParameterError, match=r"lm_head\.weight cannot be patched: it is a Int8"
    ):
        model.load_dare_adapter(pack.adapters["a"])
    assert torch.equal(logits(model, ARCHITECTURES["llama"].inputs()), before)
