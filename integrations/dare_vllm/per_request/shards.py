"""Which rows and columns of a checkpoint's parameter a rank's layer holds, and where.

The arithmetic is that of vLLM's own weight loaders (`model_executor/layers/linear.py` and
`vocab_parallel_embedding.py`), from the same attributes of the layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from dare_vllm.at_load.spare_rows import spare_rows_of

__all__ = ["Shard", "embedding_shards", "held_spare_rows", "linear_shards"]

QKV = ("q", "k", "v")


@dataclass(frozen=True)
class Shard:
    """A part of a parameter that this rank holds.

    Attributes:
        shape: of the whole parameter in the checkpoint, (rows, columns) or (rows,).
        rows, columns: first and one past the last that are held.
        start: the layer's row where they begin.
    """

    shape: tuple[int, ...]
    rows: tuple[int, int]
    columns: tuple[int, int]
    start: int


def linear_shards(layer: Any, kind: str, part: int | None, of: str) -> list[Shard]:
    """Where a parameter of a linear layer is.

    Args:
        layer: a layer of vLLM's.
        kind: "replicated", "column", "merged", "qkv" or "row".
        part: which of the parameters that a fused layer holds; None: all, fused in the checkpoint.
        of: "weight" or "bias".

    Returns:
        None of them where another rank holds it all.
    """
    columns = int(layer.input_size)
    if kind == "row":
        held = int(layer.input_size_per_partition)
        rows = int(layer.output_size)
        if of == "bias":  # which the first rank alone adds
            return [Shard((rows,), (0, rows), (0, 1), 0)] if layer.tp_rank == 0 else []
        first = layer.tp_rank * held
        return [Shard((rows, columns), (0, rows), (first, first + held), 0)]
    blocks = _blocks(layer, kind)
    wanted = blocks if part is None else blocks[part : part + 1]
    shards, before = [], 0
    total = sum(block.size for block in wanted)
    for block in wanted:
        part_rows = before + block.first, before + block.first + block.held
        before += block.size
        shard = Shard((total, columns), part_rows, (0, columns), block.start)
        shards.append(shard if of == "weight" else replace(shard, shape=(total,), columns=(0, 1)))
    return shards


def embedding_shards(layer: Any, of: str) -> list[Shard]:
    """Where a parameter of an embedding or of the head is; see :func:`linear_shards`.

    The base's rows alone: the layer's may be more, see :func:`held_spare_rows`.
    """
    rows, own = _own_rows(layer), layer.shard_indices
    held = (
        min(int(own.org_vocab_start_index), rows),
        min(int(own.org_vocab_end_index), rows),
    )
    if of == "bias":
        return [Shard((rows,), held, (0, 1), 0)]
    columns = int(layer.embedding_dim)
    return [Shard((rows, columns), held, (0, columns), 0)]


def held_spare_rows(layer: Any) -> tuple[int, int, int]:
    """Which of the rows that an engine spares are held here.

    Returns:
        The first and one past the last of them, counted from the first spare row of all, and the
        layer's row where they begin.
    """
    rows, own = _own_rows(layer), layer.shard_indices
    start, stop = int(own.org_vocab_start_index), int(own.org_vocab_end_index)
    first = max(start, rows)
    return first - rows, max(stop, first) - rows, first - start


def _own_rows(layer: Any) -> int:
    return int(layer.org_vocab_size) - spare_rows_of(layer)


@dataclass(frozen=True)
class _Block:
    """One of the parameters that a layer stacks: its rows, those held, and where they are."""

    size: int
    first: int
    held: int
    start: int


def _blocks(layer: Any, kind: str) -> list[_Block]:
    rank, degree = int(layer.tp_rank), int(layer.tp_size)
    if kind == "replicated":
        size = int(layer.output_size)
        return [_Block(size, 0, size, 0)]
    if kind == "qkv":
        found, start = [], 0
        for name in QKV:
            head = int(layer.v_head_size if name == "v" else layer.head_size)
            heads = int(layer.num_heads if name == "q" else layer.num_kv_heads)
            all_heads = int(layer.total_num_heads if name == "q" else layer.total_num_kv_heads)
            # Where there are more ranks than key heads, several ranks hold the same.
            place = rank if name == "q" else rank // int(layer.num_kv_head_replicas)
            held = heads * head
            found.append(_Block(all_heads * head, place * held, held, start))
            start += held
        return found
    sizes = [int(size) for size in layer.output_sizes] if kind == "merged" else [layer.output_size]
    found, start = [], 0
    for size in sizes:
        held = size // degree
        found.append(_Block(size, rank * held, held, start))
        start += held
    return found
