"""Requests for adapters, as vLLM takes them, and models that hold the merged weights."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from dare_adapters import Adapter
from dare_adapters.delta import Delta
from tests.conftest import Pack, read_checkpoint

__all__ = ["add_densely", "merged_densely", "request_for"]

_numbers = itertools.count(1)


def request_for(path: Path | str, name: str | None = None) -> Any:
    """A LoRARequest of its own number."""
    from vllm.lora.request import LoRARequest

    number = next(_numbers)
    return LoRARequest(name or f"adapter-{number}", number, str(path))


def merged_densely(pack: Pack, parts: dict[str, float]) -> PreTrainedModel:
    """A float32 transformers model of the base plus weighted deltas, each added whole.

    Every parameter must be changed by every part, or the comparison says nothing of it.
    """
    return add_densely(pack, {pack.adapters[name]: weight for name, weight in parts.items()})


def add_densely(pack: Pack, parts: dict[Path, float]) -> PreTrainedModel:
    """The same of any adapters over a pack's base."""
    tensors = {name: value.float() for name, value in read_checkpoint(pack.base).items()}
    for path, weight in parts.items():
        adapter = Adapter.open(path)
        assert set(adapter) == set(tensors), "the fine-tune must change every parameter"
        for name, value in tensors.items():
            delta = adapter[name]
            assert isinstance(delta, Delta)
            value.add_(weight * delta.dense())
    with tempfile.TemporaryDirectory() as directory:
        shutil.copy(pack.base / "config.json", directory)
        save_file(tensors, Path(directory, "model.safetensors"), metadata={"format": "pt"})
        return pack.model_class.from_pretrained(directory, dtype=torch.float32).eval()
