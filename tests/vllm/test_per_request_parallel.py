"""Way 3 on two ranks, each a process of its own that holds its part of every delta."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.conftest import Pack
from tests.vllm.engines import PROMPTS, Engine, assert_says_the_same
from tests.vllm.requests import merged_densely, request_for

pytest.importorskip("vllm", reason="needs the environment of make test-vllm")
pytestmark = pytest.mark.vllm


# Two pipeline stages do not run on a CPU in vLLM 0.32, adapters or not.
@pytest.mark.parametrize("kind", ["tied-llama-bf16", "qwen2"])
def test_two_ranks_answer_as_one(
    kind: str,
    packs: Callable[[str], Pack],
    start_engine: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from dare_vllm.per_request import mix_path

    # One group of cores cannot be shared out among ranks that bind themselves to theirs.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    pack = packs(kind)
    engine = start_engine(
        pack.base,
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        enable_lora=True,
        max_loras=3,
    )
    parts = [(str(pack.adapters["a"]), 0.6), (str(pack.adapters["b"]), 0.4)]
    requests = [
        None,
        request_for(pack.adapters["a"]),
        request_for(pack.adapters["c"]),
        request_for(mix_path(parts)),
    ]
    weights = [{}, {"a": 1.0}, {"c": 1.0}, {"a": 0.6, "b": 0.4}]
    answers = engine.greedy(
        [prompt for _ in requests for prompt in PROMPTS],
        lora_request=[request for request in requests for _ in PROMPTS],
    )
    for number, own in enumerate(weights):
        here = slice(number * len(PROMPTS), (number + 1) * len(PROMPTS))
        model = merged_densely(pack, own) if own else pack.live(torch.float32)
        assert_says_the_same(answers[here], model)
