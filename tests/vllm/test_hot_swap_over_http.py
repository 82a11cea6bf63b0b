"""Way 2 over HTTP: one server, an OpenAI client, and swaps between and during its requests."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from transformers import PreTrainedModel

from tests.conftest import Pack
from tests.vllm.conftest import Packs, merged
from tests.vllm.engines import assert_says_the_same
from tests.vllm.server import Completion, Server

pytest.importorskip("vllm", reason="needs the environment of make test-vllm")
pytestmark = pytest.mark.vllm

PATH = "/v1/dare/mixture"
PROMPTS = [[1, 5, 9, 33, 12], [1, 70, 71, 72, 3], [1 + (7 * place) % 90 for place in range(100)]]


@pytest.fixture(scope="module")
def server(pack: Pack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose mixture may change, with so few KV blocks that requests are preempted."""
    found = Server(
        tmp_path_factory.mktemp("server"),
        "--hot-swap",
        pack.base,
        *("--load-format", "dare", "--model-loader-extra-config", '{"plain_weights": true}'),
        *("--served-model-name", "base", "--max-model-len", 256, "--skip-tokenizer-init"),
        *("--block-size", 32, "--num-gpu-blocks-override", 12),
        api_key="secret",
    )
    yield found
    found.close()


@pytest.fixture(autouse=True)
def _base_again(server: Server) -> Iterator[None]:
    yield
    assert server.post(PATH, {"adapters": []}).status_code == 200


def assert_serves(server: Server, model: PreTrainedModel) -> None:
    """What it says is what a transformers model says."""
    answers = [server.greedy("base", prompt) for prompt in PROMPTS]
    assert_says_the_same(answers, model, PROMPTS)


@pytest.mark.parametrize("route", ["reload", "sparse"])
def test_a_posted_mixture_is_what_the_server_says_next(
    route: str, server: Server, pack: Pack
) -> None:
    assert_serves(server, pack.live().float())
    a, b = str(pack.adapters["a"]), str(pack.adapters["b"])
    done = server.post(PATH, {"adapters": [a], "route": route})
    assert done.status_code == 200, done.text
    assert done.json()["route"] == route
    assert_serves(server, merged(pack, {"a": 1.0}))
    parts = [{"path": a, "weight": 0.75}, {"path": b, "weight": 0.5}]
    how = {"combination_type": "ties", "density": 0.5}
    assert server.post(PATH, {"adapters": parts, **how, "route": route}).status_code == 200
    assert_serves(server, merged(pack, {"a": 0.75, "b": 0.5}, **how))
    found = server.get(PATH).json()
    assert [part["path"] for part in found["adapters"]] == [a, b]
    assert found["combination_type"] == "ties"


def test_what_cannot_be_had_is_a_400_with_the_reason_and_the_engine_lives(
    server: Server, pack: Pack, packs: Packs, tmp_path: Path
) -> None:
    a = str(pack.adapters["a"])
    assert server.post(PATH, {"adapters": [a]}).status_code == 200
    shutil.copytree(a, tmp_path / "truncated")
    weights = tmp_path / "truncated" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused: list[tuple[Any, str]] = [
        ({"adapters": [str(packs("qwen2").adapters["a"])]}, "BaseMismatchError"),
        ({"adapters": [str(tmp_path / "truncated")]}, "AdapterFormatError"),
        ({"adapters": [str(tmp_path / "nowhere")]}, "AdapterNotFoundError"),
        ({"adapters": [a], "combination_type": "tie"}, "CombinationError"),
        ({"adapters": [a], "densty": 1}, "CombinationError"),
        ({"adapters": [a], "route": "fast"}, "ValueError"),
        ({"adapters": [a], "in_flight": "ignore"}, "DareError"),
        ([a], "DareError"),
    ]
    for body, kind in refused:
        answer = server.post(PATH, body)
        assert answer.status_code == 400, (body, answer.text)
        assert answer.json()["error"]["type"] in (kind, "CheckpointMismatchError"), answer.text
        assert len(answer.json()["error"]["message"]) > 20
    assert_serves(server, merged(pack, {"a": 1.0}))


@pytest.mark.parametrize("in_flight", ["wait", "abort"])
def test_no_answer_is_begun_by_the_old_weights_and_ended_by_the_new(
    in_flight: str, server: Server, pack: Pack
) -> None:
    prompts = [[1, 5 + number, 9, 33, 12] for number in range(8)]
    length = 90
    old = [server.greedy("base", prompt, length).tokens for prompt in prompts]
    a = str(pack.adapters["a"])
    assert server.post(PATH, {"adapters": [a]}).status_code == 200
    new = [server.greedy("base", prompt, length).tokens for prompt in prompts]
    assert all(one != other for one, other in zip(old, new, strict=True))
    assert server.post(PATH, {"adapters": []}).status_code == 200
    begun = threading.Barrier(len(prompts) + 1)

    def one(prompt: list[int]) -> Completion:
        begun.wait()
        return server.greedy("base", prompt, length)

    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = [pool.submit(one, prompt) for prompt in prompts]
        begun.wait()
        swapped = server.post(PATH, {"adapters": [a], "in_flight": in_flight})
        assert swapped.status_code == 200, swapped.text
        found = [answer.result() for answer in answers]
    for answer, before, after in zip(found, old, new, strict=True):
        if answer.ended == "abort":
            assert answer.tokens == before[: len(answer.tokens)]
        else:
            assert answer.tokens in (before, after)
    assert_serves(server, merged(pack, {"a": 1.0}))


def test_a_swap_needs_the_key_of_the_server(server: Server, pack: Pack) -> None:
    body = {"adapters": [str(pack.adapters["a"])]}
    answer = requests.post(f"{server.address}{PATH}", json=body, timeout=60)
    assert answer.status_code == 401
    assert requests.get(f"{server.address}{PATH}", timeout=60).status_code == 401
    assert server.get(PATH).json()["adapters"] == []


def test_the_metrics_tell_of_swaps(server: Server, pack: Pack) -> None:
    assert server.post(PATH, {"adapters": [str(pack.adapters["a"])]}).status_code == 200
    assert server.post(PATH, {"adapters": ["nowhere"]}).status_code == 400
    metrics = server.get("/metrics").text
    assert 'vllm:dare_swaps_total{result="done",route="sparse"}' in metrics
    assert 'vllm:dare_swaps_total{result="refused",route="auto"}' in metrics
    assert 'vllm:dare_swap_seconds_sum{phase="write",route="sparse"}' in metrics
    assert "vllm:dare_mixture_adapters 1.0" in metrics
