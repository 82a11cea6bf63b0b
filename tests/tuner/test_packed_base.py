"""Over weights that are packed: deltas are added to the output, and merging is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from dare_adapters import DareConfig
from dare_adapters.errors import UnsupportedParameterError


class Int8Weight(torch.Tensor):
    """As torchao has them: a tensor that is no plain one, which `linear` knows how to use."""

    codes: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor) -> Int8Weight:
        made = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)
        made.codes, made.scale = codes, scale
        return made

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is nn.functional.linear:
            x, weight, bias = (*args, None)[:3]
            return nn.functional.linear(x, weight.codes.float() * weight.scale, bias)
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten.detach.default:
            return Int8Weight(args[0].codes, args[0].scale)
        raise NotImplementedError(str(function))


class Linear4bit(nn.Linear):
    """As bitsandbytes has them: flat bytes for a weight, and a forward of its own."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features)
        self.kept = [plain.weight.detach()]
        flat = torch.zeros(plain.weight.numel() // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(flat, requires_grad=False)
        self.bias = plain.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.kept[0], self.bias)


def int8(plain: nn.Linear) -> nn.Linear:
    scale = plain.weight.detach().abs().amax() / 127
    codes = (plain.weight.detach() / scale).round().to(torch.int8)
    made = nn.Linear(plain.in_features, plain.out_features)
    made.bias = plain.bias
    made.weight = nn.Parameter(Int8Weight(codes, scale), requires_grad=False)
    return made


def plain() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(40, 24)


KINDS = {"torchao": int8, "bitsandbytes": Linear4bit}


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
    x, packed = torch.randn(3, 5, 40), kind(plain())
    change = nn.functional.linear(x, weight - plain().weight, bias - plain().bias)
    model = PeftModel.from_pretrained(nn.Sequential(packed), tmp_path)
    with torch.no_grad():
        assert torch.allclose(model(x), packed(x) + change, atol=1e-5)
        assert torch.allclose(model(x), model(x, adapter_names=["default"] * 3), atol=1e-5)
    assert torch.allclose(model(x), packed(x) + change, atol=1e-5)


def test_values_train_over_a_packed_weight(kind: Any) -> None:
    model = get_peft_model(nn.Sequential(kind(plain())), DareConfig(drop_rate=0.5))
    x, y = torch.randn(16, 40), torch.randn(16, 24)
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
