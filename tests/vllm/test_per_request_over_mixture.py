"""Way 3 over weights that hold a mixture: adapters are added to it, their base proved on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dare_adapters
from dare_adapters.errors import DareError
from tests.conftest import Pack
from tests.vllm.bad_adapters import BAD_ADAPTERS
from tests.vllm.dense_models import merged_densely
from tests.vllm.engines import PROMPTS, Engine, assert_says_the_same
from tests.vllm.requests import request_for

pytest.importorskip("vllm", reason="needs the environment of make test-vllm")
pytestmark = pytest.mark.vllm

from dare_vllm import set_mixture  # noqa: E402 (only where vLLM is)

Starter = Callable[..., Engine]


def settings(pack: Pack, **mixture: Any) -> dict[str, Any]:
    """Of an engine with a mixture of `b` at half weight."""
    extra = {"adapters": [{"path": str(pack.adapters["b"]), "weight": 0.5}], **mixture}
    return {
        "load_format": "dare",
        "model_loader_extra_config": extra,
        "enable_lora": True,
        "max_loras": 3,
    }


@pytest.mark.parametrize("kind", ["llama", "tied-llama-bf16", "qwen2", "mixtral"])
def test_an_adapter_is_added_to_a_mixture_that_was_there_from_the_start(
    kind: str, packs: Callable[[str], Pack], start_engine: Starter, tmp_path: Path
) -> None:
    pack = packs(kind)
    engine = start_engine(pack.base, **settings(pack))
    # What a mixture makes is rounded to the checkpoint's dtype before an adapter is added to it.
    mixed = tmp_path / "mixed"
    dare_adapters.export(pack.base, pack.adapters["b"], mixed, weight=0.5, progress=False)
    over = replace(pack, base=mixed)
    requests = [None, request_for(pack.adapters["a"]), request_for(pack.adapters["c"])]
    parts: list[dict[str, float]] = [{}, {"a": 1.0}, {"c": 1.0}]
    answers = engine.greedy(
        [prompt for _ in requests for prompt in PROMPTS],
        lora_request=[request for request in requests for _ in PROMPTS],
    )
    for number, own in enumerate(parts):
        here = slice(number * len(PROMPTS), (number + 1) * len(PROMPTS))
        assert_says_the_same(answers[here], merged_densely(over, own))


def test_the_mixture_of_a_method_is_what_the_weights_are_compared_with(
    packs: Callable[[str], Pack], start_engine: Starter
) -> None:
    pack = packs("llama")
    how = {"combination_type": "dare_ties", "density": 0.5, "seed": 3}
    paths = [str(pack.adapters[name]) for name in "bc"]
    engine = start_engine(pack.base, **settings(pack, adapters=paths, **how))
    own = request_for(pack.adapters["a"])
    engine.greedy(lora_request=[own] * len(PROMPTS))  # it is not refused
    set_mixture(engine.llm, [])
    expected = merged_densely(pack, {"a": 1.0})
    assert_says_the_same(engine.greedy(lora_request=[own] * len(PROMPTS)), expected)


def test_an_adapter_may_first_come_after_a_swap(
    packs: Callable[[str], Pack], start_engine: Starter
) -> None:
    pack = packs("llama")
    engine = start_engine(pack.base, enable_lora=True, max_loras=3)
    set_mixture(engine.llm, [str(pack.adapters["c"])])
    own = request_for(pack.adapters["a"])
    expected = merged_densely(pack, {"c": 1.0, "a": 1.0})
    assert_says_the_same(engine.greedy(lora_request=[own] * len(PROMPTS)), expected)
    set_mixture(engine.llm, [])
    expected = merged_densely(pack, {"b": 1.0})
    later = request_for(pack.adapters["b"])
    assert_says_the_same(engine.greedy(lora_request=[later] * len(PROMPTS)), expected)


@pytest.mark.parametrize("bad", list(BAD_ADAPTERS))
def test_a_bad_adapter_is_refused_over_a_mixture_too(
    bad: str, packs: Callable[[str], Pack], start_engine: Starter, tmp_path: Path
) -> None:
    pack = packs("llama")
    engine = start_engine(pack.base, **settings(pack))
    make, reason = BAD_ADAPTERS[bad]
    with pytest.raises(Exception, match=r"adapter 'bad' cannot be served") as refused:
        engine.llm.llm_engine.add_lora(request_for(make(pack, tmp_path), "bad"))
    assert reason in str(refused.value)
    assert_says_the_same(engine.greedy(), merged_densely(pack, {"b": 0.5}))


def test_weights_that_are_not_base_and_mixture_take_no_adapter(
    packs: Callable[[str], Pack], start_engine: Starter
) -> None:
    pack = packs("llama")
    engine = start_engine(pack.base, **settings(pack), seed=1)

    def spoil(model: torch.nn.Module) -> None:
        model.model.norm.weight.data.add_(0.5)

    engine.llm.apply_model(spoil)
    with pytest.raises((DareError, RuntimeError), match=r"mixture in it make: model\.norm\.weight"):
        engine.llm.llm_engine.add_lora(request_for(pack.adapters["a"]))
