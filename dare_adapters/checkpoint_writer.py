"""A checkpoint written in row ranges: no parameter is ever held whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from tqdm.auto import tqdm

from dare_adapters.checkpoint import SAFETENSORS
from dare_adapters.delta import Delta, WeightedDelta
from dare_adapters.parallel import ordered_map
from dare_adapters.row_sums import add_rows
from dare_adapters.streamed_file import StreamedFile
from dare_adapters.tensor_file import DTYPE_NAMES

__all__ = ["OutputTensor", "shards_of_size", "sum_parts", "whole_parts", "write_checkpoint"]

Parts = Callable[[ThreadPoolExecutor], Iterable[torch.Tensor]]
# Entries of one part: enough to keep two threads busy between writes.
PART_ENTRIES = 1 << 20
AHEAD = 4


@dataclass(frozen=True)
class OutputTensor:
    """One tensor to write.

    Attributes:
        name, dtype, shape: of it.
        parts: makes its values, one run of entries after the other, each in `dtype`.
        prepare: what is to be done for it before, while the tensor before it is made.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Parts
    prepare: Sequence[Callable[[], object]] = ()

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def whole_parts(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> Parts:
    """A tensor as it is, or cast."""

    def parts(pool: ThreadPoolExecutor) -> Iterator[torch.Tensor]:
        flat = tensor.detach().reshape(-1)
        for start in range(0, len(flat), PART_ENTRIES):
            yield flat[start : start + PART_ENTRIES].to(dtype or tensor.dtype)

    return parts


def sum_parts(
    base: torch.Tensor,
    deltas: Sequence[WeightedDelta],
    dtype: torch.dtype | None = None,
    done: Callable[[], None] = lambda: None,
    check: Callable[[torch.Tensor], None] = lambda part: None,
) -> Parts:
    """Base plus deltas, summed in float32 and rounded once to `dtype` (default: the base's).

    Args:
        base: any float dtype, shape of the deltas.
        deltas: at least one; rows they add come last, from the first that adds any.
        dtype: of the result; entries that no delta changes are cast too.
        done: called when all has been made.
        check: called with each part, by the thread that made it.
    """
    first: Delta = deltas[0].delta
    wanted = dtype or base.dtype

    def parts(pool: ThreadPoolExecutor) -> Iterator[torch.Tensor]:
        flat = base.detach().reshape(-1)
        width = first.columns

        def make(rows: tuple[int, int]) -> torch.Tensor:
            part = flat[rows[0] * width : rows[1] * width]
            if wanted == base.dtype:
                made = add_rows(part, deltas, *rows)
            else:
                made = add_rows(part.to(torch.float32), deltas, *rows).to(wanted)
            check(made)
            return made

        yield from ordered_map(pool, make, _ranges(first), AHEAD)
        for weighted in deltas:
            weighted.delta.release()
        added = next((d.delta.added_rows for d in deltas if d.delta.added_rows is not None), None)
        if added is not None:
            check(added)
            yield added.reshape(-1).to(wanted)
        done()

    return parts


def _ranges(delta: Delta) -> Iterator[tuple[int, int]]:
    step = max(1, PART_ENTRIES // max(delta.columns, 1))
    for start in range(0, delta.rows, step):
        yield start, min(start + step, delta.rows)


def shards_of_size(tensors: Iterable[OutputTensor], limit: int) -> list[list[OutputTensor]]:
    """Tensors in their order, as many in each shard as `limit` bytes allow, at least one."""
    shards: list[list[OutputTensor]] = []
    size = limit + 1
    for tensor in tensors:
        if size + tensor.nbytes > limit or not shards:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def write_checkpoint(
    directory: Path,
    shards: Sequence[Sequence[OutputTensor]],
    pool: ThreadPoolExecutor,
    bar: tqdm[None],
    file: str = SAFETENSORS,
) -> None:
    """Write shards and, where there are several, their index.

    Args:
        directory: where.
        shards: the tensors of each file.
        pool: makes their parts.
        bar: is told of every byte.
        file: the name that a single file has.
    """
    weight_map: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(shards, 1):
        name = file
        if len(shards) > 1:
            name = f"{Path(file).stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        nbytes = sum(tensor.nbytes for tensor in tensors)
        with StreamedFile(directory / name, nbytes) as out:
            _write_shard(out, tensors, pool, bar)
        weight_map.update((tensor.name, name) for tensor in tensors)
        total += nbytes
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / f"{file}.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_shard(
    file: StreamedFile, tensors: Sequence[OutputTensor], pool: ThreadPoolExecutor, bar: tqdm[None]
) -> None:
    # Every tensor aligned to its element size and no holes: the largest elements first.
    order = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in order:
        header[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    ahead: list[Future[object]] = [pool.submit(one) for one in order[0].prepare] if order else []
    for number, tensor in enumerate(order):
        for future in ahead:
            future.result()
        following = order[number + 1].prepare if number + 1 < len(order) else ()
        ahead = [pool.submit(one) for one in following]
        end = file.tell() + tensor.nbytes
        for part in tensor.parts(pool):
            assert part.dtype == tensor.dtype
            data = part.contiguous().view(-1).view(torch.uint8).numpy()
            file.write(data.data)
            bar.update(data.nbytes)
        assert file.tell() == end, f"{tensor.name}: its parts are not its size"
