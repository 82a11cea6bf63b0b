"""Fisher information compared with plain loops over examples, classes and tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    MixtralForCausalLM,
    PreTrainedModel,
)

import dare_adapters
from dare_adapters.errors import DareError, UnsupportedParameterError
from dare_adapters.statistics import diagonal_fisher, fisher
from dare_adapters.statistics import memory as memory_module
from tests.conftest import FamilyMaker, read_checkpoint
from tests.statistics import bert, bert_config, gpt2, lively, llama, token_batches
from tests.test_live import MODELS as LIVE_MODELS
from tests.test_live import mixtral_config

Batch = dict[str, torch.Tensor]
Gradients = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def squared(model: PreTrainedModel, value: torch.Tensor) -> Gradients:
    """The squared gradient of a scalar, by live name."""
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(
        value, list(named.values()), retain_graph=True, materialize_grads=True
    )
    return {name: gradient**2 for name, gradient in zip(named, gradients, strict=True)}


def total(parts: list[Gradients], divisor: int) -> Gradients:
    return {name: sum(part[name] for part in parts) / divisor for name in parts[0]}


def logits_of(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def mergelm_loop(model: PreTrainedModel, batches: list[Batch]) -> Gradients:
    """As MergeLM's fisher_merging writes it: one backward pass a batch, divided by the examples."""
    parts, examples = [], 0
    for batch in batches:
        logits = logits_of(model, batch)
        if logits.shape[-1] == 1:
            value = ((logits.squeeze() - batch["labels"].squeeze()) ** 2).mean()
        else:
            probabilities = torch.softmax(logits, dim=-1).detach()
            value = (torch.sqrt(probabilities) * torch.log_softmax(logits, dim=-1)).sum(-1).sum(0)
        parts.append(squared(model, value))
        examples += len(logits)
    return total(parts, examples)


def exact_loop(model: PreTrainedModel, batches: list[Batch]) -> Gradients:
    """The definition: the expectation of the squared gradient of log p over the model's classes."""
    parts, examples = [], 0
    for batch in batches:
        logits = logits_of(model, batch)
        for row in logits:
            for c in range(len(row)):
                part = squared(model, torch.log_softmax(row, 0)[c])
                share = float(torch.softmax(row, 0)[c].detach())
                parts.append({name: share * value for name, value in part.items()})
            examples += 1
    return total(parts, examples)


def assert_alike(found: Gradients, expected: Gradients) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        assert found[name].shape == value.shape, name
        scale = float(value.abs().max())
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-4, atol=1e-5 * scale + 1e-9)


@pytest.mark.parametrize("size", [1, 4])
def test_fisher_of_a_classifier_is_mergelms(size: int):
    model, batches = bert(), token_batches(8 // size, size)
    assert_alike(diagonal_fisher(model, batches), mergelm_loop(model, batches))


@pytest.mark.parametrize("size", [1, 4])
def test_fisher_of_a_regressor_is_mergelms_labelled_squared_error(size: int):
    model, batches = bert(num_labels=1), token_batches(8 // size, size, labels=1)
    expected = mergelm_loop(model, batches)
    assert_alike(diagonal_fisher(model, batches), expected)
    assert_alike(diagonal_fisher(model, batches, estimate="labels"), expected)


def test_mergelms_fisher_depends_on_the_batch_size_and_the_exact_one_does_not():
    model = bert()
    (large,) = token_batches(1, 6)
    small = [{key: value[i : i + 1] for key, value in large.items()} for i in range(6)]
    for estimate, same in (("mergelm", False), ("exact", True)):
        one, other = (diagonal_fisher(model, b, estimate=estimate) for b in ([large], small))
        alike = all(torch.allclose(one[n], other[n], rtol=1e-3, atol=1e-9) for n in one)
        assert alike is same, estimate


def test_the_exact_fisher_is_its_definition():
    model, batches = bert(), token_batches(2, 3)
    assert_alike(diagonal_fisher(model, batches, estimate="exact"), exact_loop(model, batches))


def test_the_sampled_fisher_of_whole_batches_is_the_exact_one_on_average():
    model, batches = bert(), token_batches(1, 4)
    exact = diagonal_fisher(model, batches, estimate="exact")
    sampled = diagonal_fisher(model, batches * 200, estimate="sampled", seed=3)
    for name in ("bert.encoder.layer.0.output.dense.weight", "classifier.weight"):
        assert float(sampled[name].sum() / exact[name].sum()) == pytest.approx(1, abs=0.2)
        both = torch.stack([sampled[name].flatten(), exact[name].flatten()])
        assert float(torch.corrcoef(both)[0, 1]) > 0.9


def test_labels_of_a_classifier_are_its_outcomes():
    model, batches = bert(), token_batches(2, 3)
    parts = [
        squared(model, functional.cross_entropy(logits_of(model, b), b["labels"], reduction="sum"))
        for b in batches
    ]
    assert_alike(diagonal_fisher(model, batches, estimate="labels"), total(parts, 6))


@pytest.mark.parametrize("make", [llama, gpt2])
def test_labels_of_a_language_model_are_its_next_tokens(make: Callable[[], PreTrainedModel]):
    model, batches = make(), token_batches(2, 3, labels=None)
    parts = []
    for batch in batches:
        value = torch.zeros(())
        shares = torch.log_softmax(logits_of(model, batch), dim=-1)
        for row, (tokens, mask) in enumerate(
            zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ):
            for place in range(len(tokens) - 1):
                if mask[place] and mask[place + 1]:
                    value = value + shares[row, place, tokens[place + 1]]
        parts.append(squared(model, value))
    assert_alike(diagonal_fisher(model, batches, estimate="labels"), total(parts, 6))


def test_labels_that_come_with_a_language_models_batches_count_and_minus_100_does_not():
    model = llama()
    (batch,) = token_batches(1, 3, labels=None)
    masked = batch["input_ids"].clone()
    masked[:, :3] = -100
    value = torch.zeros(())
    shares = torch.log_softmax(logits_of(model, batch), dim=-1)
    for row in range(3):
        for place in range(2, 6):
            if batch["attention_mask"][row, place + 1]:
                value = value + shares[row, place, batch["input_ids"][row, place + 1]]
    found = diagonal_fisher(model, [{**batch, "labels": masked}], estimate="labels")
    assert_alike(found, total([squared(model, value)], 3))


def test_a_language_models_fisher_is_that_of_its_own_next_tokens_on_average():
    model = llama()
    (batch,) = token_batches(1, 1, length=4, labels=None)
    real = int(batch["attention_mask"].sum())
    expected: list[Gradients] = []
    logits = logits_of(model, batch)[0]
    for place in range(real - 1):
        shares = torch.log_softmax(logits[place], 0)
        for share in shares:
            part = squared(model, share)
            expected.append({n: float(share.detach().exp()) * g for n, g in part.items()})
    exact = total(expected, 1)
    found = diagonal_fisher(model, [batch] * 200)
    for name in ("lm_head.weight", "model.layers.0.mlp.up_proj.weight"):
        assert float(found[name].sum() / exact[name].sum()) == pytest.approx(1, abs=0.25)


def test_draws_depend_on_the_seed_alone():
    model, batches = llama(), token_batches(2, 2, labels=None)
    one, same, other = (diagonal_fisher(model, batches, seed=seed) for seed in (1, 1, 2))
    name = "lm_head.weight"
    assert torch.equal(one[name], same[name])
    assert not torch.equal(one[name], other[name])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_a_language_model_counts_for_nothing(side: str):
    model = llama()
    tokens = torch.tensor([[5, 9, 11, 20]])
    bare = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    amount = (2, 0) if side == "left" else (0, 2)
    padded = {key: functional.pad(value, amount) for key, value in bare.items()}
    # Rotary positions are relative, so a shift to the right changes nothing else.
    one, other = (diagonal_fisher(model, [b], estimate="labels") for b in (bare, padded))
    assert_alike(other, one)


# Names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mixtral", "phi3", "gpt2", "llama tied", "bert with a head"])
def test_names_and_shapes_are_those_of_the_saved_checkpoint(kind: str, tmp_path: Path):
    model = lively(LIVE_MODELS[kind]())
    model.save_pretrained(tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    labels = 3 if kind == "bert with a head" else None
    found = diagonal_fisher(model, token_batches(1, 2, labels=labels))
    assert {n: v.shape for n, v in found.items()} == {n: v.shape for n, v in checkpoint.items()}


def test_an_experts_window_holds_its_own_part_of_the_fused_gradient(tmp_path: Path):
    model, batches = lively(MixtralForCausalLM(mixtral_config())), token_batches(2, 2, labels=None)
    found = diagonal_fisher(model, batches, estimate="labels")
    parts = []
    for batch in batches:
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        count = int((labels[:, 1:] >= 0).sum())
        parts.append(squared(model, model(**inputs, labels=labels).loss * count))
    fused = total(parts, 4)["model.layers.1.mlp.experts.gate_up_proj"]
    name = "model.layers.1.block_sparse_moe.experts.2.{}.weight"
    for part, rows in (("w1", slice(0, 48)), ("w3", slice(48, 96))):
        torch.testing.assert_close(found[name.format(part)], fused[2, rows], rtol=1e-3, atol=1e-8)


def test_names_of_a_bare_base_are_found_under_a_head():
    model = bert()
    names = ["embeddings.word_embeddings.weight", "pooler.dense.bias", "nowhere.weight"]
    found = diagonal_fisher(model, token_batches(1, 2), names=names)
    assert list(found) == names[:2]


def test_patterns_choose_parameters_and_change_no_value():
    model, batches = bert(), token_batches(1, 2)
    whole = diagonal_fisher(model, batches)
    some = diagonal_fisher(model, batches, include=["*.query.*", "class*"], exclude=["*.bias"])
    assert set(some) == {
        "bert.encoder.layer.0.attention.self.query.weight",
        "classifier.weight",
    }
    for name, value in some.items():
        torch.testing.assert_close(value, whole[name])


def test_what_the_output_does_not_depend_on_has_zeros():
    model = bert()
    found = diagonal_fisher(model, token_batches(1, 2, length=5))
    assert not found["bert.embeddings.position_embeddings.weight"][5:].any()
    assert found["bert.embeddings.position_embeddings.weight"][:3].any()


# The model ----------------------------------------------------------------------------------------


def test_the_model_is_left_as_it_was():
    model, batches = bert().train(), token_batches(1, 2)
    model.bert.pooler.eval()
    model.classifier.weight.requires_grad_(False)
    model.classifier.bias.grad = torch.full((3,), 7.0)
    modes = [module.training for module in model.modules()]
    found = diagonal_fisher(model, batches)
    assert found["classifier.weight"].any()
    assert [module.training for module in model.modules()] == modes
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["classifier.weight"]
    assert torch.equal(model.classifier.bias.grad, torch.full((3,), 7.0))
    assert all(p.grad is None for n, p in model.named_parameters() if n != "classifier.bias")
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert_alike(found, mergelm_loop(model.eval().requires_grad_(), batches))


def test_the_model_is_left_as_it_was_when_a_batch_is_unusable():
    model = bert().train()
    with pytest.raises(IndexError):
        diagonal_fisher(model, [*token_batches(1, 2), {"input_ids": torch.tensor([[99]])}])
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_caller_in_inference_mode_gets_gradients_all_the_same():
    model = bert()
    with torch.inference_mode():
        batches = token_batches(1, 2)
        found = diagonal_fisher(model, batches)
        assert torch.is_inference_mode_enabled()
    assert_alike(found, mergelm_loop(model, token_batches(1, 2)))


def test_gradients_of_a_bfloat16_model_are_squared_in_float32():
    model, batches = bert().to(torch.bfloat16), token_batches(1, 2)
    found = diagonal_fisher(model, batches)
    expected = mergelm_loop(model.float(), batches)
    name = "bert.encoder.layer.0.output.dense.weight"
    assert found[name].dtype == torch.float32
    assert float((found[name].sum() / expected[name].sum()).log().abs()) < 0.1
    assert not torch.equal(found[name], found[name].bfloat16().float())


def test_fisher_is_that_of_the_model_with_its_active_adapter(make_family: FamilyMaker):
    family = make_family(BertForSequenceClassification, bert_config(), dtype=torch.float32)
    out = family.base.parent / "adapter"
    dare_adapters.extract(
        family.base,
        family.finetuned,
        out,
        drop_rate=0.0,
        bits=32,
        on_large_delta="ignore",
        progress=False,
    )
    model, batches = family.live(), token_batches(1, 3)
    plain = diagonal_fisher(model, batches)
    model.load_dare_adapter(out)
    tuned = family.model_class.from_pretrained(family.finetuned).eval()
    found = diagonal_fisher(model, batches)
    assert_alike(found, mergelm_loop(tuned, batches))
    assert not torch.allclose(found["classifier.weight"], plain["classifier.weight"], rtol=1e-5)


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (bert, {"estimate": "other"}, "there are auto, mergelm, exact, sampled, labels"),
        (
            llama,
            {"estimate": "mergelm"},
            "LlamaForCausalLM is a language model.*sampled and labels",
        ),
        (llama, {"estimate": "exact"}, "not exact"),
        (lambda: bert(num_labels=1), {"estimate": "sampled"}, "labelled error"),
        (lambda: bert(num_labels=1), {"estimate": "exact"}, "no classes"),
        (lambda: bert(problem_type="multi_label_classification"), {}, "multi_label"),
        (lambda: bert(problem_type="regression"), {}, "for regression"),
        (lambda: lively(BertForMaskedLM(bert_config())), {}, "BertForMaskedLM has outputs"),
        (bert, {"include": ["nothing.*"]}, r"leave no parameter of BertForSequenceClassification"),
        (bert, {"exclude": ["*"]}, "leave no parameter"),
    ],
)
def test_what_has_no_such_fisher_is_refused(
    make: Callable[[], PreTrainedModel], arguments: dict[str, object], message: str
):
    with pytest.raises((DareError, ValueError), match=message):
        diagonal_fisher(make(), token_batches(1, 2, labels=None), **arguments)


def test_missing_labels_and_missing_batches_are_refused():
    with pytest.raises(DareError, match="needs labels"):
        diagonal_fisher(bert(num_labels=1), token_batches(1, 2, labels=None))
    with pytest.raises(DareError, match="no examples"):
        diagonal_fisher(bert(), [])
    alone = {"input_ids": torch.tensor([[5]]), "attention_mask": torch.tensor([[1]])}
    with pytest.raises(DareError, match="no two tokens"):
        diagonal_fisher(llama(), [alone])


def test_a_gradient_that_is_not_finite_is_refused_by_name():
    model = bert()
    with torch.no_grad():
        model.classifier.bias[0] = float("nan")
    with pytest.raises(DareError, match=r"of bert\.\S+ is not finite"):
        diagonal_fisher(model, token_batches(1, 2))


def test_a_parameter_on_the_meta_device_is_refused_unless_left_out():
    model = bert()
    model.classifier.to("meta")
    with pytest.raises(UnsupportedParameterError, match=r"classifier\.\w+ is on the meta"):
        diagonal_fisher(model, token_batches(1, 2))


def test_what_does_not_fit_in_memory_is_refused_before_it_is_begun(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(memory_module, "available_bytes", lambda: 1000)
    with pytest.raises(DareError, match=re.escape("--include")):
        diagonal_fisher(bert(), iter([None]))  # the batches are not looked at


def test_a_bare_model_has_no_answer_to_measure():
    with pytest.raises(DareError, match="BertModel has no logits"):
        diagonal_fisher(lively(BertModel(bert_config())), token_batches(1, 2))


def test_every_estimate_is_documented():
    for estimate in ("mergelm", "exact", "sampled", "labels"):
        assert f"| {estimate} |" in (diagonal_fisher.__doc__ or "")
    assert fisher.Estimate.__args__[0] == "auto"
