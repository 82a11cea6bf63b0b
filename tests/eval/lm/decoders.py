"""A tiny decoder that reads characters, two fine-tunes of it, their adapters and a mix of these."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import dare_adapters


@dataclass(frozen=True)
class Decoders:
    """Directories."""

    base: Path
    finetuned: tuple[Path, Path]
    adapters: tuple[Path, Path]
    mix: Path


def make_decoders(root: Path) -> Decoders:
    """All of them, in `root`; a head of 32 entries is the least that vLLM has on a CPU."""
    tokenizer = ascii_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=129,
        eos_token_id=129,
        pad_token_id=129,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # else every prompt is answered alike
    found = Decoders(
        root / "base",
        (root / "math", root / "chat"),
        (root / "math-dare", root / "chat-dare"),
        root / "mix",
    )
    model.save_pretrained(found.base)
    tokenizer.save_pretrained(found.base)
    for number, (finetuned, adapter) in enumerate(
        zip(found.finetuned, found.adapters, strict=True)
    ):
        generator = torch.Generator().manual_seed(number)
        own = LlamaForCausalLM.from_pretrained(found.base)
        with torch.no_grad():
            for parameter in own.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * 0.3 * parameter.std().nan_to_num())
        own.save_pretrained(finetuned)
        tokenizer.save_pretrained(finetuned)
        dare_adapters.extract(
            found.base, finetuned, adapter, drop_rate=0.5, on_large_delta="ignore", progress=False
        )
    dare_adapters.combine(list(found.adapters), found.mix, [1.0, 0.5], as_mix=True, progress=False)
    return found


def ascii_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each character of ASCII, one for all others, and one for the end."""
    vocabulary = {chr(number): number for number in range(128)} | {"<|other|>": 128}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<|other|>"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>", pad_token="<|end|>"
    )
