"""Way 3 with tokens that the base does not have: rows that an engine spares for adapters."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import dare_adapters
from tests.conftest import Pack, raw_bytes
from tests.vllm.dense_models import add_densely
from tests.vllm.engines import PROMPTS, Engine, assert_says_the_same
from tests.vllm.grown import grow
from tests.vllm.loras import add_lora, write_lora
from tests.vllm.requests import request_for
from tests.vllm.served import Served

pytest.importorskip("vllm", reason="needs the environment of make test-vllm")
pytestmark = pytest.mark.vllm

from dare_vllm import set_mixture  # noqa: E402 (only where vLLM is)

Starter = Callable[..., Engine]
OWN, SPARE = 97, 5
SETTINGS = {
    "load_format": "dare",
    "model_loader_extra_config": {"spare_rows": SPARE},
    "enable_lora": True,
    "max_loras": 6,
    "max_lora_rank": 8,
}
# What each may name in a prompt, beside the tokens of the base.
ADDED = {"base": 0, "plain": 0, "lora": 0, "three": 3, "five": 5, "mix": 5}


@dataclass
class Grown(Served):
    """With the adapters' directories; each is asked of the tokens that it added, too."""

    paths: dict[str, Path]

    def prompts(self, name: str) -> list[list[int]]:
        return [[*PROMPTS[0], *range(OWN, OWN + ADDED[name])], *PROMPTS[1:]]


@pytest.fixture(scope="module", params=["llama", "tied-llama-bf16"])
def served(
    request: pytest.FixtureRequest,
    packs: Callable[[str], Pack],
    start_engine: Starter,
    tmp_path_factory: pytest.TempPathFactory,
) -> Grown:
    """The base, adapters that add no, three and five tokens, a mix of them, and a LoRA."""
    from dare_vllm.per_request import mix_path

    pack, root = packs(request.param), tmp_path_factory.mktemp("grown")
    paths = {
        "plain": pack.adapters["a"],
        "three": grow(pack, "a", 3, root / "three"),
        "five": grow(pack, "b", 5, root / "five"),
    }
    lora = write_lora(pack.live(torch.float32), root / "lora")
    mix = {paths["plain"]: 0.5, paths["three"]: 0.3, paths["five"]: 0.4}
    requests = {
        "base": None,
        "lora": request_for(lora),
        **{name: request_for(path, name) for name, path in paths.items()},
        "mix": request_for(mix_path([(str(path), weight) for path, weight in mix.items()])),
    }
    models = {
        "base": pack.live(torch.float32),
        "lora": add_lora(pack.live(torch.float32), lora),
        **{name: add_densely(pack, {path: 1.0}) for name, path in paths.items()},
        "mix": add_densely(pack, mix),
    }
    return Grown(start_engine(pack.base, **SETTINGS), pack, requests, models, paths)


@pytest.mark.parametrize("name", list(ADDED))
def test_each_is_answered_by_its_merged_model(name: str, served: Grown) -> None:
    served.check([name])


def test_a_batch_of_all_is_answered_row_by_row_with_tokens_of_their_own(served: Grown) -> None:
    names = list(ADDED)
    said = served.check(names)
    for number, name in enumerate(names):
        most = max(max(tokens) for tokens in said[number * len(PROMPTS) :][: len(PROMPTS)])
        assert most < OWN + ADDED[name]
    assert any(token >= OWN for tokens in said for token in tokens)  # the added ones are said
    served.check(["five", "base", "three"])  # other slots, other order


def test_every_log_probability_is_there_and_none_is_of_a_token_that_is_not(served: Grown) -> None:
    from vllm import SamplingParams

    names = list(ADDED)
    outputs = served.engine.llm.generate(
        [{"prompt_token_ids": PROMPTS[0]} for _ in names],
        SamplingParams(temperature=0, max_tokens=1, logprobs=5, detokenize=False, ignore_eos=True),
        lora_request=[served.requests[name] for name in names],
        use_tqdm=False,
    )
    for name, output in zip(names, outputs, strict=True):
        found = output.outputs[0].logprobs[0]
        assert all(token < OWN + ADDED[name] for token in found)


def test_prompts_are_scored_by_their_own_model(served: Grown) -> None:
    served.check_scores()


def sample(engine: Engine, request: Any) -> list[list[int]]:
    """Tokens drawn hot, so that every one of the vocabulary comes up."""
    from vllm import SamplingParams

    hot = SamplingParams(temperature=2, seed=7, max_tokens=60, detokenize=False, ignore_eos=True)
    outputs = engine.llm.generate(
        [{"prompt_token_ids": prompt} for prompt in PROMPTS],
        hot,
        lora_request=[request] * len(PROMPTS),
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_sampling_stays_in_the_vocabulary_of_each(served: Grown) -> None:
    for name in ("base", "lora", "three", "five"):
        drawn = {t for tokens in sample(served.engine, served.requests[name]) for t in tokens}
        assert max(drawn) < OWN + ADDED[name]
        assert (max(drawn) >= OWN) == bool(ADDED[name])


def test_a_token_that_the_adapter_does_not_have_is_refused_before_any_step(
    served: Grown,
) -> None:
    for name in ("base", "plain", "lora", "three"):
        prompt = [1, OWN + ADDED[name]]
        with pytest.raises(Exception, match=rf"token {prompt[-1]} is out of vocabulary"):
            served.engine.greedy([prompt], lora_request=[served.requests[name]])
    served.check(["three", "base"])


def test_more_rows_than_are_spared_are_refused_with_the_setting_that_makes_room(
    served: Grown, tmp_path: Path
) -> None:
    six = request_for(grow(served.pack, "c", 6, tmp_path), "six")
    with pytest.raises(Exception, match=r"adapter 'six' cannot be served.*\"spare_rows\": 6"):
        served.engine.llm.llm_engine.add_lora(six)
    served.check(["five"])


def test_a_token_with_an_embedding_and_no_logit_is_refused_by_name(
    served: Grown, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    finetuned = tmp_path / "finetuned"
    grow(served.pack, "a", 3, tmp_path)
    tensors = load_file(finetuned / "model.safetensors")
    if "lm_head.weight" not in tensors:
        pytest.skip("of a tied head there are no two opinions")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:OWN].contiguous()
    save_file(tensors, finetuned / "model.safetensors", metadata={"format": "pt"})
    dare_adapters.extract(
        served.pack.base,
        finetuned,
        tmp_path / "half",
        drop_rate=0.5,
        on_large_delta="ignore",
        progress=False,
    )
    with pytest.raises(Exception, match=r"lm_head: it does not get the 3 vocabulary rows"):
        served.engine.llm.llm_engine.add_lora(request_for(tmp_path / "half"))


@pytest.mark.parametrize("route", ["reload", "sparse"])
def test_a_swap_changes_the_base_beneath_added_tokens(
    route: str, packs: Callable[[str], Pack], start_engine: Starter, tmp_path: Path
) -> None:
    pack = packs("llama")
    extra = {"spare_rows": SPARE, "plain_weights": True}
    engine = start_engine(pack.base, **{**SETTINGS, "model_loader_extra_config": extra})
    three = grow(pack, "a", 3, tmp_path)
    prompt = [*PROMPTS[0], 98, 99]
    own = request_for(three)
    alone = add_densely(pack, {three: 1.0})
    assert_says_the_same(engine.greedy([prompt], lora_request=[own]), alone, [prompt])
    b = pack.adapters["b"]
    set_mixture(engine.llm, [b], route=route)
    both = add_densely(pack, {three: 1.0, b: 1.0})
    assert_says_the_same(engine.greedy([prompt], lora_request=[own]), both, [prompt])
    assert_says_the_same(engine.greedy(), add_densely(pack, {b: 1.0}))
    set_mixture(engine.llm, [], route=route)
    assert_says_the_same(engine.greedy([prompt], lora_request=[own]), alone, [prompt])
    kept = {name: raw_bytes(value) for name, value in engine.weights().items()}
    assert kept == {name: raw_bytes(value) for name, value in engine.at_start.items()}


def test_a_mix_has_the_tokens_of_whichever_part_has_most(served: Grown, tmp_path: Path) -> None:
    from dare_vllm.per_request import mix_path
    from dare_vllm.per_request.token_check import added_rows_at

    parts = [(str(served.paths[name]), 0.5) for name in ("plain", "three", "five")]
    beside = [shutil.copytree(path, tmp_path / str(n)) for n, (path, _) in enumerate(parts)]
    dare_adapters.combine(beside, tmp_path / "mix", [0.5] * 3, as_mix=True)
    assert added_rows_at(mix_path(parts)) == 5
    assert added_rows_at(mix_path(parts[:2])) == 3
    assert added_rows_at(mix_path(parts[:1])) == 0
    assert added_rows_at(str(tmp_path / "mix")) == 5
    assert added_rows_at(served.requests["lora"].lora_path) == 0


def test_beside_spare_rows_the_base_and_adapters_sample_what_they_sample_without(
    packs: Callable[[str], Pack], start_engine: Starter
) -> None:
    pack = packs("llama")
    without = {key: SETTINGS[key] for key in ("enable_lora", "max_loras", "max_lora_rank")}
    drawn = []
    for settings in (without, SETTINGS):
        engine = start_engine(pack.base, **settings)
        drawn.append([sample(engine, own) for own in (None, request_for(pack.adapters["a"]))])
    assert drawn[0] == drawn[1]
