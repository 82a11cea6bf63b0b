"""Way 3 in a real engine: each row of a batch is answered by its own merged model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import Pack
from tests.vllm.dense_models import merged_densely
from tests.vllm.engines import PROMPTS, Engine, assert_says_the_same
from tests.vllm.loras import add_lora, write_lora
from tests.vllm.requests import request_for
from tests.vllm.served import Served

pytest.importorskip("vllm", reason="needs the environment of make test-vllm")
pytestmark = pytest.mark.vllm

Starter = Callable[..., Engine]
SETTINGS = {"enable_lora": True, "max_loras": 4, "max_lora_rank": 8, "max_cpu_loras": 8}
WEIGHTS = {"a": 0.6, "b": 0.4}


@pytest.fixture(scope="module", params=["llama", "tied-llama-bf16", "qwen2", "mixtral"])
def served(
    request: pytest.FixtureRequest,
    packs: Callable[[str], Pack],
    start_engine: Starter,
    tmp_path_factory: pytest.TempPathFactory,
) -> Served:
    """The base, two adapters, a mix of them, a mix in a directory, and a LoRA."""
    from dare_vllm.per_request import mix_path

    pack = packs(request.param)
    lora = write_lora(pack.live(torch.float32), tmp_path_factory.mktemp("lora") / "lora")
    paths = {name: pack.adapters[name] for name in WEIGHTS}
    requests = {
        "base": None,
        **{name: request_for(path) for name, path in paths.items()},
        "mix": request_for(mix_path([(str(paths[n]), w) for n, w in WEIGHTS.items()])),
        "lora": request_for(lora),
    }
    models = {
        "base": pack.live(torch.float32),
        **{name: merged_densely(pack, {name: 1.0}) for name in paths},
        "mix": merged_densely(pack, WEIGHTS),
        "lora": add_lora(pack.live(torch.float32), lora),
    }
    return Served(start_engine(pack.base, **SETTINGS), pack, requests, models)


@pytest.mark.parametrize("name", ["base", "a", "b", "mix", "lora"])
def test_a_request_alone_is_answered_by_its_merged_model(name: str, served: Served) -> None:
    served.check([name])


def test_a_batch_of_all_of_them_is_answered_row_by_row(served: Served) -> None:
    served.check(["base", "a", "mix", "lora", "b"])
    served.check(["lora", "b", "base"])  # other slots, other order


def test_prompts_are_scored_by_their_own_model(served: Served) -> None:
    served.check_scores()


def test_rows_of_the_base_stay_the_base_beside_adapters(served: Served) -> None:
    alone = served.engine.greedy(lora_request=[None] * len(PROMPTS))
    others = [served.requests[name] for name in ("a", "lora", "mix")]
    beside = served.engine.greedy(
        [*PROMPTS, *PROMPTS], lora_request=[*[None] * len(PROMPTS), *others]
    )
    assert [answer.tokens for answer in beside[: len(PROMPTS)]] == [a.tokens for a in alone]
    assert_says_the_same(beside[: len(PROMPTS)], served.models["base"], tolerance=2e-5)


def test_an_evicted_adapter_comes_back_though_its_directory_is_gone(
    served: Served, tmp_path: Path
) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(served.pack.adapters["a"], copy)
    own = request_for(copy)
    assert_says_the_same(
        served.engine.greedy(lora_request=[own] * len(PROMPTS)), served.models["a"]
    )
    shutil.rmtree(copy)
    for _ in range(SETTINGS["max_cpu_loras"]):  # as many others push it out
        other = request_for(served.pack.adapters["b"])
        served.engine.greedy([PROMPTS[0]], tokens=1, lora_request=[other])
    held = served.engine.llm.llm_engine.list_loras()
    assert own.lora_int_id not in held
    assert_says_the_same(
        served.engine.greedy(lora_request=[own] * len(PROMPTS)), served.models["a"]
    )
