"""Way 1 in a real engine: what was added while loading is what was exported, and says the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from dare_adapters.errors import (
    ArchitectureMismatchError,
    BaseMismatchError,
    DareError,
    UnsupportedParameterError,
)
from tests.conftest import PackMaker, raw_bytes
from tests.vllm.conftest import Packs, exported, merged
from tests.vllm.engines import Engine, assert_says_the_same
from tests.vllm.models import KINDS, SPREAD, llama

pytest.importorskip("vllm", reason="needs the environment of make test-vllm")
pytestmark = pytest.mark.vllm

from dare_vllm import set_mixture  # noqa: E402 (only where vLLM is)

Starter = Callable[..., Engine]
PLAIN = {"plain_weights": True}


@pytest.mark.parametrize("kind", ["llama", "tied-llama-bf16", "qwen2", "mixtral"])
def test_an_engine_loaded_with_an_adapter_has_the_bits_of_the_exported_checkpoint(
    kind: str, packs: Packs, start_engine: Starter, tmp_path: Path
) -> None:
    pack = packs(kind)
    adapters = {"adapters": [str(pack.adapters["a"])]}
    loaded = start_engine(
        pack.base, load_format="dare", model_loader_extra_config={**PLAIN, **adapters}
    )
    found = loaded.weights()
    answers = loaded.greedy()
    assert_says_the_same(answers, merged(pack, {"a": 1.0}))
    full = start_engine(
        exported(pack, "a", tmp_path / "full"), load_format="dare", model_loader_extra_config=PLAIN
    )
    expected = full.weights()
    assert found.keys() == expected.keys()
    assert {n for n in found if raw_bytes(found[n]) != raw_bytes(expected[n])} == set()
    assert [answer.tokens for answer in full.greedy()] == [answer.tokens for answer in answers]


def test_an_engine_loaded_with_a_combination_says_what_the_merged_model_says(
    packs: Packs, start_engine: Starter
) -> None:
    pack = packs("llama")
    mixture = {
        "adapters": [
            {"path": str(pack.adapters["a"]), "weight": 0.75},
            {"path": str(pack.adapters["b"]), "weight": 0.5},
        ],
        "combination_type": "ties",
        "density": 0.5,
        "majority_sign_method": "frequency",
    }
    # Packed for the CPU, as anybody's engine is.
    engine = start_engine(pack.base, load_format="dare", model_loader_extra_config=mixture)
    expected = merged(
        pack,
        {"a": 0.75, "b": 0.5},
        combination_type="ties",
        density=0.5,
        majority_sign_method="frequency",
    )
    assert_says_the_same(engine.greedy(), expected)


def test_a_wrong_base_is_refused_before_anything_is_served(
    packs: Packs, start_engine: Starter, tmp_path: Path
) -> None:
    pack = packs("llama")
    other = pack.live()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.add_(0.25)
    other.save_pretrained(tmp_path / "other")
    adapters = {"adapters": [str(pack.adapters["a"])]}
    with pytest.raises(BaseMismatchError, match=r"up_proj\.weight \(off by 0\.25\)"):
        start_engine(tmp_path / "other", load_format="dare", model_loader_extra_config=adapters)


def test_an_unknown_field_of_the_mixture_is_refused_by_name(
    packs: Packs, start_engine: Starter
) -> None:
    pack = packs("llama")
    extra = {"adapters": [str(pack.adapters["a"])], "densty": 0.5}
    with pytest.raises((DareError, ValueError), match="densty"):
        start_engine(pack.base, load_format="dare", model_loader_extra_config=extra)


@pytest.mark.parametrize("tied", [True, False])
def test_added_vocabulary_rows_need_a_model_that_is_built_for_them(
    tied: bool, make_pack: PackMaker, start_engine: Starter
) -> None:
    pack = make_pack(
        f"vllm-grown-{tied}",
        config=llama(tie_word_embeddings=tied),
        kinds={"a": KINDS["b"]},
        dtype=torch.float32,
        spread=SPREAD,
        change=lambda model: model.resize_token_embeddings(102, mean_resizing=False),
    )
    adapter = str(pack.adapters["a"])
    extra = {**PLAIN, "adapters": [adapter]}
    with pytest.raises(
        ArchitectureMismatchError, match=r"--hf-overrides '\{\"vocab_size\": 102\}'"
    ):
        start_engine(pack.base, load_format="dare", model_loader_extra_config=extra)
    engine = start_engine(
        pack.base,
        load_format="dare",
        model_loader_extra_config=extra,
        hf_overrides={"vocab_size": 102},
    )
    live = pack.live()
    live.load_dare_adapter(adapter, adapter_name="once")
    prompts = [[1, 5, 99, 101], [1, 100]]
    assert_says_the_same(engine.greedy(prompts), live, prompts)
    with pytest.raises(ArchitectureMismatchError, match=r"\[102, 128\] now, \[97, 128\] then"):
        set_mixture(engine.llm, [])
    doubled = [{"path": adapter, "weight": 2.0}]
    live.set_dare_adapter({"once": 2.0})
    for route in ("reload", "sparse"):
        set_mixture(engine.llm, [adapter], route=route)
        set_mixture(engine.llm, doubled, route=route)
        assert_says_the_same(engine.greedy(prompts), live, prompts)


def test_a_head_that_the_fine_tune_unties_needs_a_model_that_has_one(
    make_pack: PackMaker, start_engine: Starter
) -> None:
    def untie(model: PreTrainedModel) -> None:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())

    pack = make_pack(
        "vllm-untied",
        config=llama(tie_word_embeddings=True),
        kinds={"a": KINDS["b"]},
        dtype=torch.float32,
        spread=SPREAD,
        change=untie,
    )
    extra = {"adapters": [str(pack.adapters["a"])]}
    with pytest.raises(UnsupportedParameterError, match=r"lm_head\.weight is changed by .* ties"):
        start_engine(pack.base, load_format="dare", model_loader_extra_config=extra)
    engine = start_engine(
        pack.base,
        load_format="dare",
        model_loader_extra_config=extra,
        hf_overrides={"tie_word_embeddings": False},
    )
    untied = pack.model_class.from_pretrained(
        pack.base, config=llama(tie_word_embeddings=False), dtype=torch.float32
    )
    untied.load_dare_adapter(pack.adapters["a"])
    assert_says_the_same(engine.greedy(), untied.eval())
