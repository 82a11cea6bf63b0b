"""Every rank's part of a packed delta is what vLLM's own weight loader gives that rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dare_adapters.kernels import PackedDelta, sparse_delta_linear
from tests.kernels.deltas import bernoulli, blocked

pytest.importorskip("vllm", reason="needs the environment of make test-vllm")
pytestmark = pytest.mark.vllm

HIDDEN, HEAD = 64, 8
QUERY_HEADS, KEY_HEADS = 16, 4  # fewer key heads than the largest degree
INNER = 48
DEGREES = [(degree, rank) for degree in (1, 2, 4, 8) for rank in range(degree)]


@pytest.fixture(params=DEGREES, ids=lambda pair: f"rank {pair[1]} of {pair[0]}")
def degree(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """vLLM's layers made as a rank of a tensor-parallel group makes them, in one process."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import linear, vocab_parallel_embedding

    size, rank = request.param
    for module in (linear, vocab_parallel_embedding, parameter):
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
    with set_current_vllm_config(VllmConfig()):
        yield size


def layer_of(kind: str) -> tuple[Any, list[tuple[Any, int]]]:
    """A layer of a kind, and the (shard id, rows) of the parameters that it holds."""
    from vllm.model_executor.layers import linear

    if kind == "qkv":
        rows = [QUERY_HEADS * HEAD, KEY_HEADS * HEAD, KEY_HEADS * HEAD]
        layer = linear.QKVParallelLinear(HIDDEN, HEAD, QUERY_HEADS, KEY_HEADS)
        return layer, list(zip("qkv", rows, strict=True))
    if kind == "merged":
        return linear.MergedColumnParallelLinear(HIDDEN, [INNER, INNER]), [(0, INNER), (1, INNER)]
    if kind == "column":
        return linear.ColumnParallelLinear(HIDDEN, INNER), [(None, INNER)]
    if kind == "replicated":
        return linear.ReplicatedLinear(HIDDEN, INNER), [(None, INNER)]
    return linear.RowParallelLinear(HIDDEN, INNER), [(None, INNER)]


def load(parameter: Any, value: torch.Tensor, shard: Any) -> None:
    parameter.weight_loader(parameter, value, *(() if shard is None else (shard,)))


@pytest.mark.parametrize("kind", ["qkv", "merged", "column", "row", "replicated"])
def test_a_linear_layers_parts_are_the_weight_loaders(kind: str, degree: int) -> None:
    from dare_vllm.per_request.shards import linear_shards

    layer, held = layer_of(kind)
    layer.weight.data.zero_()
    layer.bias.data.zero_()
    deltas = [
        (blocked if number % 2 else bernoulli)(rows, HIDDEN, 2 if number % 2 else 0.5, 8, number)
        for number, (_, rows) in enumerate(held)
    ]
    found, bias = torch.zeros_like(layer.weight), torch.zeros_like(layer.bias)
    for number, ((shard, rows), delta) in enumerate(zip(held, deltas, strict=True)):
        load(layer.weight, delta.dense(), shard)
        load(layer.bias, torch.arange(rows) + 1000.0 * number, shard)
        part = number if len(held) > 1 else None
        packed = PackedDelta.from_delta(delta)
        for own in linear_shards(layer, kind, part, "weight"):
            assert own.shape == (rows, HIDDEN)
            piece = packed.slice_rows(*own.rows).slice_columns(*own.columns)
            found[own.start : own.start + piece.rows] = piece.dense()
        for own in linear_shards(layer, kind, part, "bias"):
            values = torch.arange(*own.rows) + 1000.0 * number
            bias[own.start : own.start + len(values)] = values
    assert torch.equal(found, layer.weight.data)
    if not (kind == "row" and layer.tp_rank > 0):  # where the first rank alone adds it
        assert torch.equal(bias, layer.bias.data)


def test_a_layer_that_is_fused_in_the_checkpoint_has_a_shard_of_each_part(degree: int) -> None:
    from dare_vllm.per_request.shards import linear_shards

    for kind in ("qkv", "merged"):
        layer, held = layer_of(kind)
        total = sum(rows for _, rows in held)
        delta = bernoulli(total, HIDDEN, 0.5, 16)
        packed, found = PackedDelta.from_delta(delta), torch.zeros_like(layer.weight)
        first = 0
        for shard, rows in held:
            load(layer.weight, delta.dense()[first : first + rows], shard)
            first += rows
        for own in linear_shards(layer, kind, None, "weight"):
            assert own.shape == (total, HIDDEN)
            piece = packed.slice_rows(*own.rows)
            found[own.start : own.start + piece.rows] = piece.dense()
        assert torch.equal(found, layer.weight.data)


def test_an_embeddings_rows_are_the_weight_loaders(degree: int) -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        VocabParallelEmbedding,
    )

    from dare_vllm.per_request.shards import embedding_shards

    for kind in (VocabParallelEmbedding, ParallelLMHead):
        layer = kind(97, HIDDEN)  # no multiple of anything: the last ranks hold padding
        delta = bernoulli(97, HIDDEN, 0.5, 4)
        load(layer.weight, delta.dense(), None)
        (own,) = embedding_shards(layer, "weight")
        piece = PackedDelta.from_delta(delta).slice_rows(*own.rows).dense()
        assert torch.equal(layer.weight.data[: len(piece)], piece)
        assert not layer.weight.data[len(piece) :].any()


@pytest.mark.parametrize("spare", [1, 5, 40, 300])
def test_base_and_added_rows_lie_where_those_of_a_grown_checkpoint_do(
    spare: int, degree: int
) -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        VocabParallelEmbedding,
    )

    import dare_vllm
    from dare_vllm.at_load.spare_rows import keep_rows_free
    from dare_vllm.per_request.shards import embedding_shards, held_spare_rows

    dare_vllm.register()
    whole = torch.randn(97 + spare, HIDDEN, generator=torch.Generator().manual_seed(spare))
    for kind in (VocabParallelEmbedding, ParallelLMHead):
        expected, layer = kind(97 + spare, HIDDEN), kind(97 + spare, HIDDEN)
        load(expected.weight, whole, None)
        keep_rows_free(layer, 97 + spare, spare)
        load(layer.weight, whole[:97], None)
        (own,) = embedding_shards(layer, "weight")
        assert own.shape == (97, HIDDEN)
        assert torch.equal(layer.weight.data[: own.rows[1] - own.rows[0]], whole[slice(*own.rows)])
        first, last, start = held_spare_rows(layer)
        layer.weight.data[start : start + last - first] += whole[97:][first:last]
        assert torch.equal(layer.weight.data, expected.weight.data)


@pytest.mark.parametrize("kind", ["column", "row"])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_what_the_ranks_add_is_what_one_adds(kind: str, size: int) -> None:
    """Products of the parts, gathered or summed as vLLM does, are the product of the whole."""
    from types import SimpleNamespace

    from dare_vllm.per_request.shards import linear_shards

    delta = blocked(INNER, HIDDEN, 4, 4)
    packed = PackedDelta.from_delta(delta)
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(0))
    slots = torch.tensor([0, -1, 1, 0, 1])
    whole = sparse_delta_linear(x, [packed, None], slots, torch.zeros(5, INNER))
    parts = []
    for rank in range(size):
        layer = SimpleNamespace(
            tp_rank=rank,
            tp_size=size,
            input_size=HIDDEN,
            output_size=INNER,
            input_size_per_partition=HIDDEN // size,
        )
        (own,) = linear_shards(layer, kind, None, "weight")
        piece = packed.slice_rows(*own.rows).slice_columns(*own.columns)
        out = torch.zeros(5, piece.rows)
        parts.append(sparse_delta_linear(x[:, slice(*own.columns)], [piece, None], slots, out))
    together = torch.cat(parts, dim=1) if kind == "column" else torch.stack(parts).sum(0)
    torch.testing.assert_close(together, whole, rtol=1e-5, atol=1e-6)
