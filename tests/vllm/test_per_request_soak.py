"""Many adapters through few slots, the base swapped beneath them: every answer, and memory."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import PreTrainedModel

import dare_adapters
from dare_adapters import Adapter
from dare_adapters.kernels import PackedDelta
from tests.conftest import Pack
from tests.vllm.dense_models import add_densely
from tests.vllm.engines import Engine, assert_says_the_same
from tests.vllm.requests import request_for

pytest.importorskip("vllm", reason="needs the environment of make test-vllm")
pytestmark = pytest.mark.vllm

ADAPTERS = 20
SLOTS = 4
REQUESTS = 200
ROUNDS = 20
GROWTH_BYTES = 128 << 20


@pytest.fixture(scope="module")
def adapters(pack: Pack, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Twenty adapters of twenty fine-tunes, of several widths and drop rates."""
    root = tmp_path_factory.mktemp("soak")
    found = []
    for number in range(ADAPTERS):
        model = pack.live(torch.float32)
        generator = torch.Generator().manual_seed(100 + number)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        model.save_pretrained(root / "finetuned")
        found.append(root / f"adapter-{number}")
        dare_adapters.extract(
            pack.base,
            root / "finetuned",
            found[-1],
            drop_rate=(0.5, 0.75, 0.9)[number % 3],
            bits=(1, 4, 8, 16)[number % 4],
            on_large_delta="ignore",
            progress=False,
        )
    return found


@pytest.fixture(scope="module")
def models(pack: Pack, adapters: list[Path]) -> list[PreTrainedModel]:
    """What each adapter's answers must be."""
    return [add_densely(pack, {path: 1.0}) for path in adapters]


@pytest.fixture(scope="module")
def models_over_mixture(pack: Pack, adapters: list[Path]) -> list[PreTrainedModel]:
    """The same while the first adapter is part of the weights that all share."""
    base = {adapters[0]: 1.0}
    return [add_densely(pack, {**base, path: 1.0 + base.get(path, 0.0)}) for path in adapters]


def test_two_hundred_requests_over_twenty_adapters_in_four_slots(
    pack: Pack,
    adapters: list[Path],
    models: list[PreTrainedModel],
    models_over_mixture: list[PreTrainedModel],
    start_engine: Callable[..., Engine],
) -> None:
    from dare_vllm import set_mixture

    engine = start_engine(
        pack.base,
        enable_lora=True,
        max_loras=SLOTS,
        max_cpu_loras=SLOTS + 2,
        max_num_seqs=16,
        load_format="dare",
        model_loader_extra_config={"plain_weights": True},
    )
    chosen = random.Random(0)
    base, base_now, models_now = pack.live(torch.float32), pack.live(torch.float32), models
    live: dict[int, Any] = {}
    packed: list[int] = []
    asked = before = 0
    for turn in range(ROUNDS):
        if turn == ROUNDS // 4:  # every kind of request was seen
            before = psutil.Process().memory_info().rss
        if turn == ROUNDS // 3:
            set_mixture(engine.llm, [str(adapters[0])])
            base_now, models_now = models[0], models_over_mixture
        if turn == 2 * ROUNDS // 3:
            set_mixture(engine.llm, [])
            base_now, models_now = base, models
        jobs = []
        for _ in range(REQUESTS // ROUNDS):
            number = chosen.randrange(-1, ADAPTERS)  # -1: the base
            if number >= 0 and (number not in live or chosen.random() < 0.2):
                if number in live:  # unloaded, then loaded anew
                    engine.llm.llm_engine.remove_lora(live[number].lora_int_id)
                live[number] = request_for(adapters[number])
            prompt = [chosen.randrange(3, 97) for _ in range(chosen.randrange(2, 40))]
            jobs.append((number, prompt))
        answers = engine.greedy(
            [prompt for _, prompt in jobs],
            tokens=4,
            lora_request=[live[number] if number >= 0 else None for number, _ in jobs],
        )
        for answer, (number, prompt) in zip(answers, jobs, strict=True):
            model = models_now[number] if number >= 0 else base_now
            assert_says_the_same([answer], model, [prompt])
        asked += len(jobs)
        held = engine.llm.llm_engine.list_loras()
        assert len(held) <= SLOTS + 2
        packed.append(_packed_deltas())
    assert asked == REQUESTS
    # What leaves the cache leaves memory: loads and unloads leave nothing behind.
    per_adapter = len([name for name in Adapter.open(adapters[0]) if "norm" not in name])
    assert max(packed) <= (SLOTS + 2) * per_adapter
    assert packed[-1] > 0
    # vLLM itself grows with every request, adapters or not; a leak of each load would be more.
    assert psutil.Process().memory_info().rss - before < GROWTH_BYTES


def _packed_deltas() -> int:
    """How many packed matrices are alive."""
    gc.collect()
    return sum(isinstance(one, PackedDelta) for one in gc.get_objects())
