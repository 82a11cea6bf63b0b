"""Tiny models of the kinds that vLLM is tested with; its CPU attention wants heads of 32."""

from __future__ import annotations

from transformers import LlamaConfig, MixtralConfig, Qwen2Config

from tests.conftest import tiny_llama

__all__ = ["KINDS", "llama", "mixtral", "qwen2", "tied_llama"]

# Three kinds of support; the deltas are large enough to change what is said.
KINDS: dict[str, dict[str, object]] = {
    "a": {"drop_rate": 0.5, "bits": 8},
    "b": {"drop_rate": 0.5, "bits": 16, "mask": "bernoulli"},
    "c": {"drop_rate": 0.75, "bits": 8, "method": "magnitude"},
}
SPREAD = 0.05
_SIZES = {
    "vocab_size": 97,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(**changes: object) -> LlamaConfig:
    """Grouped queries, a fused gate, a head of its own, widths no multiples of a block."""
    return tiny_llama(**{**_SIZES, "intermediate_size": 136, **changes})


def tied_llama() -> LlamaConfig:
    """The same, its head the embedding."""
    return llama(tie_word_embeddings=True)


def qwen2() -> Qwen2Config:
    """Biases on queries, keys and values."""
    return Qwen2Config(**_SIZES, intermediate_size=160, tie_word_embeddings=False)


def mixtral() -> MixtralConfig:
    """A mixture of experts, stored an expert at a time."""
    return MixtralConfig(
        **_SIZES,
        intermediate_size=96,
        num_local_experts=4,
        num_experts_per_tok=2,
        tie_word_embeddings=False,
        sliding_window=None,
    )
