"""Layers that the other models lack: norms of heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.conftest import PackMaker
from tests.vllm.dense_models import merged_densely
from tests.vllm.engines import PROMPTS, Engine, assert_says_the_same
from tests.vllm.models import KINDS, SPREAD
from tests.vllm.requests import request_for

pytest.importorskip("vllm", reason="needs the environment of make test-vllm")
pytestmark = pytest.mark.vllm

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 128,
    "intermediate_size": 136,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "qwen3: norms of queries and keys": (Qwen3ForCausalLM, Qwen3Config(**SIZES)),
}


@pytest.mark.parametrize("name", list(MODELS))
def test_every_layer_of_other_models_takes_part(
    name: str, make_pack: PackMaker, start_engine: Callable[..., Engine]
) -> None:
    model_class, config = MODELS[name]
    kind = name.partition(":")[0]
    pack = make_pack(
        f"layers-{kind}", model_class, config, dtype=torch.float32, kinds=KINDS, spread=SPREAD
    )
    engine = start_engine(pack.base, enable_lora=True, max_loras=2)
    requests = [None, request_for(pack.adapters["a"]), request_for(pack.adapters["b"])]
    answers = engine.greedy(
        [prompt for _ in requests for prompt in PROMPTS],
        lora_request=[request for request in requests for _ in PROMPTS],
    )
    models = [
        pack.live(torch.float32),
        merged_densely(pack, {"a": 1.0}),
        merged_densely(pack, {"b": 1.0}),
    ]
    for number, model in enumerate(models):
        assert_says_the_same(answers[number * len(PROMPTS) : (number + 1) * len(PROMPTS)], model)
