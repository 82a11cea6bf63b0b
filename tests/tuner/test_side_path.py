"""Few tokens through a large layer: products are taken from the packed form, not from a copy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from dare_adapters import DareConfig
from dare_adapters.tuner.side_path import better_adds

LAYERS = {
    "linear": lambda: nn.Linear(640, 512),
    "transposed": lambda: Conv1D(512, 640),
    "embedding": lambda: nn.Embedding(640, 512),
}


def made(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(LAYERS[kind]())


def inputs(kind: str, tokens: int) -> torch.Tensor:
    return torch.arange(tokens) % 640 if kind == "embedding" else torch.randn(tokens, 640)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("bits", [None, 4, 1])
@pytest.mark.parametrize("mask", ["blocked", "bernoulli"])
def test_few_tokens_answer_as_the_merged_layer(
    kind: str, bits: int | None, mask: str, tmp_path: Path
) -> None:
    recipe = DareConfig(drop_rate=0.9, init_weights=False, bits=bits, mask=mask)
    get_peft_model(made(kind), recipe).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(made(kind), tmp_path)
    model.load_adapter(tmp_path, "twice")
    layer, few, many = model.get_base_model()[0], inputs(kind, 5), inputs(kind, 600)
    for active in (["default"], ["default", "twice"]):
        model.base_model.set_adapter(active, inference_mode=True)
        with torch.no_grad():
            assert better_adds(layer, active, (few,))
            assert better_adds(layer, active, (many,)) == (kind == "embedding")
            found = [model(few), model(many)]
            model.merge_adapter()
            merged = [model(few), model(many)]
            model.unmerge_adapter()
        for one, other in zip(found, merged, strict=True):
            assert torch.allclose(one, other, atol=1e-4)


def test_a_large_embedding_looks_up_the_bits_of_the_merged_one() -> None:
    model = get_peft_model(made("embedding"), DareConfig(drop_rate=0.9, init_weights=False))
    with torch.no_grad():
        found = model(inputs("embedding", 700))
        assert torch.equal(found, model.merge_and_unload()(inputs("embedding", 700)))
