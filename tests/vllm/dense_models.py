"""Models that hold the merged weights, made by adding every delta whole."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from dare_adapters import Adapter
from dare_adapters.delta import Delta
from tests.conftest import Pack, read_checkpoint

__all__ = ["add_densely", "merged_densely"]


def merged_densely(pack: Pack, parts: dict[str, float]) -> PreTrainedModel:
    """A float32 transformers model of the base plus weighted deltas, each added whole.

    Every parameter must be changed by every part, or the comparison says nothing of it.
    """
    return add_densely(pack, {pack.adapters[name]: weight for name, weight in parts.items()})


def add_densely(pack: Pack, parts: dict[Path, float]) -> PreTrainedModel:
    """The same of any adapters over a pack's base; added rows are of the first that has them."""
    tensors = {name: value.float() for name, value in read_checkpoint(pack.base).items()}
    rows: dict[str, torch.Tensor] = {}
    for path, weight in parts.items():
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
