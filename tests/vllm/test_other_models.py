"""Other models through every way: what is refused is refused by name, the rest is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from dare_adapters.errors import UnsupportedParameterError
from tests.conftest import Pack, PackMaker, raw_bytes
from tests.vllm.dense_models import merged_densely
from tests.vllm.engines import PROMPTS, Answer, Engine
from tests.vllm.models import KINDS, SPREAD
from tests.vllm.requests import request_for

pytest.importorskip("vllm", reason="needs the environment of make test-vllm")
pytestmark = pytest.mark.vllm

from dare_vllm import set_mixture  # noqa: E402 (only where vLLM is)

Starter = Callable[..., Engine]
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 136}
GEMMA: dict[str, Any] = {**GROUPED, "head_dim": 32, "query_pre_attn_scalar": 32}
GPT2: dict[str, Any] = {
    "vocab_size": 97,
    "n_embd": 128,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS: dict[str, Any] = {
    **GROUPED,
    "moe_intermediate_size": 96,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "phi": ("Phi", {**SIZES, "intermediate_size": 136}),
    "phi3": ("Phi3", GROUPED),
    "gemma": ("Gemma", {**GROUPED, "head_dim": 32}),
    "gemma2": ("Gemma2", GEMMA),
    "gemma3": ("Gemma3", GEMMA),
    "gpt2": ("GPT2", GPT2),
    "opt": ("OPT", {**SIZES, "ffn_dim": 136, "word_embed_proj_dim": 128}),
    "gpt_neox": ("GPTNeoX", {**SIZES, "intermediate_size": 136}),
    "olmo2": ("Olmo2", GROUPED),
    "starcoder2": ("Starcoder2", GROUPED),
    "stablelm": ("StableLm", GROUPED),
    "granite": ("Granite", GROUPED),
    "cohere": ("Cohere", GROUPED),
    "mistral": ("Mistral", {**GROUPED, "sliding_window": None}),
    "smollm3": ("SmolLM3", GROUPED),
    "qwen2_moe": ("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 64}),
    "qwen3_moe": ("Qwen3Moe", {**EXPERTS, "head_dim": 32}),
    "olmoe": ("Olmoe", {**EXPERTS, "intermediate_size": 96}),
}


# Single entries of these cannot be written: experts that the CPU's kernel packs, and a bias that is
# made anew by each loading.
EXPERTS_PACKED = r"packs its experts for the CPU kernel; swap with route='reload'"
NEVER_SPARSE = {
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "olmoe"), EXPERTS_PACKED),
    "phi": r"lm_head\.bias is loaded in a way of its own.*route='reload'",
}
# vLLM has no LoRA, and so no adapters by request, for these.
NEVER_BY_REQUEST = ("gpt2", "stablelm")
# Parts of these have no place where a change by request could be added.
REFUSED_BY_REQUEST = {"cohere": r"input_layernorm\.weight.*no change can be added to a LayerNorm"}


@dataclass
class Said:
    """What a model says to one prompt: greedy tokens, and every log-probability at each step."""

    tokens: list[int]
    logprobs: torch.Tensor


@dataclass
class Case:
    """Files of a kind of model, and what the models that they merge to say to all prompts."""

    name: str
    pack: Pack
    said: dict[str, list[Said]]


def say(model: PreTrainedModel, prompt: list[int], steps: int = 8) -> Said:
    """Continue a prompt, without a cache."""
    tokens: list[int] = []
    logprobs = []
    for _ in range(steps):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, -1].float()
        logprobs.append(torch.log_softmax(logits, -1))
        tokens.append(int(logits.argmax()))
    return Said(tokens, torch.stack(logprobs))


def assert_the_same(answers: Sequence[Answer], said: Sequence[Said]) -> None:
    """Every greedy token is the model's own, every log-probability within 1e-4."""
    for answer, expected in zip(answers, said, strict=True):
        assert answer.tokens == expected.tokens
        for step, found in zip(expected.logprobs, answer.logprobs, strict=True):
            for token, logprob in found.items():
                assert abs(float(step[token]) - logprob) < 1e-4


@pytest.fixture(scope="module", params=list(MODELS))
def case(request: pytest.FixtureRequest, make_pack: PackMaker) -> Case:
    """A base and adapters of fine-tunes that changed every parameter."""
    name, settings = MODELS[request.param]
    config_class: type[PreTrainedConfig] = getattr(
        transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config"
    )
    model_class: type[PreTrainedModel] = getattr(
        transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    )
    pack = make_pack(
        f"other-{request.param}",
        model_class,
        config_class(**settings),
        dtype=torch.float32,
        kinds=KINDS,
        spread=SPREAD,
    )
    models = {
        "base": pack.live(torch.float32),
        **{kind: merged_densely(pack, {kind: 1.0}) for kind in "ab"},
    }
    for model in models.values():
        model.set_attn_implementation("eager")  # Gemma 2 caps scores, which only that one does
    # Before an engine: where vLLM has no model of its own it alters transformers' classes.
    said = {own: [say(model, list(prompt)) for prompt in PROMPTS] for own, model in models.items()}
    return Case(request.param, pack, said)


def test_at_load_and_swapped_it_is_the_merged_model(case: Case, start_engine: Starter) -> None:
    a, b = (str(case.pack.adapters[name]) for name in "ab")
    extra = {"plain_weights": True, "adapters": [a]}
    engine = start_engine(case.pack.base, load_format="dare", model_loader_extra_config=extra)
    assert_the_same(engine.greedy(), case.said["a"])
    routes = ["reload"]
    if case.name in NEVER_SPARSE:
        before = engine.weights()
        with pytest.raises(UnsupportedParameterError, match=NEVER_SPARSE[case.name]):
            set_mixture(engine.llm, [b], route="sparse")
        found = engine.weights()
        assert {n for n in before if raw_bytes(before[n]) != raw_bytes(found[n])} == set()
    else:
        routes.append("sparse")
    for route in routes:
        set_mixture(engine.llm, [b], route=route)
        assert_the_same(engine.greedy(), case.said["b"])
        set_mixture(engine.llm, [a], route=route)
        assert_the_same(engine.greedy(), case.said["a"])


def test_per_request_each_row_is_its_own_merged_model(case: Case, start_engine: Starter) -> None:
    if case.name in NEVER_BY_REQUEST:
        with pytest.raises(ValueError, match="does not support LoRA"):
            start_engine(case.pack.base, enable_lora=True, max_loras=2)
        return
    engine = start_engine(case.pack.base, enable_lora=True, max_loras=2)
    requests = [None, *(request_for(case.pack.adapters[name]) for name in "ab")]
    if case.name in REFUSED_BY_REQUEST:
        with pytest.raises(Exception, match=REFUSED_BY_REQUEST[case.name]):
            engine.llm.llm_engine.add_lora(requests[1])
        assert_the_same(engine.greedy(), case.said["base"])
        return
    answers = engine.greedy(
        [prompt for _ in requests for prompt in PROMPTS],
        lora_request=[request for request in requests for _ in PROMPTS],
    )
    for number, said in enumerate(case.said.values()):
        assert_the_same(answers[number * len(PROMPTS) : (number + 1) * len(PROMPTS)], said)
