"""Packs of adapters for every kind of model, and one engine of each for the whole session."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaForCausalLM,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
)

import dare_adapters
from tests.conftest import Pack, PackMaker
from tests.vllm.engines import Engine
from tests.vllm.models import KINDS, SPREAD, llama, mixtral, qwen2, tied_llama

# The engine in this process: its start is then a matter of seconds after vLLM's own import.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

Packs = Callable[[str], Pack]

MODELS: dict[str, tuple[type[PreTrainedModel], Callable[[], Any], torch.dtype]] = {
    "llama": (LlamaForCausalLM, llama, torch.float32),
    # Loaded as float32: the sums are rounded to the checkpoint's dtype.
    "tied-llama-bf16": (LlamaForCausalLM, tied_llama, torch.bfloat16),
    "qwen2": (Qwen2ForCausalLM, qwen2, torch.float32),
    "mixtral": (MixtralForCausalLM, mixtral, torch.float32),
}


@pytest.fixture(scope="session")
def packs(make_pack: PackMaker) -> Packs:
    """A base and three adapters of fine-tunes that changed every parameter, by kind of model."""

    def pack(name: str) -> Pack:
        model_class, config, dtype = MODELS[name]
        return make_pack(
            f"vllm-{name}", model_class, config(), dtype=dtype, kinds=KINDS, spread=SPREAD
        )

    return pack


@pytest.fixture(scope="session")
def pack(packs: Packs) -> Pack:
    """That of the Llama with a head of its own."""
    return packs("llama")


@pytest.fixture(scope="session")
def start_engine() -> Iterator[Callable[..., Engine]]:
    """Starts engines; those that are asked for again with the same settings are the same one."""
    import dare_vllm

    dare_vllm.register()
    running: dict[str, Engine] = {}

    def start(base: Path, **settings: Any) -> Engine:
        key = repr((str(base), sorted(settings.items())))
        if key not in running:
            for other in list(running):
                running.pop(other).close()  # one at a time is in memory
            running[key] = Engine(base, **settings)
        return running[key]

    yield start
    for engine in running.values():
        engine.close()


def merged(pack: Pack, parts: dict[str, float], **how: Any) -> PreTrainedModel:
    """A transformers model in float32 that holds the merged weights, made on the live base."""
    model = pack.live()
    for name in parts:
        model.load_dare_adapter(pack.adapters[name], adapter_name=name, activate=False)
    model.add_weighted_adapter(list(parts), list(parts.values()), "mixture", **how)
    model.set_dare_adapter("mixture")
    model.merge_dare_adapters()
    return model.float()


def exported(pack: Pack, name: str, out: Path) -> Path:
    """The full checkpoint of base and one adapter."""
    return dare_adapters.export(pack.base, pack.adapters[name], out, progress=False)


def save_lora(pack: Pack, out: Path) -> Path:
    """A LoRA of two kinds of layers of the pack's base, as PEFT saves it."""
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    torch.manual_seed(3)
    model = peft.get_peft_model(pack.live(torch.float32), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(out)
    return out
