"""Checkpoints made of integers: the same on every machine, without a random generator."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.reference import RawTensor, write_safetensors

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}
Tensors = Mapping[str, torch.Tensor]


def integers(shape: Sequence[int], start: int = 0, spread: float = 1.0) -> torch.Tensor:
    """Values in ±0.02 · spread that repeat only after 1009, float32."""
    size = torch.Size(shape).numel()
    counted = torch.arange(start, start + size, dtype=torch.int64) * 7919 % 1009 - 504
    return (counted.to(torch.float64) / 25000 * spread).to(torch.float32).view(tuple(shape))


def fine_tuned(base: Tensors, spread: float = 0.05) -> dict[str, torch.Tensor]:
    """Every float parameter moved a little (±0.001 by default), in its own dtype."""
    found = {}
    for place, (name, value) in enumerate(base.items()):
        if value.is_floating_point():
            change = integers(value.shape, 100 + 37 * place, spread)
            found[name] = (value.to(torch.float32) + change).to(value.dtype)
        else:
            found[name] = value.clone()
    return found


def raw(tensor: torch.Tensor) -> RawTensor:
    """A tensor as it stands in a file."""
    flat = tensor.detach().contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return RawTensor(NAMES[tensor.dtype], tuple(tensor.shape), data)


def write_checkpoint(
    directory: Path,
    tensors: Tensors,
    config: Mapping[str, Any] | None = None,
    shards: Sequence[Sequence[str]] | None = None,
) -> Path:
    """One safetensors file, or one for each list of names with an index."""
    directory.mkdir(parents=True)
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    if shards is None:
        stored = {name: raw(value) for name, value in tensors.items()}
        write_safetensors(directory / "model.safetensors", stored)
        return directory
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(directory / file, {name: raw(tensors[name]) for name in names})
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory
