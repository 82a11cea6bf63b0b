"""Damaged, lying and malicious checkpoints are refused by name, before code is run."""

from __future__ import annotations

import json
import math
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dare_adapters
from dare_adapters.adapter import Adapter
from dare_adapters.checkpoint import open_checkpoint
from dare_adapters.errors import CheckpointError, CheckpointMismatchError
from tests.checkpoints import fine_tuned, integers, raw, write_checkpoint
from tests.forged_adapters import EMBED, HEAD, NORM, TENSORS, UP
from tests.golden.make_golden import golden_checkpoints
from tests.reference import RawTensor, write_safetensors


def extract(base: Path, finetuned: Path, out: Path, **options: Any) -> Adapter:
    return dare_adapters.extract(base, finetuned, out, progress=False, **options)


def sharded(directory: Path) -> Path:
    base, _ = golden_checkpoints()
    names = list(base)
    return write_checkpoint(directory, base, shards=[names[:2], names[2:4], names[4:]])


def test_a_missing_shard_is_named(tmp_path):
    directory = sharded(tmp_path / "base")
    (directory / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="1 of 3 shards are missing: model-00002-of-00003"):
        open_checkpoint(directory)


@pytest.mark.parametrize("left", [0, 5, 100, -1])
def test_a_truncated_shard_is_named(tmp_path, left):
    directory = sharded(tmp_path / "base")
    shard = directory / "model-00003-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:left])
    with pytest.raises(CheckpointError, match=r"model-00003-of-00003.* not a readable safetensors"):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    "file",
    ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", 3, None, "x\0"],
)
def test_an_index_that_points_outside_its_directory_is_refused(tmp_path, file):
    directory = sharded(tmp_path / "base")
    write_safetensors(tmp_path / "secret.safetensors", {"w": raw(integers((2, 2)))})
    index = {"weight_map": {"w": file}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError):
        open_checkpoint(directory)


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_that_is_none_is_refused(tmp_path, text):
    directory = sharded(tmp_path / "base")
    (directory / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="index"):
        open_checkpoint(directory)


def test_an_index_of_another_version_is_refused(tmp_path):
    directory = sharded(tmp_path / "base")
    file = directory / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["extra.weight"] = "model-00001-of-00003.safetensors"
    file.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"the index says extra\.weight is in model-00001"):
        open_checkpoint(directory)


def test_a_directory_without_weights_is_refused(tmp_path):
    (tmp_path / "base").mkdir()
    with pytest.raises(CheckpointError, match=r"no weights; expected model\.safetensors"):
        open_checkpoint(tmp_path / "base")


@settings(max_examples=40, deadline=None)
@given(
    row=st.integers(0, 6),
    column=st.integers(0, 49),
    side=st.sampled_from(["base", "finetuned"]),
    value=st.sampled_from([math.nan, math.inf, -math.inf]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    options=st.sampled_from(
        [
            {},
            {"drop_rate": 0.99},
            {"mask": "bernoulli"},
            {"method": "magnitude"},
            {"exclude": ["*"]},
        ]
    ),
)
def test_nan_and_infinity_anywhere_in_a_checkpoint_are_found(
    row, column, side, value, dtype, options
):
    base = {"a.weight": integers((3, 20)), "b.weight": integers((7, 50)).to(dtype)}
    states = {"base": base, "finetuned": fine_tuned(base)}
    states[side]["b.weight"] = states[side]["b.weight"].clone()
    states[side]["b.weight"][row, column] = value
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for key, state in states.items():
            write_checkpoint(directory / key, state)
        whose = "the base" if side == "base" else "the fine-tune"
        place = f"b.weight of {whose} holds .* at row {row}, column {column};"
        with pytest.raises(CheckpointError, match=place):
            extract(directory / "base", directory / "finetuned", directory / "out", **options)
        assert sorted(os.listdir(directory)) == ["base", "finetuned"]


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        (EMBED, 13, f"{EMBED} of the fine-tune holds NaN or infinity in its added row 13"),
        (HEAD, 1, f"{HEAD} of the fine-tune holds NaN or infinity"),
        (NORM, 5, f"{NORM} of the fine-tune holds nan at row 0, column 5"),
    ],
)
def test_nan_in_what_only_the_fine_tune_has_is_found(tmp_path, name, row, message):
    base, finetuned = golden_checkpoints()
    finetuned[name] = finetuned[name].clone()
    finetuned[name][row] = math.nan
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "finetuned", finetuned)
    with pytest.raises(CheckpointError, match=message):
        extract(tmp_path / "base", tmp_path / "finetuned", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["base", "finetuned"]


@pytest.mark.parametrize("bits", [32, 16, 8, 4, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_difference_beyond_float32_is_refused(tmp_path, bits, dtype):
    base = {"w": torch.full((4, 20), -3e38, dtype=dtype)}
    finetuned = {"w": torch.full((4, 20), 3e38, dtype=dtype)}
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "finetuned", finetuned)
    with pytest.raises(CheckpointError, match="w: fine-tune minus base is beyond"):
        extract(
            tmp_path / "base",
            tmp_path / "finetuned",
            tmp_path / "out",
            bits=bits,
            on_large_delta="ignore",
        )
    assert not (tmp_path / "out").exists()


class Payload:
    """What a malicious pickle does when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickled_checkpoint_is_not_run(tmp_path, golden_pair, zipped):
    marker = tmp_path / "owned"
    directory = tmp_path / "evil"
    directory.mkdir()
    state = {"w": integers((2, 3)), "x": Payload(marker)}
    file = directory / "pytorch_model.bin"
    torch.save(state, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="weights_only"):
        extract(golden_pair[0], directory, tmp_path / "out")
    file.write_bytes(pickle.dumps(Payload(marker), protocol=2))
    with pytest.raises(CheckpointError, match="weights_only"):
        extract(directory, golden_pair[1], tmp_path / "out")
    assert not marker.exists()
    pickle.loads(pickle.dumps(Payload(marker)))  # the payload is a real one
    assert marker.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_checkpoint_of_tensors_gives_the_same_adapter(tmp_path, golden_pair, zipped):
    for side, state in zip(("base", "finetuned"), golden_checkpoints(), strict=True):
        directory = tmp_path / f"bin-{side}"
        directory.mkdir()
        parameters = {
            name: torch.nn.Parameter(value, requires_grad=value.is_floating_point())
            for name, value in state.items()
        }
        torch.save(
            parameters, directory / "pytorch_model.bin", _use_new_zipfile_serialization=zipped
        )
    one = extract(*golden_pair, tmp_path / "one")
    other = extract(tmp_path / "bin-base", tmp_path / "bin-finetuned", tmp_path / "other")
    assert (one.path / TENSORS).read_bytes() == (other.path / TENSORS).read_bytes()


@pytest.mark.parametrize(
    "state",
    [
        [1, 2],
        {"w": 3},
        {3: torch.zeros(2)},
        {"w": torch.zeros(2, dtype=torch.complex64)},
        {"w": torch.zeros(2, dtype=torch.float8_e4m3fn)},
        {"w": torch.eye(3).to_sparse()},
    ],
    ids=["list", "number", "key", "complex", "float8", "sparse"],
)
def test_a_pickle_of_something_else_is_refused(tmp_path, state):
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "U16", "U32", "U64"])
def test_a_dtype_that_cannot_be_read_is_named(tmp_path, dtype):
    size = {"F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8}[dtype]
    tensors = {"a.weight": RawTensor(dtype, (2, 3), bytes(6 * size))}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=f"a.weight has the dtype {dtype}"):
        open_checkpoint(tmp_path)


def test_what_a_fine_tune_lacks_is_listed(tmp_path, golden_pair):
    _, finetuned = golden_checkpoints()
    del finetuned[UP], finetuned[NORM]
    write_checkpoint(tmp_path / "less", finetuned)
    with pytest.raises(CheckpointMismatchError, match="lacks 2 of the 6 parameters") as caught:
        extract(golden_pair[0], tmp_path / "less", tmp_path / "out")
    assert UP in str(caught.value)
    assert NORM in str(caught.value)
    adapter = extract(
        golden_pair[0], tmp_path / "less", tmp_path / "out", ignore_missing=["*.up_proj.*", NORM]
    )
    assert adapter.config.ignored_base_parameters == sorted([UP, NORM])


@pytest.mark.parametrize("shape", [(9, 38), (8, 37), (10, 37), (333,), (1, 9, 37)])
def test_other_shapes_are_refused_and_told(tmp_path, golden_pair, shape):
    _, finetuned = golden_checkpoints()
    finetuned[UP] = integers(shape)
    write_checkpoint(tmp_path / "other", finetuned)
    with pytest.raises(CheckpointMismatchError, match="have other shapes") as caught:
        extract(golden_pair[0], tmp_path / "other", tmp_path / "out")
    assert f"{UP} ([9, 37] against {list(shape)})" in str(caught.value)
    assert not (tmp_path / "out").exists()
