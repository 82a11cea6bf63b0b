"""Way 1 in a real engine: what was added while loading is what was exported, and says the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dare_adapters.errors import BaseMismatchError, DareError
from tests.conftest import Pack, raw_bytes
from tests.vllm.conftest import exported, merged
from tests.vllm.engines import Engine, assert_says_the_same

pytest.importorskip("vllm", reason="needs the environment of make test-vllm")
pytestmark = pytest.mark.vllm

Starter = Callable[..., Engine]
PLAIN = {"plain_weights": True}


@pytest.mark.parametrize("kind", ["llama", "tied-llama-bf16", "qwen2", "mixtral"])
def test_an_engine_loaded_with_an_adapter_has_the_bits_of_the_exported_checkpoint(
    kind: str, packs: Callable[[str], Pack], start_engine: Starter, tmp_path: Path
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
    packs: Callable[[str], Pack], start_engine: Starter
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
    packs: Callable[[str], Pack], start_engine: Starter, tmp_path: Path
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
    packs: Callable[[str], Pack], start_engine: Starter
) -> None:
    pack = packs("llama")
    extra = {"adapters": [str(pack.adapters["a"])], "densty": 0.5}
    with pytest.raises((DareError, ValueError), match="densty"):
        start_engine(pack.base, load_format="dare", model_loader_extra_config=extra)
