"""Ways 1 and 2 on two ranks, each a process of its own that holds its part of every weight."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.vllm.conftest import Packs, merged
from tests.vllm.engines import Engine, assert_says_the_same

pytest.importorskip("vllm", reason="needs the environment of make test-vllm")
pytestmark = pytest.mark.vllm

from dare_vllm import set_mixture  # noqa: E402 (only where vLLM is)


def test_two_ranks_load_and_swap_as_one(
    packs: Packs, start_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    # By default each rank wants a memory node of its own.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    pack = packs("llama")
    a, b = str(pack.adapters["a"]), str(pack.adapters["b"])
    engine = start_engine(
        pack.base,
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        load_format="dare",
        model_loader_extra_config={"adapters": [a], "plain_weights": True},
    )
    assert_says_the_same(engine.greedy(), merged(pack, {"a": 1.0}))
    for route in ("reload", "sparse"):
        done = set_mixture(engine.llm, [a, {"path": b, "weight": 0.5}], route=route)
        assert done["route"] == route
        assert_says_the_same(engine.greedy(), merged(pack, {"a": 1.0, "b": 0.5}))
        set_mixture(engine.llm, [], route=route)
        assert_says_the_same(engine.greedy(), pack.live().float())
