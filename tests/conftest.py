"""Small models, made from scratch: a base and a full fine-tune of it, as checkpoints on disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@dataclass(frozen=True)
class Family:
    """Directories of a base and of a fine-tune in which every parameter changed."""

    base: Path
    finetuned: Path
    model_class: type[PreTrainedModel]

    def live(self, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
        """The base as a live model."""
        return self.model_class.from_pretrained(self.base, dtype=dtype).eval()


FamilyMaker = Callable[..., Family]


@pytest.fixture
def make_family(tmp_path: Path) -> FamilyMaker:
    """Builds a family of any architecture; every parameter moves by N(0, spread)."""

    def make(
        model_class: type[PreTrainedModel] = LlamaForCausalLM,
        config: object | None = None,
        *,
        dtype: torch.dtype = torch.bfloat16,
        spread: float = 0.002,
        seed: int = 0,
        max_shard_size: str = "5GB",
        name: str = "family",
    ) -> Family:
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        model = model_class(config or tiny_llama()).to(dtype)
        base, finetuned = tmp_path / name / "base", tmp_path / name / "finetuned"
        model.save_pretrained(base, max_shard_size=max_shard_size)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator) * spread
                parameter.copy_((parameter.float() + noise).to(dtype))
        model.save_pretrained(finetuned, max_shard_size=max_shard_size)
        return Family(base, finetuned, model_class)

    return make


def tiny_llama(**changes: object) -> LlamaConfig:
    """A Llama with grouped queries whose widths are no multiples of the default block."""
    settings = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 136,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaConfig(**{**settings, **changes})
