"""Fine-tunes that added tokens."""

from __future__ import annotations

from pathlib import Path

import torch

import dare_adapters
from tests.conftest import Pack

__all__ = ["extract_grown", "grow"]


def grow(pack: Pack, kind: str, added: int, out: Path) -> Path:
    """An adapter of a fine-tune of a pack that has some tokens more, likely ones.

    Args:
        pack: whose fine-tune it is.
        kind: the pack's name for it.
        added: how many tokens.
        out: a directory to write into.
    """
    model = pack.model_class.from_pretrained(pack.finetuned[kind])
    before = model.config.vocab_size
    model.resize_token_embeddings(before + added, mean_resizing=False)
    generator = torch.Generator().manual_seed(added)
    with torch.no_grad():
        for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
            rows = embedding.weight[before:]
            rows.copy_(torch.randn(rows.shape, generator=generator) * 0.1)
    model.save_pretrained(out / "finetuned")
    extract_grown(pack, out / "finetuned", out / "adapter")
    return out / "adapter"


def extract_grown(pack: Pack, finetuned: Path, out: Path) -> None:
    """Write the adapter of a fine-tune of a pack that has tokens more."""
    dare_adapters.extract(
        pack.base,
        finetuned,
        out,
        drop_rate=0.5,
        bits=8,
        on_large_delta="ignore",
        progress=False,
    )
