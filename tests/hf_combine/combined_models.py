"""Live models whose adapters are combined, and the dense formulas that say what they must hold."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import BertForSequenceClassification, PreTrainedModel

from tests.combine.test_api import dense_reference, small_llama
from tests.conftest import Pack, PackMaker
from tests.test_live import bert_config

Tensors = dict[str, torch.Tensor]
# One of each kind: sums, elections, masks, thresholds of the whole model, whole parameters.
SOME: dict[str, dict[str, Any]] = {
    "linear": {},
    "ties": {"density": 0.4, "trim_scope": "model"},
    "dare_ties": {"density": 0.5},
    "sce": {"select_topk": 0.5},
    "slerp": {"t": 0.3},
    "model_stock": {},
    "karcher": {},
}


def bert_pack(make_pack: PackMaker) -> Pack:
    config = bert_config(num_labels=3)
    return make_pack("combine-bert", BertForSequenceClassification, config, dtype=torch.float32)


def tied_pack(make_pack: PackMaker) -> Pack:
    config = small_llama()
    config.tie_word_embeddings = True
    return make_pack("combine-tied", config=config, dtype=torch.float32)


_models: dict[Path, PreTrainedModel] = {}
_references: dict[str, Tensors] = {}


def loaded(pack: Pack) -> PreTrainedModel:
    """The base with all adapters loaded, none active; a copy, which is quicker than loading."""
    if pack.base not in _models:
        _models[pack.base] = pack.loaded()
    return copy.deepcopy(_models[pack.base])


def reference(
    pack: Pack, names: str, weights: Sequence[float], kind: str, options: dict[str, Any]
) -> Tensors:
    """`dense_reference`, computed once a session."""
    key = repr((pack.base, names, tuple(map(float, weights)), kind, options))
    if key not in _references:
        _references[key] = dense_reference(pack, names, weights, kind, options)
    return _references[key]


def nbytes(model: PreTrainedModel) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def assert_near(model: PreTrainedModel, expected: Tensors, tolerance: float = 1e-6) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, value in expected.items():
        torch.testing.assert_close(parameters[name], value, rtol=0, atol=tolerance)


def changed(base: Tensors, deltas: Tensors) -> Tensors:
    return {name: value + deltas[name] for name, value in base.items()}
