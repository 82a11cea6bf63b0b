"""Sparse fine-tuning: what trains, what is saved, and that training goes on where it stopped."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, Trainer, TrainingArguments

from dare_adapters import Adapter, DareConfig
from dare_adapters.errors import AdapterFormatError
from dare_adapters.mask import BlockedSupport
from tests.conftest import Pack, PackMaker
from tests.tuner.architectures import ARCHITECTURES, ids, logits

INPUTS = {"input_ids": ids(4)}


@pytest.fixture
def pack(make_pack: PackMaker) -> Pack:
    return ARCHITECTURES["llama"].pack(make_pack, "llama")


def trainer(model: nn.Module, out: Path, steps: int, **more: object) -> Trainer:
    data = [{"input_ids": row, "labels": row} for row in ids(16)]
    arguments = TrainingArguments(
        str(out), max_steps=steps, per_device_train_batch_size=4, learning_rate=2e-2,
        report_to=[], save_steps=3, logging_steps=1, use_cpu=True, disable_tqdm=True, **more,
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=data)


def few_steps(model: nn.Module, steps: int = 3) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(**INPUTS, labels=INPUTS["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def patched(pack: Pack, directory: Path) -> PreTrainedModel:
    model = pack.live()
    model.load_dare_adapter(directory)
    return model


def test_the_loss_falls_and_training_resumes_to_the_same_weights(
    pack: Pack, tmp_path: Path
) -> None:
    def recipe() -> DareConfig:
        return DareConfig(drop_rate=0.9, seed=7, task_type="CAUSAL_LM")

    whole = get_peft_model(pack.live(), recipe())
    first = trainer(whole, tmp_path, 6, gradient_checkpointing=True)
    first.train()
    losses = [entry["loss"] for entry in first.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    resumed = get_peft_model(pack.live(), recipe())
    trainer(resumed, tmp_path, 6, gradient_checkpointing=True).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-3")
    )
    for (name, one), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_only_survivors_of_the_seeded_mask_change(pack: Pack, tmp_path: Path) -> None:
    model = get_peft_model(pack.live(), DareConfig(drop_rate=0.9, seed=5))
    few_steps(model)
    merged = dict(model.merge_and_unload().named_parameters())
    base = dict(pack.live().named_parameters())
    name = "model.layers.0.mlp.up_proj.weight"
    changed = (merged[name] != base[name]).nonzero()
    support = BlockedSupport(5, name, *base[name].shape, 10)
    slots = support.slots(0, support.rows)
    allowed = set(slots.compact(slots.index).tolist())
    assert len(changed) > 0
    assert {int(row * base[name].shape[1] + column) for row, column in changed} <= allowed


@pytest.mark.parametrize("mask", ["blocked", "bernoulli"])
def test_gradients_are_those_of_a_dense_delta_at_the_survivors(mask: str) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(40, 24), torch.randn(5, 40)
    model = get_peft_model(
        nn.Sequential(layer), DareConfig(drop_rate=0.75, mask=mask, init_weights=False)
    )
    model(x).square().sum().backward()
    tuned = model.base_model.model[0]
    stored = tuned.dare_stored["default"][0]
    delta = tuned.delta(stored, "default").dense().requires_grad_()
    bias = tuned.dare_bias_delta["default"].detach()
    y = nn.functional.linear(x, layer.weight.detach() + delta, layer.bias.detach() + bias)
    y.square().sum().backward()
    support = stored.support({})
    slots = support.slots(0, support.rows)
    expected = delta.grad.reshape(-1)[slots.compact(slots.index)]
    found = tuned.dare_weight_values["default"].grad
    used = slots.compact(found) if mask == "blocked" else found
    assert torch.allclose(used, expected, atol=1e-5)


LARGE = {
    "linear": (lambda: nn.Linear(384, 512), (5, 384)),
    "convolution": (lambda: nn.Conv2d(64, 128, 3), (2, 64, 4, 4)),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("kind", LARGE)
def test_of_a_large_layer_backward_makes_the_weight_again(
    kind: str, outer: bool, autocast: bool
) -> None:
    torch.manual_seed(0)
    make, shape = LARGE[kind]
    layer, x = make(), torch.randn(shape, requires_grad=True)
    plain = copy.deepcopy(layer)
    model = get_peft_model(nn.Sequential(layer), DareConfig(drop_rate=0.75, init_weights=False))
    saved: list[torch.Size] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.shape)
        return tensor

    def run() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = checkpoint(model, x, use_reentrant=False) if outer else model(x)
        return y.float().square().sum()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = run()
    assert saved
    assert not any(one.numel() == layer.weight.numel() for one in saved)
    loss.backward()
    tuned = model.base_model.model[0]
    stored = next(one for one in tuned.dare_stored["default"] if one.placement.local == "weight")
    with torch.no_grad():
        plain.weight += tuned.delta(stored, "default").dense().view(plain.weight.shape)
        plain.bias += tuned.dare_bias_delta["default"]
    again = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = plain(again)
    y.float().square().sum().backward()
    assert torch.allclose(x.grad, again.grad, rtol=1e-4, atol=1e-3)
    slots = stored.support({}).slots(0, stored.support({}).rows)
    expected = plain.weight.grad.reshape(-1)[slots.compact(slots.index)]
    found = slots.compact(tuned.dare_weight_values["default"].grad)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-3)
    assert torch.allclose(tuned.dare_bias_delta["default"].grad, plain.bias.grad, rtol=1e-4)


@settings(max_examples=15, deadline=None)
@given(
    drop_rate=st.sampled_from([0.0, 0.5, 0.6, 0.9]),
    mask=st.sampled_from(["auto", "bernoulli"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    autocast=st.booleans(),
)
def test_a_trained_adapter_loads_everywhere_as_it_was(
    tmp_path_factory: pytest.TempPathFactory,
    drop_rate: float,
    mask: str,
    dtype: torch.dtype,
    autocast: bool,
) -> None:
    out, x = tmp_path_factory.mktemp("trained"), torch.randn(3, 33).to(dtype)

    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(33, 20), nn.LayerNorm(20)).to(dtype)

    config = DareConfig(drop_rate=drop_rate, mask=mask, init_weights=False)
    model = get_peft_model(base(), config, autocast_adapter_dtype=autocast)
    model.save_pretrained(out)
    again = PeftModel.from_pretrained(base(), out, autocast_adapter_dtype=autocast)
    assert torch.equal(model(x), again(x))
    adapter = Adapter.open(out)
    assert adapter.config.target_modules is None
    assert {"0.weight", "0.bias", "1.weight", "1.bias"} == set(adapter)


def test_a_trained_adapter_is_one_of_ours(pack: Pack, tmp_path: Path) -> None:
    model = get_peft_model(pack.live(), DareConfig(drop_rate=0.9))
    few_steps(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(patched(pack, tmp_path), INPUTS), logits(model, INPUTS))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(pack.base)
    assert len(config["witness"]) == len(dict(pack.live().named_parameters()))


def test_bits_make_a_trained_adapter_as_small_as_an_extracted_one(
    pack: Pack, tmp_path: Path
) -> None:
    model = get_peft_model(pack.live(), DareConfig(drop_rate=0.9, bits=4))
    few_steps(model)
    model.save_pretrained(tmp_path)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert size == (pack.adapters["a"] / "adapter_model.safetensors").stat().st_size
    loaded = PeftModel.from_pretrained(pack.live(), tmp_path)
    assert torch.equal(logits(loaded, INPUTS), logits(patched(pack, tmp_path), INPUTS))
    moved = (logits(model, INPUTS) - logits(pack.live(), INPUTS)).norm()
    assert (logits(loaded, INPUTS) - logits(model, INPUTS)).norm() < 0.2 * moved


def test_rounded_values_are_no_checkpoint_to_resume_from(pack: Pack, tmp_path: Path) -> None:
    model = get_peft_model(pack.live(), DareConfig(drop_rate=0.9, bits=4))
    model.save_pretrained(tmp_path)
    with pytest.raises(AdapterFormatError, match="train with bits=None"):
        model.load_adapter(tmp_path, "default", is_trainable=True)


@pytest.mark.parametrize("kind", ["a", "b", "c"])
@pytest.mark.parametrize("route", ["peft", "transformers"])
def test_a_stored_adapter_goes_on_training(
    pack: Pack, route: str, kind: str, tmp_path: Path
) -> None:
    directory = pack.adapters[kind]
    if route == "peft":
        model = PeftModel.from_pretrained(pack.live(), directory, is_trainable=True)
    else:
        model = pack.live()
        report = model.load_adapter(str(directory), is_trainable=True)
        assert not report.missing_keys
    assert torch.equal(logits(model, INPUTS), logits(patched(pack, directory), INPUTS))
    losses = few_steps(model)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(patched(pack, tmp_path), INPUTS), logits(model, INPUTS))


def test_an_adapter_that_answers_does_not_train(pack: Pack) -> None:
    model = PeftModel.from_pretrained(pack.live(), pack.adapters["a"])
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_task_head_trains_whole_and_is_saved(make_pack: PackMaker, tmp_path: Path) -> None:
    pack = ARCHITECTURES["bert"].pack(make_pack, "bert")
    recipe = DareConfig(target_modules=["query"], task_type="SEQ_CLS", drop_rate=0.5)
    model = get_peft_model(pack.live(), recipe)
    before = model.base_model.model.classifier.weight.clone()
    loss = model(**INPUTS, labels=torch.zeros(4, dtype=torch.int64)).loss
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert not torch.equal(model.base_model.model.classifier.weight + 0, before + 0)
    model.save_pretrained(tmp_path)
    assert Adapter.open(tmp_path).is_new("classifier.weight")
    again = PeftModel.from_pretrained(pack.live(), tmp_path)
    assert torch.equal(logits(again, INPUTS), logits(model, INPUTS))
    assert torch.equal(logits(patched(pack, tmp_path), INPUTS), logits(model, INPUTS))


def test_targeted_embeddings_are_not_saved_whole(pack: Pack, tmp_path: Path) -> None:
    for targets in (["embed_tokens", "lm_head"], ".*embed_tokens"):
        model = get_peft_model(pack.live(), DareConfig(target_modules=targets))
        model.save_pretrained(tmp_path)
        assert all(".dare_" in key for key in Adapter.open(tmp_path).config.tensors())
