"""Requests for adapters, as vLLM takes them, and models that hold the merged weights."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from dare_adapters import Adapter
from dare_adapters.delta import Delta
from tests.conftest import Pack

__all__ = ["merged_densely", "request_for"]

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
    return add_densely(pack.live(torch.float32), {pack.adapters[p]: w for p, w in parts.items()})


def add_densely(model: PreTrainedModel, parts: dict[Path, float]) -> PreTrainedModel:
    """Add weighted deltas of adapters to a model whose parameters have the checkpoint's names."""
    state = dict(model.named_parameters())
    for path, weight in parts.items():
        adapter = Adapter.open(path)
        changed = set()
        for name, parameter in state.items():
            delta = adapter[name]
            assert isinstance(delta, Delta)
            with torch.no_grad():
                parameter.add_(weight * delta.dense())
            changed.add(name)
        assert changed == set(state), "the fine-tune must change every parameter"
    return model
