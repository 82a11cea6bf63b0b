"""Casting, copying and compiling a model with adapters."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from dare_adapters.errors import PatchedModelError, PatchedStateWarning
from tests.conftest import Pack, PackMaker, all_bytes, read_checkpoint, tiny_llama
from tests.hf.packs import expect
from tests.test_patch import assert_holds, dense_deltas, expected_sum

TOKENS = torch.tensor([[1, 5, 9, 30, 2, 77]])


@pytest.mark.parametrize("start", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "cast",
    [
        lambda model: model.to(torch.float32),
        lambda model: model.to(torch.bfloat16),
        lambda model: model.half(),
        lambda model: model.double(),
        lambda model: torch.nn.ModuleDict({"inside": model}).half(),
    ],
    ids=["float32", "bfloat16", "half", "double", "half from outside"],
)
def test_a_cast_with_adapters_is_the_cast_base_with_adapters(
    make_pack: PackMaker, start: torch.dtype, cast: Callable[[PreTrainedModel], object]
):
    pack = make_pack(f"cast-{start}", dtype=start)
    model, plain = pack.loaded(), pack.live()
    cast(plain)
    base = {name: value.clone() for name, value in plain.state_dict().items()}
    model.set_dare_adapter({"a": 1.0, "b": 0.5})
    cast(model)
    assert model.dtype == plain.dtype
    assert model.active_dare_adapters == ["a", "b"]
    parts = [(dense_deltas(pack, "a"), 1.0), (dense_deltas(pack, "b"), 0.5)]
    assert_holds(model, expected_sum(base, parts))
    model.disable_dare_adapters()
    assert all_bytes(model) == all_bytes(plain)


def copy_of(model: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(model)


def pickled(model: PreTrainedModel) -> PreTrainedModel:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("duplicate", [copy_of, pickled])
def test_a_copy_of_a_model_with_active_adapters_lives_on_its_own(
    model: PreTrainedModel,
    pack: Pack,
    duplicate: Callable[[PreTrainedModel], PreTrainedModel],
    tmp_path: Path,
):
    model.set_dare_adapter({"a": 1.0, "c": 0.5})
    other = duplicate(model)
    before = all_bytes(model)
    assert all_bytes(other) == before
    assert other.dare_adapters == ["a", "b", "c"]
    assert other.active_dare_adapters == ["a", "c"]
    with pytest.raises(PatchedModelError):
        other.save_pretrained(tmp_path / "copy")
    with pytest.warns(PatchedStateWarning):
        other.state_dict()
    other.set_dare_adapter("b")
    assert_holds(other, expect(pack, {"b": 1.0}))
    other.disable_dare_adapters()
    assert_holds(other, read_checkpoint(pack.base))
    other.delete_dare_adapter("a")
    assert all_bytes(model) == before
    assert model.active_dare_adapters == ["a", "c"]
    assert model.dare_adapters == ["a", "b", "c"]
    model.disable_dare_adapters()
    assert_holds(model, read_checkpoint(pack.base))
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, other(TOKENS).logits)


def test_a_pickled_model_is_not_much_larger_than_its_weights(model: PreTrainedModel):
    plain = len(pickle.dumps(LlamaForCausalLM(tiny_llama()).to(torch.bfloat16)))
    model.set_dare_adapter("a")
    assert len(pickle.dumps(model)) < 2.5 * plain


def test_a_compiled_model_sees_every_switch_of_adapters(model: PreTrainedModel):
    plain = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    seen = []
    with torch.no_grad():
        for chosen in ([], ["a"], ["b", "c"], []):
            model.set_dare_adapter(chosen)
            plain.set_dare_adapter(chosen)
            seen.append(compiled(TOKENS).logits)
            torch.testing.assert_close(seen[-1], plain(TOKENS).logits)
    torch._dynamo.reset()
    assert torch.equal(seen[0], seen[3])
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_a_compiled_model_without_adapters_compiles_in_one_graph(pack: Pack):
    torch._dynamo.reset()
    model = pack.live()
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)(TOKENS).logits
        torch.testing.assert_close(compiled, model(TOKENS).logits)
    torch._dynamo.reset()
