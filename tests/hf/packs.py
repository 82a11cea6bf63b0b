"""Packs whose adapters live models are given, and what a model must then hold."""

from __future__ import annotations

import torch
from transformers import BertForSequenceClassification, BertModel

from tests.conftest import Pack, PackMaker, read_checkpoint
from tests.test_live import bert_config
from tests.test_patch import EXACT, dense_deltas, expected_sum


def expect(pack: Pack, chosen: dict[str, float]) -> dict[str, torch.Tensor]:
    parts = [(dense_deltas(pack, name), weight) for name, weight in chosen.items()]
    return expected_sum(read_checkpoint(pack.base), parts)


def task_pack(make_pack: PackMaker) -> Pack:
    """A classifier with three labels, fine-tuned from a bare encoder."""
    return make_pack(
        "classifier",
        BertModel,
        bert_config(),
        finetuned_class=BertForSequenceClassification,
        kinds={"a": EXACT, "b": {"drop_rate": 0.5, "bits": 8}},
        num_labels=3,
    )
