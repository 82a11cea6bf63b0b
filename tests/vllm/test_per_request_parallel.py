"""Way 3 on two ranks, each a process of its own that holds its part of every delta."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import Pack
from tests.vllm.dense_models import add_densely, merged_densely
from tests.vllm.engines import PROMPTS, Engine, assert_says_the_same
from tests.vllm.grown import grow
from tests.vllm.requests import request_for

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


def test_tokens_that_adapters_add_are_shared_out_among_ranks(
    packs: Callable[[str], Pack],
    start_engine: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    pack = packs("llama")
    # 97 and 90 are 187 rows, padded to 192: the first rank has 96 of the base, the second the last
    # of it and all that are added.
    many, few = grow(pack, "a", 90, tmp_path / "many"), grow(pack, "b", 2, tmp_path / "few")
    engine = start_engine(
        pack.base,
        load_format="dare",
        model_loader_extra_config={"spare_rows": 90},
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        enable_lora=True,
        max_loras=3,
    )
    prompts = [[1, 97, 186, 130, 5], [1, 5, 97, 98, 33], [1, 5, 9, 96]]
    answers = engine.greedy(
        prompts, lora_request=[request_for(many), request_for(few), None], tokens=12
    )
    models = [add_densely(pack, {many: 1.0}), add_densely(pack, {few: 1.0})]
    for answer, prompt, model in zip(
        answers, prompts, [*models, pack.live(torch.float32)], strict=True
    ):
        assert_says_the_same([answer], model, [prompt])
