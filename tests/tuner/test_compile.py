"""Switching adapters that are patched in place compiles nothing again."""

from __future__ import annotations

import torch
from torch._dynamo.utils import counters

from tests.conftest import PackMaker
from tests.tuner.architectures import ARCHITECTURES, logits


def test_switching_patched_adapters_compiles_nothing_again(make_pack: PackMaker) -> None:
    architecture = ARCHITECTURES["llama"]
    pack = architecture.pack(make_pack, "llama")
    model = pack.live()
    for name in ("a", "b"):
        model.load_dare_adapter(pack.adapters[name], adapter_name=name, activate=False)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, backend="eager")
    inputs = architecture.inputs()
    logits(compiled, inputs)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    for name in ("a", "b", "a"):
        model.set_dare_adapter(name)
        assert torch.equal(logits(compiled, inputs), logits(model, inputs)), name
    model.disable_dare_adapters()
    logits(compiled, inputs)
    assert counters["stats"]["unique_graphs"] == graphs
