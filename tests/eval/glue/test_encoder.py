"""The base's encoder under the fine-tunes' heads."""

from __future__ import annotations

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dare_eval.glue.encoder import GlueEncoder
from tests.conftest import all_bytes, read_checkpoint
from tests.eval.glue.conftest import Lab


def tokens(lab: Lab) -> dict[str, torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(lab.base)
    return dict(tokenizer(["g0 b1 g2", "b3 b4"], padding=True, return_tensors="pt"))


def test_with_its_exact_delta_it_answers_as_the_fine_tune_and_after_it_as_the_base(lab: Lab):
    encoder = GlueEncoder(lab.base, lab.of("sst2", "stsb"))
    before = all_bytes(encoder.encoder)
    for task in ("sst2", "stsb"):
        own = AutoModelForSequenceClassification.from_pretrained(lab.finetuned / task).eval()
        with torch.no_grad(), encoder.wearing(encoder.deltas[task]):
            found = encoder.model(task)(**tokens(lab)).logits
        expected = own(**tokens(lab)).logits
        assert torch.allclose(found, expected, atol=1e-5)
    assert all_bytes(encoder.encoder) == before


def test_a_merge_by_average_is_the_mean_of_the_checkpoints(lab: Lab):
    encoder = GlueEncoder(lab.base, lab.of("sst2", "mrpc", "stsb"))
    own = [read_checkpoint(lab.finetuned / task) for task in ("sst2", "mrpc", "stsb")]
    with encoder.merged(["sst2", "mrpc", "stsb"], "average"):
        for name, live in encoder.encoder.named_parameters():
            mean = sum(weights[f"bert.{name}"] for weights in own) / 3
            assert torch.allclose(live, mean, atol=1e-6), name
    assert encoder.encoder.dare_adapters == []


def test_heads_are_the_fine_tunes_own_during_a_merge(lab: Lab):
    encoder = GlueEncoder(lab.base, lab.of("sst2", "stsb"))
    with encoder.merged(["sst2", "stsb"], "task_arithmetic", lambda_=0.3):
        for task in ("sst2", "stsb"):
            stored = read_checkpoint(lab.finetuned / task)
            head = encoder.classifiers[task].classifier
            assert torch.equal(head.weight, stored["classifier.weight"])
            assert torch.equal(head.bias, stored["classifier.bias"])
