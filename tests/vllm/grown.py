"""Fine-tunes that added tokens, and models that hold what requests for them are answered by."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

import dare_adapters
from dare_adapters import Adapter
from dare_adapters.delta import Delta
from tests.conftest import Pack, read_checkpoint

__all__ = ["grow", "merged_grown"]


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
    dare_adapters.extract(
        pack.base,
        out / "finetuned",
        out / "adapter",
        drop_rate=0.5,
        bits=8,
        on_large_delta="ignore",
        progress=False,
    )
    return out / "adapter"


def merged_grown(pack: Pack, parts: Sequence[tuple[Path, float]]) -> PreTrainedModel:
    """A float32 model of the base plus weighted deltas; rows beyond the base's from the first."""
    tensors = {name: value.float() for name, value in read_checkpoint(pack.base).items()}
    rows: dict[str, torch.Tensor] = {}
    for path, weight in parts:
        adapter = Adapter.open(path)
        assert set(adapter) == set(tensors), "the fine-tune must change every parameter"
        for name, value in tensors.items():
            delta = adapter[name]
            assert isinstance(delta, Delta)
            value.add_(weight * delta.dense())
            if delta.added_rows is not None:
                have = rows.get(name, delta.added_rows[:0])
                rows[name] = torch.cat([have, delta.added_rows[len(have) :]])
    tensors.update({name: torch.cat([tensors[name], own.float()]) for name, own in rows.items()})
    with tempfile.TemporaryDirectory() as directory:
        shutil.copy(pack.base / "config.json", directory)
        config = json.loads(Path(directory, "config.json").read_text())
        config["vocab_size"] += max((len(own) for own in rows.values()), default=0)
        Path(directory, "config.json").write_text(json.dumps(config))
        save_file(tensors, Path(directory, "model.safetensors"), metadata={"format": "pt"})
        return pack.model_class.from_pretrained(directory, dtype=torch.float32).eval()
