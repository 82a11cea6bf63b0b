"""Models of which only names, shapes and config exist."""

from __future__ import annotations

import torch

from dare_adapters.checkpoint import ParameterInfo
from dare_adapters.recipe import Inventory, ModelPath, ModelReference, Recipe
from tests.recipe.cards import layers_of

BF16 = torch.bfloat16


def reference(name: str) -> ModelReference:
    return ModelReference(ModelPath(name))


def inventory(shapes: dict[str, tuple[int, ...]], dtype=BF16, **config: object) -> Inventory:
    return Inventory({name: ParameterInfo(shape, dtype) for name, shape in shapes.items()}, config)


def llama(
    layers: int = 2,
    *,
    vocab: int = 100,
    width: int = 8,
    head: bool = True,
    dtype: torch.dtype = BF16,
    extra: dict[str, tuple[int, ...]] | None = None,
    **config: object,
) -> Inventory:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, width)}
    for number in range(layers):
        prefix = f"model.layers.{number}."
        shapes[f"{prefix}self_attn.q_proj.weight"] = (width, width)
        shapes[f"{prefix}self_attn.o_proj.weight"] = (width, width)
        shapes[f"{prefix}mlp.down_proj.weight"] = (width, 24)
        shapes[f"{prefix}input_layernorm.weight"] = (width,)
    shapes["model.norm.weight"] = (width,)
    if head:
        shapes["lm_head.weight"] = (vocab, width)
    shapes |= extra or {}
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": layers,
        "vocab_size": vocab,
        "hidden_size": width,
        "tie_word_embeddings": not head,
    }
    return inventory(shapes, dtype, **{**settings, **config})


def opened(recipe: Recipe, **changed: Inventory) -> dict[ModelReference, Inventory]:
    """A Llama for every model of a recipe, as deep as its name says; some of them changed."""
    return {
        model: changed[str(model)] if str(model) in changed else llama(layers_of(str(model)))
        for model in recipe.inputs
    }
