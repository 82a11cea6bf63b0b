"""Tiny models of every kind of layer that a fine-tune changes, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from tests.conftest import Pack, PackMaker, tiny_llama
from tests.test_live import EXPERTS, SMALL, bert_config, mixtral_config


def ids(rows: int = 3) -> torch.Tensor:
    """Token ids (rows, 5), none of them special."""
    return torch.arange(rows * 5).view(rows, 5) * 7 % 40 + 3


def pixels(size: int) -> torch.Tensor:
    """Images (3, 3, size, size)."""
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Architecture:
    """A model class, its tiny configuration, and what a forward takes."""

    model_class: type[PreTrainedModel]
    config: Callable[[], Any]
    inputs: Callable[[], dict[str, torch.Tensor]]

    def pack(self, make_pack: PackMaker, name: str) -> Pack:
        """A base and adapters of three kinds, every parameter of them changed."""
        return make_pack(
            f"tuner-{name}", self.model_class, self.config(), dtype=torch.float32, spread=0.02
        )


def tokens() -> dict[str, torch.Tensor]:
    return {"input_ids": ids()}


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(LlamaForCausalLM, tiny_llama, tokens),
    "llama tied": Architecture(
        LlamaForCausalLM, lambda: tiny_llama(tie_word_embeddings=True), tokens
    ),
    "gpt2": Architecture(
        GPT2LMHeadModel,
        lambda: GPT2Config(
            vocab_size=50, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
        ),
        tokens,
    ),
    "bert": Architecture(
        BertForSequenceClassification,
        lambda: bert_config(num_labels=3),
        tokens,
    ),
    "t5": Architecture(
        T5ForConditionalGeneration,
        lambda: T5Config(
            vocab_size=50,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        ),
        lambda: {"input_ids": ids(), "decoder_input_ids": ids()},
    ),
    "vit": Architecture(
        ViTForImageClassification,
        lambda: ViTConfig(image_size=16, patch_size=4, num_labels=3, intermediate_size=48, **SMALL),
        lambda: {"pixel_values": pixels(16)},
    ),
    "mixtral": Architecture(MixtralForCausalLM, mixtral_config, tokens),
    "qwen3 moe": Architecture(
        Qwen3MoeForCausalLM,
        lambda: Qwen3MoeConfig(
            num_experts=3, num_experts_per_tok=2, moe_intermediate_size=24, **EXPERTS
        ),
        tokens,
    ),
    "phi3": Architecture(
        Phi3ForCausalLM,
        lambda: Phi3Config(vocab_size=50, intermediate_size=48, pad_token_id=0, **SMALL),
        tokens,
    ),
    "resnet": Architecture(
        ResNetForImageClassification,
        lambda: ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3),
        lambda: {"pixel_values": pixels(32)},
    ),
}


@torch.no_grad()
def logits(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """What a model answers."""
    found: torch.Tensor = model.eval()(**inputs).logits
    return found
