"""Way 2 in a real engine: the mixture changes between requests, all of it or nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dare_adapters
from dare_adapters import delta_method
from dare_adapters.combine.registry import _methods
from dare_adapters.delta import Delta
from dare_adapters.errors import (
    AdapterNotFoundError,
    BaseMismatchError,
    CombinationError,
    DareError,
    UnsupportedParameterError,
)
from tests.conftest import Pack, raw_bytes
from tests.vllm.conftest import MODELS, Packs, merged, save_lora
from tests.vllm.engines import Engine, assert_says_the_same
from tests.vllm.models import KINDS

pytest.importorskip("vllm", reason="needs the environment of make test-vllm")
pytestmark = pytest.mark.vllm

from dare_vllm import get_mixture, set_mixture  # noqa: E402 (only where vLLM is)
from dare_vllm.hot_swap.steps import SwapFailedError  # noqa: E402

# Of a Llama and of a Mixtral.
LATE = ("layers.1.mlp.up_proj.weight", "layers.1.block_sparse_moe.experts.2.w3.weight")
Starter = Callable[..., Engine]
# A prompt of three KV blocks, so that the prefix cache has something to answer from.
LONG = [[1 + (7 * place) % 90 for place in range(100)]]


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    """Names of parameters that are not the same, bit for bit."""
    return {name for name in one if raw_bytes(one[name]) != raw_bytes(other[name])}


# On the CPU vLLM packs experts for its kernel.
ROUTES = {kind: ("reload", "sparse") if kind != "mixtral" else ("reload",) for kind in MODELS}
CASES = [(kind, route) for kind, routes in ROUTES.items() for route in routes]

Swappable = Callable[[str], tuple[Pack, Engine]]


@pytest.fixture
def swappable(packs: Packs, start_engine: Starter) -> Iterator[Swappable]:
    """A pack, and an engine of its base whose weights both routes can reach; the base after it."""
    used: list[Engine] = []

    def start(kind: str) -> tuple[Pack, Engine]:
        pack = packs(kind)
        extra = {"plain_weights": True}
        used.append(start_engine(pack.base, load_format="dare", model_loader_extra_config=extra))
        return pack, used[-1]

    yield start
    for engine in used:
        set_mixture(engine.llm, [])


@pytest.mark.parametrize(("kind", "route"), CASES)
def test_each_mixture_says_what_its_merged_model_says(
    kind: str, route: str, swappable: Swappable
) -> None:
    pack, engine = swappable(kind)
    a, b, c = (str(pack.adapters[name]) for name in "abc")
    set_mixture(engine.llm, [], route=route)
    assert_says_the_same(engine.greedy(), pack.live().float())
    done = set_mixture(engine.llm, [a], route=route)
    assert done["route"] == route
    assert_says_the_same(engine.greedy(), merged(pack, {"a": 1.0}))
    parts = [{"path": b, "weight": 0.75}, {"path": c, "weight": -0.5}]
    how = {"combination_type": "dare_ties", "density": 0.5}
    set_mixture(engine.llm, parts, **how, route=route)
    assert_says_the_same(engine.greedy(), merged(pack, {"b": 0.75, "c": -0.5}, **how))


@pytest.mark.parametrize("kind", list(MODELS))
def test_every_route_makes_the_same_bits_and_the_base_comes_back(
    kind: str, swappable: Swappable
) -> None:
    pack, engine = swappable(kind)
    a, b = (str(pack.adapters[name]) for name in "ab")
    found = []
    for route in ROUTES[kind]:
        set_mixture(engine.llm, [{"path": b, "weight": 2.0}], route=route)
        set_mixture(engine.llm, [a, {"path": b, "weight": 0.5}], route=route)
        found.append(engine.weights())
        assert differing(found[0], found[-1]) == set()
        for _ in range(3):  # nothing accumulates
            set_mixture(engine.llm, [a], route=route)
            set_mixture(engine.llm, [], route=route)
        assert differing(engine.weights(), engine.at_start) == set()
    assert differing(found[0], engine.at_start) == set(found[0])  # the adapters change all


def test_a_lora_takes_part_in_a_mixture(swappable: Swappable, tmp_path: Path) -> None:
    pack, engine = swappable("llama")
    lora = save_lora(pack, tmp_path / "lora")
    expected = pack.live()
    expected.load_dare_adapter(pack.adapters["b"], adapter_name="b", activate=False)
    expected.load_dare_adapter(lora, adapter_name="lora", activate=False)
    expected.set_dare_adapter({"b": 0.5, "lora": 1.0})
    for route in ROUTES["llama"]:
        parts = [{"path": str(pack.adapters["b"]), "weight": 0.5}, str(lora)]
        set_mixture(engine.llm, parts, route=route)
        assert_says_the_same(engine.greedy(), expected)
        set_mixture(engine.llm, [], route=route)


@pytest.mark.parametrize("plain", [True, False])
def test_an_engine_that_serves_loras_is_swapped_beneath_them(
    plain: bool, packs: Packs, start_engine: Starter, tmp_path: Path
) -> None:
    from vllm.lora.request import LoRARequest

    pack = packs("llama")
    engine = start_engine(
        pack.base,
        load_format="dare",
        model_loader_extra_config={"plain_weights": plain},
        enable_lora=True,
        max_loras=1,
        max_lora_rank=8,
    )
    lora = save_lora(pack, tmp_path / "lora")
    request = LoRARequest("lora", 1, str(lora))
    alone, beneath = pack.live(), pack.live()
    alone.load_dare_adapter(lora)
    beneath.load_dare_adapter(pack.adapters["a"], adapter_name="a", activate=False)
    beneath.load_dare_adapter(lora, adapter_name="lora", activate=False)
    beneath.set_dare_adapter(["a", "lora"])
    for route in ("reload", "sparse") if plain else ("reload",):
        set_mixture(engine.llm, [str(pack.adapters["a"])], route=route)
        assert_says_the_same(engine.greedy(), merged(pack, {"a": 1.0}))
        assert_says_the_same(engine.greedy(lora_request=request), beneath)
        set_mixture(engine.llm, [], route=route)
        assert_says_the_same(engine.greedy(lora_request=request), alone)
        assert_says_the_same(engine.greedy(), pack.live())


def test_experts_packed_for_the_cpu_are_not_written_singly(swappable: Swappable) -> None:
    pack, engine = swappable("mixtral")
    with pytest.raises(UnsupportedParameterError, match=r"packs its experts for the CPU kernel"):
        set_mixture(engine.llm, [str(pack.adapters["a"])], route="sparse")
    assert set_mixture(engine.llm, [str(pack.adapters["a"])])["route"] == "reload"


def test_a_sparse_swap_writes_only_what_either_mixture_touches(swappable: Swappable) -> None:
    pack, engine = swappable("llama")
    everything = sum(weight.numel() for weight in pack.live().parameters())
    a, c = str(pack.adapters["a"]), str(pack.adapters["c"])
    set_mixture(engine.llm, [], route="reload")
    assert set_mixture(engine.llm, [], route="reload")["entries"] == everything
    assert set_mixture(engine.llm, [], route="sparse")["entries"] == 0
    once = set_mixture(engine.llm, [a], route="sparse")["entries"]
    assert 0.45 * everything < once < 0.55 * everything
    both = set_mixture(engine.llm, [c], route="sparse")["entries"]
    assert both < 0.7 * everything  # half of them and a quarter of them


@pytest.mark.parametrize("route", ["reload", "sparse"])
def test_a_prompt_longer_than_a_block_is_not_answered_from_the_old_weights(
    route: str, swappable: Swappable
) -> None:
    pack, engine = swappable("llama")
    set_mixture(engine.llm, [str(pack.adapters["a"])], route=route)
    assert_says_the_same(engine.greedy(LONG), merged(pack, {"a": 1.0}), LONG)
    set_mixture(engine.llm, [str(pack.adapters["b"])], route=route)
    assert_says_the_same(engine.greedy(LONG), merged(pack, {"b": 1.0}), LONG)


@pytest.fixture
def failing_method() -> Iterator[str]:
    """A combination type that cannot compute one of the last parameters."""

    @delta_method("fails_late")
    def fails_late(deltas: list[Delta], weights: list[float], *, name: str) -> Delta:
        return _Failing(deltas[0].shape) if name.endswith(LATE) else deltas[0]

    yield "fails_late"
    del _methods["fails_late"]


class _Failing(Delta):
    """A delta whose values cannot be had."""

    @property
    def entries_per_row(self) -> int:
        return self.columns

    def read(self, start: int, stop: int) -> tuple[None, torch.Tensor]:
        raise OSError("the disk is gone")


@pytest.mark.parametrize(
    ("kind", "route"), [("llama", "reload"), ("llama", "sparse"), ("mixtral", "reload")]
)
def test_a_swap_that_fails_halfway_leaves_the_old_mixture(
    kind: str, route: str, swappable: Swappable, failing_method: str
) -> None:
    pack, engine = swappable(kind)
    a, b = str(pack.adapters["a"]), str(pack.adapters["b"])
    set_mixture(engine.llm, [a], route=route)
    before, mixture = engine.weights(), get_mixture(engine.llm)
    with pytest.raises(SwapFailedError, match="the old mixture is back: OSError: the disk is gone"):
        set_mixture(engine.llm, [b], combination_type=failing_method, route=route)
    assert differing(engine.weights(), before) == set()
    assert get_mixture(engine.llm) == mixture
    assert_says_the_same(engine.greedy(), merged(pack, {"a": 1.0}))
    set_mixture(engine.llm, [b], route=route)
    assert_says_the_same(engine.greedy(), merged(pack, {"b": 1.0}))


@pytest.fixture(scope="module")
def stored_twice(packs: Packs, tmp_path_factory: pytest.TempPathFactory) -> Pack:
    """A pack whose base and fine-tunes store the head that their config ties."""
    pack, root = packs("tied-llama-bf16"), tmp_path_factory.mktemp("twice")
    for source in (pack.base, pack.finetuned["a"], pack.finetuned["b"]):
        copy = Path(shutil.copytree(source, root / source.name))
        tensors = load_file(copy / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    base = root / pack.base.name
    finetuned = {kind: root / pack.finetuned[kind].name for kind in "ab"}
    for kind, path in finetuned.items():
        dare_adapters.extract(
            base, path, root / kind, on_large_delta="ignore", progress=False, **KINDS[kind]
        )
    return Pack(base, finetuned, {kind: root / kind for kind in "ab"}, pack.model_class)


@pytest.mark.parametrize("route", ["reload", "sparse"])
def test_a_head_that_repeats_the_embedding_goes_with_it_and_comes_back_with_it(
    route: str, stored_twice: Pack, start_engine: Starter, failing_method: str
) -> None:
    pack = stored_twice
    engine = start_engine(
        pack.base,
        load_format="dare",
        model_loader_extra_config={"plain_weights": True},
        hf_overrides={"tie_word_embeddings": False},
    )
    assert_says_the_same(engine.greedy(), pack.live().float())
    before = engine.weights()
    a, b = str(pack.adapters["a"]), str(pack.adapters["b"])
    # Embedding and head have been written when it fails.
    with pytest.raises(SwapFailedError, match="the old mixture is back"):
        set_mixture(engine.llm, [b], combination_type=failing_method, route=route)
    assert differing(engine.weights(), before) == set()
    set_mixture(engine.llm, [a], route=route)
    found = engine.weights()
    assert raw_bytes(found["lm_head.weight"]) == raw_bytes(found["model.embed_tokens.weight"])
    assert_says_the_same(engine.greedy(), merged(pack, {"a": 1.0}))
    set_mixture(engine.llm, [], route=route)
    assert differing(engine.weights(), before) == set()


def test_what_cannot_be_had_is_refused_and_changes_nothing(
    packs: Packs, swappable: Swappable, tmp_path: Path
) -> None:
    pack, engine = swappable("llama")
    other = packs("qwen2")
    a = str(pack.adapters["a"])
    set_mixture(engine.llm, [a])
    before = engine.weights()
    with pytest.raises(AdapterNotFoundError, match="nowhere"):
        set_mixture(engine.llm, [tmp_path / "nowhere"])
    with pytest.raises((BaseMismatchError, DareError), match=r"not the base|does not have"):
        set_mixture(engine.llm, [other.adapters["a"]])
    with pytest.raises(CombinationError, match="densty"):
        set_mixture(engine.llm, [a], densty=0.5)
    with pytest.raises(CombinationError, match=r"weight is nan"):
        set_mixture(engine.llm, [{"path": a, "weight": float("nan")}])
    with pytest.raises(ValueError, match="route is 'fast'"):
        set_mixture(engine.llm, [a], route="fast")
    assert differing(engine.weights(), before) == set()


def test_weights_packed_for_the_cpu_are_reloaded_and_never_written_singly(
    packs: Packs, start_engine: Starter
) -> None:
    pack = packs("llama")
    engine = start_engine(pack.base)  # vLLM's own loader
    b = str(pack.adapters["b"])
    with pytest.raises(UnsupportedParameterError, match=r"qkv_proj is packed for the CPU"):
        set_mixture(engine.llm, [b], route="sparse")
    assert_says_the_same(engine.greedy(), pack.live().float())
    assert set_mixture(engine.llm, [b])["route"] == "reload"
    assert_says_the_same(engine.greedy(), merged(pack, {"b": 1.0}))
    assert get_mixture(engine.llm)["adapters"][0]["path"] == b
    set_mixture(engine.llm, [])
    assert_says_the_same(engine.greedy(), pack.live().float())


def test_weights_that_were_changed_by_other_means_are_not_written_over(
    packs: Packs, start_engine: Starter
) -> None:
    pack = packs("qwen2")
    engine = start_engine(
        pack.base, load_format="dare", model_loader_extra_config={"plain_weights": True}, seed=1
    )

    def spoil(model: torch.nn.Module) -> None:
        dict(model.named_parameters())["model.layers.1.mlp.down_proj.weight"].data[3, 4] += 1

    engine.llm.apply_model(spoil)
    with pytest.raises(BaseMismatchError, match=r"1 entries of model\.layers\.1\.mlp\.down_proj"):
        set_mixture(engine.llm, [str(pack.adapters["a"])], route="sparse")


def test_requests_that_are_not_finished_keep_the_old_weights(
    packs: Packs, start_engine: Starter
) -> None:
    from vllm import SamplingParams

    pack = packs("llama")
    engine = start_engine(
        pack.base, load_format="dare", model_loader_extra_config={"plain_weights": True}
    )
    core = engine.llm.llm_engine
    parameters = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    core.add_request("unfinished", {"prompt_token_ids": [1, 5, 9]}, parameters)
    core.step()
    with pytest.raises(DareError, match="unfinished requests"):
        set_mixture(engine.llm, [str(pack.adapters["a"])])
    while core.has_unfinished_requests():
        core.step()
    assert_says_the_same(engine.greedy(), pack.live().float())
