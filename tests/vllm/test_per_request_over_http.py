"""Way 3 over HTTP: one server, OpenAI clients that choose by name, adapters that come and go."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests.conftest import Pack
from tests.vllm.bad_adapters import BAD_ADAPTERS
from tests.vllm.dense_models import merged_densely
from tests.vllm.engines import PROMPTS, assert_says_the_same
from tests.vllm.loras import add_lora, write_lora
from tests.vllm.server import Server

pytest.importorskip("vllm", reason="needs the environment of make test-vllm")
from dare_vllm.per_request.residency import DIRECTORY, Residency

openai = pytest.importorskip("openai")
pytestmark = pytest.mark.vllm

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture(scope="module")
def lora(pack: Pack, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of the base."""
    return write_lora(pack.live(torch.float32), tmp_path_factory.mktemp("lora") / "lora")


@pytest.fixture(scope="module")
def shelf(pack: Pack, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of adapters that nobody loaded."""
    root = tmp_path_factory.mktemp("shelf")
    shutil.copytree(pack.adapters["c"], root / "on-the-shelf")
    return root


@pytest.fixture(scope="module")
def server(
    pack: Pack, lora: Path, shelf: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server with two adapters and a LoRA, in which more can be loaded.

    It is started by a process with an engine of its own, which publishes what it holds too.
    """
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("DARE_VLLM_ADAPTERS", str(shelf))
        environment.setenv(DIRECTORY, str(tmp_path_factory.mktemp("another's")))
        Residency(adapters={"another's": 1}, swaps=1).publish()
        found = Server(
            tmp_path_factory.mktemp("server"),
            "--load-at-run-time",
            pack.base,
            *(f"math={pack.adapters['a']}", f"chat={pack.adapters['b']}", f"low-rank={lora}"),
            *("--served-model-name", "base", "--max-model-len", 256, "--skip-tokenizer-init"),
            *("--max-loras", 4, "--max-cpu-loras", 6, "--num-gpu-blocks-override", 64),
        )
    yield found
    found.close()


@pytest.fixture(scope="module")
def models(pack: Pack, lora: Path) -> dict[str, PreTrainedModel]:
    """What each name must answer like."""
    return {
        "base": pack.live(torch.float32),
        "math": merged_densely(pack, {"a": 1.0}),
        "chat": merged_densely(pack, {"b": 1.0}),
        "low-rank": add_lora(pack.live(torch.float32), lora),
        "math*0.6+chat*0.4": merged_densely(pack, {"a": 0.6, "b": 0.4}),
    }


def test_clients_at_once_are_each_answered_by_the_model_they_named(
    server: Server, models: dict[str, PreTrainedModel]
) -> None:
    jobs = [(name, prompt) for prompt in PROMPTS for name in models]
    with ThreadPoolExecutor(len(jobs)) as clients:
        answers = list(clients.map(lambda job: server.greedy(*job), jobs))
    for answer, (name, prompt) in zip(answers, jobs, strict=True):
        assert_says_the_same([answer], models[name], [prompt])
    served = {model.id for model in server.client.models.list()}
    assert set(models) <= served  # the mix is one of them from its first use


def test_an_adapter_is_found_by_its_name_in_the_directory(server: Server, pack: Pack) -> None:
    expected = merged_densely(pack, {"c": 1.0})
    assert_says_the_same([server.greedy("on-the-shelf", PROMPTS[0])], expected, PROMPTS[:1])
    expected = merged_densely(pack, {"c": 0.5, "a": 0.5})
    answer = server.greedy("on-the-shelf*0.5+math*0.5", PROMPTS[0])
    assert_says_the_same([answer], expected, PROMPTS[:1])


@pytest.mark.parametrize("name", ["../shelf/on-the-shelf", "nobody", "on-the-shelf/..", "a/b/c"])
def test_a_name_that_stands_for_nothing_is_a_404(name: str, server: Server) -> None:
    with pytest.raises(openai.NotFoundError):
        server.greedy(name, PROMPTS[0])


@pytest.mark.parametrize(
    ("name", "reason"),
    [("math+nobody", "'nobody', which is neither"), ("math+low-rank*2", "no DARE adapter")],
)
def test_a_mix_that_cannot_be_made_is_a_400_with_the_reason(
    name: str, reason: str, server: Server
) -> None:
    with pytest.raises(openai.BadRequestError, match=reason):
        server.greedy(name, PROMPTS[0])


@pytest.mark.parametrize("kind", list(BAD_ADAPTERS))
def test_a_bad_adapter_is_a_400_with_the_reason_and_others_are_unharmed(
    kind: str,
    server: Server,
    pack: Pack,
    models: dict[str, PreTrainedModel],
    shelf: Path,
    tmp_path: Path,
) -> None:
    make, reason = BAD_ADAPTERS[kind]
    path = make(pack, tmp_path)
    refused = server.post(LOAD, {"lora_name": "bad", "lora_path": str(path)})
    assert refused.status_code == 400, refused.text
    assert "cannot be served" in refused.text
    assert reason in refused.json()["error"]["message"]
    with pytest.raises(openai.NotFoundError):
        server.greedy("bad", PROMPTS[0])
    name = kind.replace(" ", "-")
    shutil.copytree(path, shelf / name)  # the same when a name leads to it
    with pytest.raises(openai.APIStatusError) as asking:
        server.greedy(name, PROMPTS[0])
    assert asking.value.status_code == 400
    assert reason in str(asking.value)
    answer = server.greedy("math", PROMPTS[1])
    assert_says_the_same([answer], models["math"], [PROMPTS[1]])


def test_a_path_that_is_not_there_is_a_404(server: Server, tmp_path: Path) -> None:
    body = {"lora_name": "gone", "lora_path": str(tmp_path / "gone")}
    assert server.post(LOAD, body).status_code == 404


def test_a_name_stands_for_what_was_loaded_last(server: Server, pack: Pack) -> None:
    for kind in ("c", "a"):  # the prefix cache must not answer for the one before
        body = {"lora_name": "new", "lora_path": str(pack.adapters[kind])}
        assert server.post(LOAD, body).status_code == 200
        prompt = PROMPTS[1] * 10
        assert_says_the_same(
            [server.greedy("new", prompt)], merged_densely(pack, {kind: 1.0}), [prompt]
        )
        assert server.post(UNLOAD, {"lora_name": "new"}).status_code == 200


def test_metrics_tell_what_is_held(server: Server, pack: Pack) -> None:
    server.greedy("math", PROMPTS[0])
    lines = server.get("/metrics").text.splitlines()
    samples = [line.rpartition(" ") for line in lines if line[0] != "#"]
    found = {name: float(value) for name, _, value in samples}
    assert len(found) == len(samples)  # a scrape with a series twice is refused by Prometheus
    assert "another's" not in "".join(found)
    assert 1 <= found['vllm:dare_adapters_resident{rank="0"}'] <= 6
    one = found['vllm:dare_adapter_bytes{adapter="math",rank="0"}']
    stored = (pack.adapters["a"] / "adapter_model.safetensors").stat().st_size
    assert stored <= one < 3 * stored
    assert found['vllm:dare_resident_bytes{rank="0"}'] >= one
    assert found['vllm:dare_slot_swap_seconds_count{rank="0"}'] >= 1
    assert found['vllm:dare_slot_swap_seconds_sum{rank="0"}'] > 0
