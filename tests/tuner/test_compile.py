"""A compiled model: switching adapters compiles nothing again, in whichever way they are on it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch._dynamo.utils import counters
from transformers import LlamaForCausalLM

from tests.conftest import Pack, PackMaker, tiny_llama
from tests.tuner.architectures import ids, logits

INPUTS = {"input_ids": ids()}


@pytest.fixture
def pack(make_pack: PackMaker) -> Pack:
    """Of one block: compiling takes longer than all the rest."""
    config = tiny_llama(num_hidden_layers=1)
    return make_pack("tuner-compiled", LlamaForCausalLM, config, dtype=torch.float32, spread=0.02)


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch._dynamo.reset()
    counters.clear()


def compiled(model: nn.Module) -> nn.Module:
    made: nn.Module = torch.compile(model, backend="eager")
    return made


def graphs() -> int:
    """How many have been compiled."""
    return counters["stats"]["unique_graphs"]


def loaded(pack: Pack) -> PeftModel:
    model = PeftModel.from_pretrained(pack.live(), pack.adapters["a"], adapter_name="a")
    for name in ("b", "c"):
        model.load_adapter(pack.adapters[name], name)
    return model.eval()


def test_patched_adapters_are_switched_in_one_graph(pack: Pack) -> None:
    model = pack.live()
    for name in ("a", "b"):
        model.load_dare_adapter(pack.adapters[name], adapter_name=name, activate=False)
    fast = compiled(model)
    logits(fast, INPUTS)
    before = graphs()
    assert before > 0
    for name in ("a", "b", "a"):
        model.set_dare_adapter(name)
        assert torch.equal(logits(fast, INPUTS), logits(model, INPUTS)), name
    model.disable_dare_adapters()
    logits(fast, INPUTS)
    assert graphs() == before


def test_merged_adapters_are_switched_in_one_graph(pack: Pack) -> None:
    model = loaded(pack)
    inner = model.get_base_model()
    fast = compiled(inner)
    for name in ("a", "b", "a", "c"):
        model.set_adapter(name)
        model.merge_adapter()
        assert torch.equal(logits(fast, INPUTS), logits(inner, INPUTS)), name
        assert graphs() == 1, name
        assert not counters["graph_break"]
        model.unmerge_adapter()


def switch(model: PeftModel, fast: nn.Module, name: str) -> None:
    model.set_adapter(name)
    assert torch.equal(logits(fast, INPUTS), logits(model, INPUTS)), name


def mix(model: PeftModel, fast: nn.Module, names: str) -> None:
    inputs = {**INPUTS, "adapter_names": names.split()}
    assert torch.equal(logits(fast, inputs), logits(model, inputs)), names


@pytest.mark.parametrize(
    ("use", "ways"),
    [
        (switch, ("a", "b", "a", "c")),
        (mix, ("a b __base__", "b a c", "a a a", "__base__ __base__ c", "c b b")),
    ],
)
def test_unmerged_adapters_are_switched_without_new_graphs(
    pack: Pack, use: Callable[[PeftModel, nn.Module, str], None], ways: tuple[str, ...]
) -> None:
    model = loaded(pack)
    fast = compiled(model)
    use(model, fast, ways[0])
    before = graphs()
    assert before > 0
    for way in ways[1:]:
        use(model, fast, way)
    assert graphs() == before
