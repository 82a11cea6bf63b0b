"""Small checkpoints whose every parameter is drawn, and fine-tunes of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from tests.conftest import tiny_llama

__all__ = ["FAR", "NEAR", "NEAR_AND_FAR", "llama", "save_family", "save_models"]

SIZE = 0.05  # standard deviation of a base's parameters
FAR = 0.05  # of what a fine-tune changes of them: as much as there was,
NEAR = 0.0005  # or a hundredth
NEAR_AND_FAR = {"a": FAR, "b": FAR, "c": FAR, "near_a": NEAR, "near_b": NEAR, "near_c": NEAR}


def save_models(root: Path) -> dict[str, Path]:
    """Every family, by the names that recipes call its models."""
    return dict(_families(root))


def _families(root: Path) -> Iterator[tuple[str, Path]]:
    two = {"a": FAR, "b": FAR}
    yield from save_family(root, "", llama(), NEAR_AND_FAR).items()
    yield from save_family(root, "deep_", llama(num_hidden_layers=6), two).items()
    yield from save_family(root, "tied_", llama(tie_word_embeddings=True), two).items()
    # An embedding of more entries than are merged at once.
    wide = llama(vocab_size=70_000, num_hidden_layers=1)
    yield from save_family(root, "wide_", wide, {**two, "near_a": NEAR, "near_b": NEAR}).items()
    half = {"a": FAR, "b": FAR, "near_a": NEAR}
    yield from save_family(root, "half_", llama(), half, torch.bfloat16).items()
    bert = BertConfig(
        vocab_size=43,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=20,
    )
    # (Of a bare BertModel mergekit 0.1.5 makes nothing: it fails on its own list of names.)
    yield from save_family(root, "bert_", BertForSequenceClassification(bert), two).items()
    gpt2 = GPT2Config(vocab_size=43, n_positions=20, n_embd=16, n_layer=3, n_head=2)
    yield from save_family(root, "gpt2_", GPT2LMHeadModel(gpt2), two).items()
    # mergekit has no file on this one, and infers its layers.
    neo = GPTNeoConfig(
        vocab_size=43,
        max_position_embeddings=20,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
    )
    yield from save_family(root, "neo_", GPTNeoForCausalLM(neo), two).items()


def llama(**changes: object) -> PreTrainedModel:
    """Four layers, with fewer keys than queries."""
    settings: dict[str, object] = {
        "vocab_size": 41,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
    }
    config: LlamaConfig = tiny_llama(**{**settings, **changes})
    return LlamaForCausalLM(config)


def save_family(
    root: Path,
    prefix: str,
    model: PreTrainedModel,
    spreads: dict[str, float],
    dtype: torch.dtype = torch.float32,
) -> dict[str, Path]:
    """Save a base of drawn parameters and a fine-tune for each spread of changes to them.

    Returns:
        `prefix` and a fine-tune's name, or "base", -> its directory.
    """
    model = model.to(dtype)
    paths = {f"{prefix}{name}": root / f"{prefix}{name}" for name in ("base", *spreads)}
    base: dict[str, torch.Tensor] = {}
    for number, (path, spread) in enumerate(
        zip(paths.values(), (SIZE, *spreads.values()), strict=True)
    ):
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                start = base.get(name, torch.zeros_like(parameter))
                parameter.copy_(_moved(start, spread, generator))
        base = base or {name: value.clone() for name, value in model.named_parameters()}
        model.save_pretrained(path)
    return paths


def _moved(start: torch.Tensor, spread: float, generator: torch.Generator) -> torch.Tensor:
    """`start` and noise, of which no two entries have the same magnitude where that can be.

    Which of two equal ones a sort puts first is up to the machine.
    """
    noise = spread * torch.randn(start.shape, generator=generator)
    moved = (start.float() + noise).to(start.dtype)
    while start.dtype == torch.float32 and start.numel() < 1 << 12:
        size = (moved - start).abs().reshape(-1)
        order = size.sort().indices
        twice = order[1:][size[order][1:] == size[order][:-1]]
        if not len(twice):
            break
        again = spread * torch.randn(len(twice), generator=generator)
        moved.view(-1)[twice] = start.reshape(-1)[twice] + again
    return moved
