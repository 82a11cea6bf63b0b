"""Gram matrices compared with XᵀX / n of inputs that other hooks caught."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import MixtralForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dare_adapters.errors import DareError
from dare_adapters.live import locate
from dare_adapters.statistics import gram_matrices
from dare_adapters.statistics import memory as memory_module
from dare_adapters.statistics.gram import linear_weights
from tests.conftest import read_checkpoint
from tests.statistics import bert, gpt2, lively, llama, token_batches
from tests.test_live import MODELS, interleaved, mixtral_config, rotated, transposed

Batch = dict[str, torch.Tensor]


@contextmanager
def caught_inputs(model: PreTrainedModel) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Every input of every linear module, by the module's name."""
    found: dict[str, list[torch.Tensor]] = {}

    def catch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: object) -> None:
            found.setdefault(name, []).append(inputs[0].detach().clone())

        return hook

    handles = [
        module.register_forward_hook(catch(name))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    ]
    yield found
    for handle in handles:
        handle.remove()


def mergelm_loop(model: PreTrainedModel, batches: list[Batch]) -> dict[str, torch.Tensor]:
    """The running mean that MergeLM's regmean_merging keeps, by the weight's live name."""
    means: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    with caught_inputs(model) as caught, torch.no_grad():
        for batch in batches:
            model(**batch)
    for name, inputs in caught.items():
        for given in inputs:
            x = given.reshape(-1, given.shape[-1]).double()
            before, count = means.get(name, 0.0), counts.get(name, 0)
            means[name] = (before * count + x.T @ x) / (count + len(x))
            counts[name] = count + len(x)
    return {f"{name}.weight": mean for name, mean in means.items()}


def assert_alike(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        scale = float(value.abs().max())
        torch.testing.assert_close(found[name].double(), value, rtol=1e-4, atol=1e-5 * scale)


def unlabelled(batches: list[Batch]) -> list[Batch]:
    return [{k: v for k, v in b.items() if k != "labels"} for b in batches]


@pytest.mark.parametrize("make", [bert, llama, gpt2])
def test_gram_matrices_are_mergelms(make: Callable[[], PreTrainedModel]):
    model = make()
    batches = [*token_batches(2, 4), *token_batches(1, 1, length=5, seed=7)]
    expected = mergelm_loop(model, unlabelled(batches))
    # GPT-2's head is its embedding: RegMean averages embeddings.
    if make is gpt2:
        del expected["lm_head.weight"]
        expected = {name: gram[None] for name, gram in expected.items()}
    assert_alike(gram_matrices(model, batches), expected)


def test_padding_counts_unless_it_is_masked():
    model, batches = bert(), unlabelled(token_batches(2, 4))
    with caught_inputs(model) as caught, torch.no_grad():
        for batch in batches:
            model(**batch)
    found = gram_matrices(model, batches, mask_padding=True)
    for name, inputs in caught.items():
        rows = []
        for x, batch in zip(inputs, batches, strict=True):
            a_token_each = x.dim() == 3  # the pooler and the classifier see one row an example
            rows.append(x[batch["attention_mask"].bool()] if a_token_each else x)
        dense = torch.cat(rows).double()
        torch.testing.assert_close(
            found[f"{name}.weight"].double(), dense.T @ dense / len(dense), rtol=1e-4, atol=1e-6
        )
    counted = gram_matrices(model, batches)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert not torch.allclose(found[name], counted[name], rtol=1e-2)
    assert torch.equal(found["classifier.weight"], counted["classifier.weight"])


def test_routers_see_flattened_tokens_and_their_padding_is_masked_too():
    model, batches = (
        lively(MixtralForCausalLM(mixtral_config())),
        token_batches(1, 3, labels=None),
    )
    with caught_inputs(model) as caught, torch.no_grad():
        model(**batches[0])
    found = gram_matrices(model, batches, mask_padding=True)
    (x,) = caught["model.layers.0.self_attn.q_proj"]
    dense = x[batches[0]["attention_mask"].bool()]
    assert torch.allclose(
        found["model.layers.0.self_attn.q_proj.weight"], dense.T @ dense / len(dense), rtol=1e-4
    )
    assert not any("experts" in name for name in found)  # fused tensors, not linear layers


@pytest.mark.parametrize(
    ("make", "layer", "parts"),
    [
        (interleaved, "mlp.gate_up_proj", ["mlp.gate_proj.weight", "mlp.up_proj.weight"]),
        (transposed, "mlp.down_proj", ["mlp.down.kernel"]),
        (rotated, "self_attn.q_proj", ["self_attn.wq.weight"]),
    ],
)
def test_checkpoint_weights_of_one_layer_share_its_gram_matrix(
    make: Callable[[], PreTrainedModel], layer: str, parts: list[str]
):
    model, batches = lively(make()), token_batches(2, 2, labels=None)
    prefix = "model.layers.1."
    if any(place is None for place in locate(model, [prefix + part for part in parts]).values()):
        pytest.skip("this transformers loses the layer's name when it undoes this conversion")
    expected = mergelm_loop(model, batches)[f"{prefix}{layer}.weight"].float()
    found = gram_matrices(model, batches)
    for part in parts:
        gram = found[prefix + part]
        assert gram.data_ptr() == found[prefix + parts[0]].data_ptr()
        assert gram.dim() == (3 if make is transposed else 2)
        torch.testing.assert_close(gram.view_as(expected), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "input_axis"), [("gpt2", 0), ("llama", 1), ("phi3", 1), ("mixtral", 1)]
)
def test_the_input_axis_is_that_of_the_checkpoint_weight(
    kind: str, input_axis: int, tmp_path: Path
):
    model = lively(MODELS[kind]())
    model.save_pretrained(tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    weights = linear_weights(model)
    assert any("attn" in name for name in weights)
    found = gram_matrices(model, token_batches(1, 2, labels=None))
    assert found.keys() == weights.keys() <= checkpoint.keys()
    for name, weight in weights.items():
        assert weight.input_axis == input_axis
        inputs = checkpoint[name].shape[input_axis]
        assert found[name].shape == ((1, inputs, inputs) if input_axis == 0 else (inputs, inputs))
        # What the gram matrix is for: the mean squared output of the layer.
        stored = checkpoint[name].T if input_axis == 0 else checkpoint[name]
        assert float((stored @ found[name].view(inputs, inputs) @ stored.T).diagonal().min()) >= 0
    assert linear_weights(transposed())["model.layers.0.mlp.down.kernel"].input_axis == 0


def test_a_head_that_is_the_embedding_is_left_out():
    tied, free = (gram_matrices(m, token_batches(1, 2)) for m in (gpt2(), llama()))
    assert "lm_head.weight" in free
    assert not any("wte" in name or "lm_head" in name for name in tied)


def test_a_layer_that_runs_twice_counts_both_inputs_and_one_that_never_runs_has_no_gram():
    model = llama()
    layer = model.model.layers[0]
    layer.mlp.up_proj = layer.mlp.gate_proj  # one module under two names
    layer.idle = nn.Linear(3, 3)
    batches = token_batches(1, 2, labels=None)
    with caught_inputs(model) as caught, torch.no_grad():
        model(**batches[0])
    found = gram_matrices(model, batches)
    inputs = caught["model.layers.0.mlp.gate_proj"]
    assert len(inputs) == 2
    x = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs])
    name = "model.layers.0.mlp.gate_proj.weight"
    torch.testing.assert_close(found[name], x.T @ x / len(x), rtol=1e-4, atol=1e-6)
    assert not any("idle" in name for name in found)


def test_inputs_in_bfloat16_are_summed_in_float32():
    model = llama().to(torch.bfloat16)
    batches = token_batches(40, 4, labels=None)
    with caught_inputs(model) as caught, torch.no_grad():
        for batch in batches:
            model(**batch)
    x = torch.cat(caught["lm_head"]).reshape(-1, 16).double()
    found = gram_matrices(model, batches)["lm_head.weight"]
    torch.testing.assert_close(found.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)


def test_names_and_patterns_choose_layers_and_change_no_value():
    model, batches = bert(), token_batches(1, 2)
    whole = gram_matrices(model, batches)
    names = ["encoder.layer.0.output.dense.weight", "embeddings.word_embeddings.weight"]
    assert list(gram_matrices(model, batches, names=names)) == names[:1]
    some = gram_matrices(model, batches, include=["*.dense.weight"], exclude=["*pooler*"])
    assert len(some) == 3
    for name, value in some.items():
        assert torch.equal(value, whole[name])


def test_the_model_is_left_as_it_was():
    model = bert().train()
    gram_matrices(model, token_batches(1, 2))
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(IndexError):
        gram_matrices(model, [{"input_ids": torch.tensor([[99]])}])
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_has_no_gram_matrix_is_refused(monkeypatch: pytest.MonkeyPatch):
    model, batches = bert(), token_batches(1, 2)
    with pytest.raises(DareError, match="no linear layer ran"):
        gram_matrices(model, [])
    with pytest.raises(DareError, match="no linear layer ran"):
        gram_matrices(model, batches, include=["*LayerNorm*"])
    with pytest.raises(ValueError, match="leave no parameter"):
        gram_matrices(model, batches, include=["nothing"])
    monkeypatch.setattr(memory_module, "available_bytes", lambda: 1000)
    with pytest.raises(DareError, match=r"Gram matrices of 8 layers take .*--include"):
        gram_matrices(model, iter([None]))
    monkeypatch.undo()
    with torch.no_grad():
        model.bert.embeddings.LayerNorm.bias[0] = float("inf")
    with pytest.raises(DareError, match="is not finite"):
        gram_matrices(model, batches)
