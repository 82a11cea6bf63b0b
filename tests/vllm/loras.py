"""LoRA adapters written by hand, as PEFT writes them, and the weights that they merge to."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

__all__ = ["add_lora", "write_lora"]

RANK = 4
ALPHA = 8
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def write_lora(model: PreTrainedModel, out: Path, seed: int = 0, rank: int = RANK) -> Path:
    """A LoRA of every attention projection of a model, with both factors random.

    Args:
        model: a transformers model of the base.
        out: directory to write.
        seed: of its numbers.
        rank: r.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, parameter in model.named_parameters():
        layer = name.removesuffix(".weight")
        if layer.rpartition(".")[2] in PROJECTIONS and name.endswith(".weight"):
            rows, columns = parameter.shape
            for factor, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                values = torch.randn(shape, generator=generator) * 0.1
                tensors[f"base_model.model.{layer}.lora_{factor}.weight"] = values
    out.mkdir(parents=True)
    save_file(tensors, out / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": ALPHA,
        "target_modules": list(PROJECTIONS),
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
    }
    (out / "adapter_config.json").write_text(json.dumps(config))
    return out


def add_lora(model: PreTrainedModel, directory: Path) -> PreTrainedModel:
    """Add B A α/r to a model's weights, in place."""
    from safetensors.torch import load_file

    tensors = load_file(directory / "adapter_model.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
            if f"{key}A.weight" in tensors:
                a, b = tensors[f"{key}A.weight"], tensors[f"{key}B.weight"]
                parameter.add_(b @ a * (ALPHA / len(a)))
    return model
