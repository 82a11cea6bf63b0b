"""Layers whose weights others read, share, or hold without children of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from dare_adapters import DareConfig
from dare_adapters.tuner.lazy_weight import lazy_weight
from tests.conftest import PackMaker
from tests.tuner.architectures import ARCHITECTURES


def recipe(**more: object) -> DareConfig:
    return DareConfig(drop_rate=0.5, init_weights=False, seed=1, **more)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.mha(x, x, x)[0]
        return found


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.encoder(x)
        return found


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(16)) for _ in range(2)])
        self.linear = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.token.expand(len(x), 1, 16), x], dim=1)
        found: torch.Tensor = self.linear(x * self.scales[0]) * self.scales[1]
        return found


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.embed((x.abs() * 20).long().clamp(max=39))[..., 0, :])
        return found


@pytest.mark.parametrize("kind", [Attention, Encoder, Bare, Tied])
@pytest.mark.parametrize("grad", [False, True])
def test_unmerged_is_merged(kind: type[nn.Module], grad: bool) -> None:
    torch.manual_seed(0)
    model = get_peft_model(kind().eval(), recipe()).eval()
    x = torch.randn(2, 3, 16)
    with torch.set_grad_enabled(grad):
        unmerged = model(x)
        model.merge_adapter()
        merged = model(x)
        model.unmerge_adapter()
        with model.disable_adapter():
            base = model(x)
    assert torch.allclose(unmerged, merged, atol=1e-6)
    assert not torch.allclose(unmerged, base, atol=1e-3)


@pytest.mark.parametrize("kind", [Attention, Encoder, Bare, Tied])
def test_every_trained_tensor_has_a_gradient(kind: type[nn.Module]) -> None:
    model = get_peft_model(kind(), recipe())
    model(torch.randn(2, 3, 16)).square().sum().backward()
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    own = [name for name, p in model.named_parameters() if p.requires_grad and ".dare_" not in name]
    assert not own, "of the base nothing trains"
    assert all(".dare_" in name and p.grad is not None for name, p in trained)


@pytest.mark.parametrize("kind", [Attention, Encoder, Bare, Tied])
def test_saved_and_loaded_is_the_same(kind: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = kind().eval(), torch.randn(2, 3, 16)
    copy = kind().eval()
    copy.load_state_dict(base.state_dict())
    model = get_peft_model(base, recipe()).eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(PeftModel.from_pretrained(copy, tmp_path)(x), model(x))
    unloaded = model.unload()
    assert not any("dare" in name for name, _ in unloaded.named_modules())


def test_a_tied_weight_is_stored_and_merged_once() -> None:
    model = get_peft_model(Tied(), recipe())
    assert [name for name, _ in model.named_parameters() if "dare_" in name] == [
        "base_model.model.embed.dare_weight_values.default"
    ]
    model.merge_adapter()
    inner = model.get_base_model()
    assert inner.embed.base_layer.weight is inner.head.base_layer.weight


def test_a_lazy_weight_is_computed_only_to_compute_with() -> None:
    base, made = torch.zeros(3, 3), []

    def compute() -> torch.Tensor:
        made.append(1)
        return torch.eye(3)

    lazy = lazy_weight(base, compute)
    assert lazy.dtype == torch.float32
    assert lazy.shape == (3, 3)
    assert lazy.device.type == "cpu"
    assert not made
    assert torch.equal(nn.functional.linear(torch.ones(1, 3), lazy), torch.ones(1, 3))
    assert torch.equal(lazy + 1, torch.eye(3) + 1)
    assert len(made) == 2


def test_models_that_ask_for_a_dtype_do_not_compute_the_weight(make_pack: PackMaker) -> None:
    architecture = ARCHITECTURES["t5"]
    pack = architecture.pack(make_pack, "t5")
    model = PeftModel.from_pretrained(pack.live(), pack.adapters["a"])
    wo = model.get_base_model().encoder.block[0].layer[1].DenseReluDense.wo
    assert wo.weight.dtype == torch.float32
    assert torch.equal(wo.weight + 0, wo.effective_of("weight", ["default"]))


def test_casting_the_model_leaves_codes_and_scales_as_they_are(make_pack: PackMaker) -> None:
    pack = ARCHITECTURES["llama"].pack(make_pack, "llama")
    model = PeftModel.from_pretrained(pack.live(), pack.adapters["a"])
    before = {n: b.clone() for n, b in model.named_buffers() if ".dare_" in n}
    model.half()
    after = dict(model.named_buffers())
    assert before
    for name, buffer in before.items():
        assert after[name].dtype == buffer.dtype
        assert torch.equal(after[name], buffer)


def test_offloaded_weights_are_refused_by_name() -> None:
    from dare_adapters.errors import UnsupportedParameterError

    model = get_peft_model(nn.Sequential(nn.Linear(16, 16)), recipe())
    model.base_model.model[0].base_layer.to("meta")
    with pytest.raises(UnsupportedParameterError, match="weight of Linear"):
        model(torch.randn(1, 16))
