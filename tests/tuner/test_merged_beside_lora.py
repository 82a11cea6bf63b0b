"""LoRA and DARE merged into one weight, and taken out again in every order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from dare_adapters import DareConfig
from dare_adapters.tuner.layer import DareLayer

NESTINGS = ("lora outside", "dare outside")


def plain(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 24), nn.Linear(24, 8)).to(dtype)


def configs() -> dict[str, Any]:
    return {
        "lora": LoraConfig(target_modules=["0"], init_lora_weights=False, lora_alpha=64),
        "dare": DareConfig(drop_rate=0.5, init_weights=False, seed=1, target_modules=["0"]),
    }


def both(nesting: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A model in a model; the outer one's layers are around the inner one's."""
    outside = nesting.split(maxsplit=1)[0]
    inside = "dare" if outside == "lora" else "lora"
    model = plain(dtype)
    for method in (inside, outside):
        torch.manual_seed(1 if method == "lora" else 2)
        model = get_peft_model(model, configs()[method], method)
    return model.eval()


def layer(model: nn.Module, method: str) -> Any:
    kind = LoraLayer if method == "lora" else DareLayer
    return next(one for one in model.modules() if isinstance(one, kind))


def weight(model: nn.Module) -> torch.Tensor:
    return layer(model, "dare").owner.weight.detach().clone()


def do(model: nn.Module, *steps: str) -> torch.Tensor:
    """Merge and unmerge ("-") methods, one after the other; the weight that is left."""
    for step in steps:
        if step.startswith("-"):
            layer(model, step[1:]).unmerge()
        else:
            layer(model, step).merge()
    return weight(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("nesting", NESTINGS)
def test_dare_leaves_as_though_it_had_never_been_merged(nesting: str, dtype: torch.dtype) -> None:
    base = do(both(nesting, dtype))
    with_lora = do(both(nesting, dtype), "lora")
    there_and_back = do(both(nesting, dtype), "lora", "-lora")
    assert not torch.equal(with_lora, base)
    for order, expected in (
        (("dare", "-dare"), base),
        (("lora", "dare", "-dare"), with_lora),
        (("dare", "lora", "-dare"), with_lora),
        (("lora", "dare", "-lora", "-dare"), there_and_back),
        (("lora", "dare", "-dare", "-lora"), there_and_back),
        (("dare", "lora", "-dare", "-lora"), there_and_back),
    ):
        model = both(nesting, dtype)
        assert torch.equal(do(model, *order), expected), order
        assert layer(model, "dare").merged is False
        assert layer(model, "lora").merged is ("-lora" not in order and "lora" in order), order


@settings(max_examples=40, deadline=None)
@given(
    nesting=st.sampled_from(NESTINGS),
    steps=st.lists(st.sampled_from(["lora", "dare"]), min_size=1, max_size=8),
)
def test_any_sequence_ends_near_what_is_merged_at_the_end(nesting: str, steps: list[str]) -> None:
    """To the rounding of LoRA's own merges: a step merges what is not, and unmerges what is."""
    model = both(nesting, torch.float32)
    for method in steps:
        do(model, f"-{method}" if layer(model, method).merged else method)
    merged = [method for method in ("lora", "dare") if layer(model, method).merged]
    expected = do(both(nesting, torch.float32), *merged)
    assert torch.allclose(weight(model), expected, atol=1e-5)


@pytest.mark.parametrize("nesting", NESTINGS)
def test_models_merge_and_unmerge_all_their_layers_in_peft_s_order(nesting: str) -> None:
    x = torch.randn(3, 32)
    model = both(nesting, torch.float32)
    before, unmerged = weight(model), model(x)
    for _ in range(3):
        model.merge_adapter()
        assert {len(layer(model, method).merged_adapters) for method in ("lora", "dare")} == {1}
        assert torch.allclose(model(x), unmerged, atol=1e-4)
        model.unmerge_adapter()
        assert torch.allclose(weight(model), before, atol=1e-5)
        assert torch.allclose(model(x), unmerged, atol=1e-4)


@pytest.mark.parametrize("nesting", NESTINGS)
def test_a_second_adapter_is_merged_whatever_was_merged_between(nesting: str) -> None:
    model = both(nesting, torch.float32)
    tuned = layer(model, "dare")
    tuner = model.base_model if nesting == "dare outside" else model.base_model.model.base_model
    tuner.peft_config["more"] = DareConfig(
        drop_rate=0.5, init_weights=False, seed=2, target_modules=["0"]
    )
    tuner.inject_adapter(tuner.model, "more")
    tuned.merge(adapter_names=["dare"])
    layer(model, "lora").merge()
    with pytest.warns(UserWarning, match="additionally merging"):
        tuned.merge(adapter_names=["more"])
    found = weight(model)
    do(model, "-lora", "-dare")
    tuned.merge(adapter_names=["dare", "more"])
    expected = do(model, "lora")
    assert torch.allclose(found, expected, atol=1e-5)
