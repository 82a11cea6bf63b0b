"""A checkpoint written in runs of rows is the one that whole tensors would make."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from tqdm.auto import tqdm

from dare_adapters import checkpoint_writer
from dare_adapters.checkpoint import open_checkpoint
from dare_adapters.checkpoint_writer import (
    OutputTensor,
    Parts,
    shards_of_size,
    sum_parts,
    whole_parts,
    write_checkpoint,
)
from dare_adapters.delta import Delta, DenseDelta, NoChange, WeightedDelta
from tests.combine.sources import aligned_deltas, delta_of, normal
from tests.conftest import raw_bytes

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as made:
        yield made


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> int:
    """Parts of a hundred entries, so that small tensors have many."""
    monkeypatch.setattr(checkpoint_writer, "PART_ENTRIES", 100)
    return 100


def output(name: str, tensor: torch.Tensor) -> OutputTensor:
    return OutputTensor(name, tensor.dtype, tuple(tensor.shape), whole_parts(tensor))


def write(
    directory: Path, shards: list[list[OutputTensor]], pool: ThreadPoolExecutor
) -> dict[str, torch.Tensor]:
    """Write, and read with safetensors itself."""
    directory.mkdir(exist_ok=True)
    with tqdm(disable=True) as bar:
        write_checkpoint(directory, shards, pool, bar)
    found: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found.update(load_file(file))
    return found


TENSORS = {
    "matrix": torch.randn(37, 53),
    "half": torch.randn(5, 7).half(),
    "brain": torch.randn(3, 4, 5).bfloat16(),
    "double": torch.randn(6).double(),
    "scalar": torch.tensor(2.5),
    "nothing": torch.zeros(0, 4),
    "numbers": torch.arange(9),
    "flags": torch.tensor([True, False, True]),
    "bytes": torch.arange(7, dtype=torch.uint8),
    "column": torch.randn(300, 1),
    "strided": torch.randn(8, 6).T,
}


def test_every_dtype_and_shape_comes_back_bit_for_bit(
    tmp_path: Path, pool: ThreadPoolExecutor, small_parts: int
):
    found = write(tmp_path / "out", [[output(n, t) for n, t in TENSORS.items()]], pool)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert raw_bytes(found[name]) == raw_bytes(tensor)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert set(open_checkpoint(tmp_path / "out").info) == TENSORS.keys()


def test_every_tensor_is_aligned_and_there_are_no_holes(tmp_path: Path, pool: ThreadPoolExecutor):
    write(tmp_path, [[output(name, tensor) for name, tensor in TENSORS.items()]], pool)
    raw = (tmp_path / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    end = 0
    for name, entry in header.items():
        assert entry["data_offsets"][0] == end
        assert (8 + length + end) % TENSORS[name].element_size() == 0
        end = entry["data_offsets"][1]
    assert 8 + length + end == len(raw)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as reader:
        assert set(reader.keys()) == TENSORS.keys()


def test_several_shards_have_an_index_and_one_has_none(tmp_path: Path, pool: ThreadPoolExecutor):
    shards = [[output(n, TENSORS[n])] for n in ("matrix", "half", "numbers")]
    found = write(tmp_path / "three", shards, pool)
    assert set(found) == {"matrix", "half", "numbers"}
    index = json.loads((tmp_path / "three" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(TENSORS[name].nbytes for name in found)
    assert index["weight_map"] == {
        "half": "model-00002-of-00003.safetensors",
        "matrix": "model-00001-of-00003.safetensors",
        "numbers": "model-00003-of-00003.safetensors",
    }
    for name, file in index["weight_map"].items():
        assert list(load_file(tmp_path / "three" / file)) == [name]
    opened = open_checkpoint(tmp_path / "three")
    assert all(torch.equal(opened[name], TENSORS[name]) for name in found)
    write(tmp_path / "one", shards[:1], pool)
    assert [file.name for file in (tmp_path / "one").iterdir()] == ["model.safetensors"]
    assert write(tmp_path / "none", [[]], pool) == {}


def test_what_is_there_is_never_overwritten(tmp_path: Path, pool: ThreadPoolExecutor):
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        write(tmp_path, [[output("matrix", TENSORS["matrix"])]], pool)
    assert (tmp_path / "model.safetensors").read_bytes() == b"mine"


def test_the_bar_counts_every_byte(tmp_path: Path, pool: ThreadPoolExecutor, small_parts: int):
    tensors = [output(name, tensor) for name, tensor in TENSORS.items()]
    with tqdm(total=sum(tensor.nbytes for tensor in tensors), file=open("/dev/null", "w")) as bar:
        write_checkpoint(tmp_path, [tensors], pool, bar)
        assert bar.n == bar.total == sum(tensor.nbytes for tensor in TENSORS.values())


@pytest.mark.parametrize("wrong", ["short", "long", "dtype"])
def test_parts_that_are_not_the_tensor_are_a_defect(
    tmp_path: Path, pool: ThreadPoolExecutor, wrong: str
):
    made = {"short": torch.ones(5), "long": torch.ones(7), "dtype": torch.ones(6).half()}[wrong]

    def parts(pool: ThreadPoolExecutor) -> Iterable[torch.Tensor]:
        return [made]

    with pytest.raises(AssertionError):
        write(tmp_path, [[OutputTensor("w", torch.float32, (6,), parts)]], pool)


# --- shards


@given(sizes=st.lists(st.integers(0, 12), max_size=12), limit=st.integers(1, 20))
def test_shards_keep_the_order_and_are_as_full_as_the_limit_allows(sizes: list[int], limit: int):
    tensors = [output(str(n), torch.zeros(size, dtype=torch.uint8)) for n, size in enumerate(sizes)]
    shards = shards_of_size(iter(tensors), limit)
    assert [tensor for shard in shards for tensor in shard] == tensors
    assert all(shards)
    total = [sum(tensor.nbytes for tensor in shard) for shard in shards]
    for number, shard in enumerate(shards):
        assert total[number] <= limit or len(shard) == 1 or shard[0].nbytes > limit
        if number:  # its first did not fit the one before
            assert total[number - 1] + shard[0].nbytes > limit


def test_a_tensor_larger_than_the_limit_has_a_shard_of_its_own():
    tensors = [output(str(n), torch.zeros(size, dtype=torch.uint8)) for n, size in
               enumerate([3, 50, 3, 3])]  # fmt: skip
    assert [[t.nbytes for t in shard] for shard in shards_of_size(tensors, 10)] == [
        [3],
        [50],
        [3, 3],
    ]


# --- parts


def joined(parts: Parts, pool: ThreadPoolExecutor) -> torch.Tensor:
    return torch.cat([torch.zeros(0), *(part.double() for part in parts(pool))])


@pytest.mark.parametrize("dtype", [None, *FLOATS], ids=str)
@pytest.mark.parametrize("start", FLOATS, ids=str)
def test_whole_parts_are_the_tensor_cast_once(
    pool: ThreadPoolExecutor, small_parts: int, start: torch.dtype, dtype: torch.dtype | None
):
    tensor = torch.randn(37, 53).to(start)
    parts = list(whole_parts(tensor, dtype)(pool))
    assert {part.dtype for part in parts} == {dtype or start}
    assert max(len(part) for part in parts) <= small_parts
    assert raw_bytes(torch.cat(parts)) == raw_bytes(tensor.to(dtype or start))


def expected_sum(
    base: torch.Tensor, deltas: list[WeightedDelta], dtype: torch.dtype
) -> torch.Tensor:
    total = torch.zeros(base.shape)
    for weighted in deltas:
        total += weighted.delta.dense() * weighted.weight
    return (base.float() + total).to(dtype)


@settings(max_examples=80, deadline=None)
@given(
    deltas=aligned_deltas(),
    start=st.sampled_from(FLOATS),
    dtype=st.sampled_from([None, *FLOATS]),
    data=st.data(),
)
def test_sums_are_made_in_float32_and_rounded_once(
    deltas: list[Delta], start: torch.dtype, dtype: torch.dtype | None, data: st.DataObject
):
    weights = data.draw(st.lists(st.sampled_from([1.0, 0.5, -2.0, 0.0]), min_size=5, max_size=5))
    weighted = [WeightedDelta(d, w) for d, w in zip(deltas, weights, strict=False)]
    base = normal(deltas[0].shape, 7).mul(50).to(start)
    before = base.clone()
    step = data.draw(st.sampled_from([1, 7, 100, 1 << 20]))
    done: list[bool] = []
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(checkpoint_writer, "PART_ENTRIES", step)
        parts = list(sum_parts(base, weighted, dtype, lambda: done.append(True))(pool))
    wanted = dtype or start
    assert {part.dtype for part in parts} <= {wanted}
    assert all(len(part) <= max(step, deltas[0].columns) for part in parts)
    found = torch.cat([torch.zeros(0, dtype=wanted), *parts])
    assert torch.equal(found, expected_sum(base, weighted, wanted).reshape(-1))
    assert torch.equal(base, before)
    assert done == [True]


@pytest.mark.parametrize("kind", ["float32", "blocked", "bernoulli", "nothing"])
def test_rows_that_a_delta_adds_come_last(pool: ThreadPoolExecutor, small_parts: int, kind: str):
    base, delta = torch.randn(37, 53).bfloat16(), delta_of(kind, normal((37, 53), 1), 1)
    other = delta_of(kind, normal((37, 53), 2), 2)
    delta.added_rows, other.added_rows = torch.randn(4, 53), torch.randn(9, 53)
    plain = NoChange((37, 53))
    parts = sum_parts(base, [WeightedDelta(plain), WeightedDelta(delta), WeightedDelta(other)])
    found = torch.cat(list(parts(pool))).view(-1, 53)
    assert torch.equal(found[37:], delta.added_rows.bfloat16())
    weighted = [WeightedDelta(delta), WeightedDelta(other)]
    assert torch.equal(found[:37], expected_sum(base, weighted, torch.bfloat16))


def test_what_was_computed_is_released_when_the_parameter_is_done(
    pool: ThreadPoolExecutor, small_parts: int
):
    released: list[str] = []

    class Computed(DenseDelta):
        def release(self) -> None:
            released.append("yes")

    weighted = [WeightedDelta(Computed(torch.ones(40, 50))) for _ in range(2)]
    made = iter(sum_parts(torch.zeros(40, 50), weighted)(pool))
    next(made)
    assert released == []
    assert len(list(made)) == 19
    assert released == ["yes", "yes"]


def test_a_failure_in_one_part_is_raised_and_nothing_hangs(
    tmp_path: Path, pool: ThreadPoolExecutor, small_parts: int
):
    class Failing(DenseDelta):
        def read(self, start: int, stop: int) -> tuple[None, torch.Tensor]:
            if start >= 20:
                raise RuntimeError("disk")
            return super().read(start, stop)

    delta = Failing(torch.ones(40, 50))
    parts = sum_parts(torch.zeros(40, 50), [WeightedDelta(delta)])
    with pytest.raises(RuntimeError, match="disk"):
        write(tmp_path, [[OutputTensor("w", torch.float32, (40, 50), parts)]], pool)


def test_no_parameter_is_ever_held_whole(pool: ThreadPoolExecutor, small_parts: int):
    held = 0
    most = 0

    class Counting(DenseDelta):
        def read(self, start: int, stop: int) -> tuple[None, torch.Tensor]:
            nonlocal held, most
            held += stop - start
            most = max(most, held)
            return super().read(start, stop)

    rows = 0
    for part in sum_parts(torch.zeros(400, 50), [WeightedDelta(Counting(torch.ones(400, 50)))])(
        pool
    ):
        held -= len(part) // 50
        rows += len(part) // 50
    assert rows == 400
    assert most <= 2 * (checkpoint_writer.AHEAD + 2)
