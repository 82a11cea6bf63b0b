"""Damaged, lying and malicious files are refused by name, before memory is taken or code is run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import pickle
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import dare_adapters
from dare_adapters.adapter import Adapter
from dare_adapters.checkpoint import open_checkpoint
from dare_adapters.errors import (
    AdapterExistsError,
    AdapterFormatError,
    AdapterNotFoundError,
    CheckpointError,
    CheckpointMismatchError,
    DareError,
)
from tests.checkpoints import fine_tuned, integers, raw, write_checkpoint
from tests.golden.make_golden import GOLDEN, golden_checkpoints
from tests.reference import RawTensor, read_safetensors, write_safetensors

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
BINDING = (
    "format_version",
    "seed",
    "parameters",
    "witness",
    "finetuned_prefix",
    "ignored_base_parameters",
    "sha256",
)
RANDOM, STORED, ONE_BIT = "adapter_v1", "adapter_v1_magnitude", "adapter_v1_one_bit"
EMBED = "model.embed_tokens.weight"
UP = "model.layers.0.mlp.up_proj.weight"  # bernoulli; gaps
DOWN = "model.layers.0.mlp.down_proj.weight"  # blocked; bitmap
NORM = "model.layers.0.norm.weight"  # dense
HEAD = "classifier.weight"  # new
MEMORY = 48 << 20
Json = dict[str, Any]


# --- what an attacker does


@contextlib.contextmanager
def forged(name: str) -> Iterator[Path]:
    """A golden adapter to tamper with."""
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "adapter"
        shutil.copytree(GOLDEN / name, copy)
        yield copy


def read_config(directory: Path) -> Json:
    return json.loads((directory / CONFIG).read_text(encoding="utf-8"))


def write_config(directory: Path, config: Json) -> None:
    (directory / CONFIG).write_text(json.dumps(config), encoding="utf-8")


def sign(directory: Path, config: Json) -> None:
    """Write a config with the SHA-256 of whatever tensors are there, and a digest that fits."""
    tensors = (directory / TENSORS).read_bytes()
    config["sha256"] = hashlib.sha256(tensors).hexdigest()
    bound = {key: config.get(key) for key in BINDING}
    text = json.dumps(bound, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    config["digest"] = hashlib.sha256(text.encode()).hexdigest()
    write_config(directory, config)


def replace_tensor(directory: Path, key: str, change: Callable[[RawTensor], RawTensor]) -> None:
    """Change one tensor and sign."""
    tensors = read_safetensors(directory / TENSORS)
    tensors[key] = change(tensors[key])
    write_safetensors(directory / TENSORS, tensors)
    sign(directory, read_config(directory))


def key_of(name: str, part: str) -> str:
    module, _, last = name.rpartition(".")
    return f"base_model.model.{module}.dare_{last}_{part}"


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """Fails where more memory is taken than a tiny adapter can need."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    try:
        yield
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MEMORY
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown << 10 < 4 * MEMORY  # what PyTorch takes is not traced


def refuse(directory: Path, match: str | None = None) -> None:
    with bounded_memory(), pytest.raises(AdapterFormatError, match=match) as caught:
        Adapter.open(directory)
    assert len(str(caught.value)) < 2000


def test_the_forger_forges_well():
    for name in (RANDOM, STORED):
        with forged(name) as directory:
            stored = read_config(directory)
            signed = dict(stored)
            sign(directory, signed)
            assert signed == stored
            tensors = read_safetensors(directory / TENSORS)
            write_safetensors(directory / TENSORS, tensors)
            sign(directory, stored)
            Adapter.open(directory)


# --- the tensors file, damaged


@settings(max_examples=60, deadline=None)
@given(data=st.data(), name=st.sampled_from([RANDOM, STORED]))
def test_any_damage_to_the_tensors_is_noticed(data, name):
    whole = (GOLDEN / name / TENSORS).read_bytes()
    kind = data.draw(st.sampled_from(["truncate", "flip", "append", "insert"]))
    place = data.draw(st.integers(0, len(whole) - 1))
    extra = data.draw(st.binary(min_size=1, max_size=9))
    damaged = {
        "truncate": whole[:place],
        "flip": whole[:place] + bytes([whole[place] ^ (extra[0] or 1)]) + whole[place + 1 :],
        "append": whole + extra,
        "insert": whole[:place] + extra + whole[place:],
    }[kind]
    assume(damaged != whole)
    with forged(name) as directory:
        (directory / TENSORS).write_bytes(damaged)
        refuse(directory, "SHA-256")


@settings(max_examples=120, deadline=None)
@given(data=st.data(), name=st.sampled_from([RANDOM, STORED]))
def test_a_flipped_byte_with_a_fitting_sha256_never_does_more_than_change_numbers(data, name):
    whole = bytearray((GOLDEN / name / TENSORS).read_bytes())
    place = data.draw(st.integers(0, len(whole) - 1))
    whole[place] ^= data.draw(st.integers(1, 255))
    with forged(name) as directory:
        (directory / TENSORS).write_bytes(whole)
        sign(directory, read_config(directory))
        with bounded_memory(), contextlib.suppress(AdapterFormatError):
            for _, delta in Adapter.open(directory).deltas():
                assert bool(torch.isfinite(delta.dense()).all())


def header_of(entries: Any, length: int | None = None, data: bytes = b"") -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        header_of({}),
        header_of(b"{", 1),
        header_of({}, 2**63),
        header_of({}, 2**64 - 1),
        header_of(b"[" * 5000),
        header_of(b"\xff\xfe"),
        header_of({"a": 1}),
        header_of({"a": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 2**63]}}),
        header_of({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, data=bytes(8)),
        header_of({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, data=bytes(4)),
        header_of({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, data=bytes(8)),
        header_of({"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}, data=bytes(8)),
    ],
)
def test_a_file_that_is_not_safetensors_is_refused(content):
    with forged(RANDOM) as directory:
        (directory / TENSORS).write_bytes(content)
        sign(directory, read_config(directory))
        refuse(directory)
        with pytest.raises(AdapterFormatError):
            Adapter.open(directory, verify=False)


def test_missing_and_unknown_tensors_are_named():
    tensors = read_safetensors(GOLDEN / RANDOM / TENSORS)
    for key in tensors:
        with forged(RANDOM) as directory:
            left = {name: value for name, value in tensors.items() if name != key}
            write_safetensors(directory / TENSORS, left)
            sign(directory, read_config(directory))
            refuse(directory, f"{key} is absent")
    with forged(RANDOM) as directory:
        more = {**tensors, "base_model.model.evil": RawTensor("U8", (1,), b"x")}
        write_safetensors(directory / TENSORS, more)
        sign(directory, read_config(directory))
        refuse(directory, "base_model.model.evil is U8 .*, the config says absent")


NUMBERS = [
    (RANDOM, NORM, "delta", "<e"),
    (STORED, NORM, "delta", "<e"),
    (RANDOM, EMBED, "rows", "<f"),
    (STORED, EMBED, "rows", "<f"),
    (ONE_BIT, DOWN, "scales", "<e"),
    (ONE_BIT, UP, "scales", "<e"),
]


@pytest.mark.parametrize(("adapter", "name", "part", "code"), NUMBERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_in_an_adapter_are_refused(adapter, name, part, code, value):
    bad = struct.pack(code, value)

    def spoil(tensor: RawTensor) -> RawTensor:
        return tensor._replace(data=tensor.data[: -len(bad)] + bad)

    with forged(adapter) as directory:
        replace_tensor(directory, key_of(name, part), spoil)
        refuse(directory, "holds NaN or infinity")


def test_a_nan_in_a_new_parameter_is_refused():
    with forged(RANDOM) as directory:
        spoil = lambda t: t._replace(data=t.data[:-2] + b"\xff\x7f")  # noqa: E731
        replace_tensor(directory, key_of(HEAD, "value"), spoil)
        refuse(directory, "holds NaN or infinity")


def test_a_negative_scale_is_refused():
    with forged(ONE_BIT) as directory:
        spoil = lambda t: t._replace(data=struct.pack("<e", -1.0) + t.data[2:])  # noqa: E731
        replace_tensor(directory, key_of(DOWN, "scales"), spoil)
        refuse(directory, "negative scale")


# --- stored supports that lie


def test_gaps_that_run_outside_the_parameter_are_refused():
    with forged(STORED) as directory:
        outside = lambda t: t._replace(data=b"\xfe" * len(t.data))  # noqa: E731
        replace_tensor(directory, key_of(UP, "support"), outside)
        refuse(directory, "its column gaps run to entry")


def test_gaps_that_name_fewer_entries_are_refused():
    with forged(STORED) as directory:
        fewer = lambda t: t._replace(data=t.data[:-1] + b"\xff")  # noqa: E731
        replace_tensor(directory, key_of(UP, "support"), fewer)
        refuse(directory, "the support of .* has 9 entries, the config says 10")


def test_bitmaps_that_name_other_entries_are_refused():
    with forged(STORED) as directory:
        more = lambda t: t._replace(data=b"\xff" * 7 + t.data[7:])  # noqa: E731
        replace_tensor(directory, key_of(DOWN, "support"), more)
        refuse(directory)
    with forged(STORED) as directory:  # 50 columns take 7 bytes, of which 6 bits are unused
        beyond = lambda t: t._replace(data=t.data[:6] + b"\x80" + t.data[7:])  # noqa: E731
        replace_tensor(directory, key_of(DOWN, "support"), beyond)
        refuse(directory, "columns beyond 50")


# --- the config, edited


EDITS: list[tuple[str, str | None, str, Any]] = [
    (RANDOM, None, "seed", 1),
    (RANDOM, None, "sha256", "0" * 64),
    (RANDOM, None, "finetuned_prefix", "bert."),
    (RANDOM, None, "ignored_base_parameters", [DOWN]),
    (RANDOM, None, "witness", {}),
    (RANDOM, None, "format_version", 2),
    (RANDOM, DOWN, "bits", 8),
    (RANDOM, DOWN, "block", 5),
    (RANDOM, DOWN, "shape", [7, 51]),
    (RANDOM, DOWN, "exponent", 3),
    (RANDOM, DOWN, "mask", "bernoulli"),
    (RANDOM, EMBED, "added_rows", 3),
    (RANDOM, EMBED, "added_dtype", "F16"),
    (RANDOM, UP, "slots", 109),
    (RANDOM, UP, "value_units", 65),
    (RANDOM, UP, "drop_rate", 0.71),
    (RANDOM, HEAD, "finetuned_name", "other"),
    (STORED, UP, "support_bytes", 11),
    (STORED, UP, "mask", "bitmap"),
]


@pytest.mark.parametrize(("adapter", "parameter", "field", "value"), EDITS)
def test_an_edited_field_is_noticed(adapter, parameter, field, value):
    with forged(adapter) as directory:
        config = read_config(directory)
        place = config if parameter is None else config["parameters"][parameter]
        assert place.get(field) != value
        place[field] = value
        write_config(directory, config)
        refuse(directory)


def test_fields_for_people_may_be_edited():
    with forged(RANDOM) as directory:
        config = read_config(directory)
        config["base_model_name_or_path"], config["revision"] = "someone/base", "main"
        write_config(directory, config)
        assert Adapter.open(directory).config.base_model_name_or_path == "someone/base"


def test_a_parameter_that_is_removed_is_noticed():
    with forged(RANDOM) as directory:
        config = read_config(directory)
        del config["parameters"][NORM]
        write_config(directory, config)
        refuse(directory, "its digest does not match")
        sign(directory, config)
        refuse(directory, "the config says absent")


LIES: list[tuple[str, str, Json]] = [
    *(
        (RANDOM, DOWN, {"shape": shape})
        for shape in (
            [7, 48],
            [7, 57],
            [8, 50],
            [50, 7],
            [1 << 20, 1 << 20],
            [1, 1 << 40],
            [1 << 40, 1],
            [1 << 40, 0],
            [7, 0],
            [0, 50],
            [-7, 50],
            [7.0, 50],
            ["7", 50],
            [7, True],
            [1 << 41],
            [1] * 9,
            [],
            "7x50",
            None,
        )
    ),
    *((RANDOM, DOWN, {"bits": bits}) for bits in (0, 1, 2, 3, 8, 4.0, True, "4", None, [4])),
    (RANDOM, DOWN, {"bits": 16}),
    (RANDOM, DOWN, {"bits": 16, "dtype": "F16"}),
    (RANDOM, DOWN, {"bits": 32, "dtype": "F32"}),
    (RANDOM, DOWN, {"bits": 32, "dtype": "U8"}),
    *((RANDOM, DOWN, {"block": block}) for block in (1, 3, 5, 65536, 0, -4, 65537, 4.0, None)),
    *((RANDOM, DOWN, {"exponent": e}) for e in (127, 128, 1000, -1000, 1.5, "1", True)),
    *((RANDOM, DOWN, {"drop_rate": p}) for p in (1.0, -0.1, "0.75", None, True, 1e999)),
    *((RANDOM, DOWN, {"mask": mask}) for mask in ("bernoulli", "gaps", "bitmap", "x", None, 1)),
    *((RANDOM, DOWN, {"kind": kind}) for kind in ("dense", "new", "x", None, ["sparse"])),
    (RANDOM, DOWN, {"kind": "dense", "dtype": "F32"}),
    (RANDOM, DOWN, {"surprise": 1}),
    (RANDOM, DOWN, {"finetuned_name": 3}),
    *((RANDOM, UP, {"slots": slots}) for slots in (107, 109, 0, -1, 1 << 50, 108.0)),
    *((RANDOM, UP, {"value_units": units}) for units in (0, 1, -1, 1 << 50, None)),
    *((RANDOM, UP, {"drop_rate": p}) for p in (0.0, 0.69, 0.71, 0.99, 1.0)),
    *(
        (RANDOM, UP, {"shape": shape})
        for shape in ([9, 36], [9, 38], [9, 1 << 36], [9, 1 << 20], [37, 9], [333])
    ),
    # A mask so thin that few survivors would speak for a vast parameter.
    (RANDOM, UP, {"shape": [9, 1 << 36], "drop_rate": 1 - 108 / (9 << 36)}),
    (RANDOM, UP, {"shape": [9, 1 << 30], "drop_rate": 1 - 108 / (9 << 30)}),
    *((RANDOM, EMBED, {"added_rows": rows}) for rows in (0, 1, 3, -2, 1 << 40, 1 << 41, 2.0)),
    *((RANDOM, EMBED, {"added_dtype": dtype}) for dtype in ("F16", "F64", "I32", "x", None)),
    *((RANDOM, NORM, {"shape": shape}) for shape in ([20], [22], [1, 21], [1 << 40])),
    *((RANDOM, NORM, {"dtype": dtype}) for dtype in ("F32", "F64", "I32", "x", None)),
    *((RANDOM, HEAD, {"shape": shape}) for shape in ([3, 17], [54], [1 << 40])),
    (RANDOM, HEAD, {"added_rows": 1, "added_dtype": "F32"}),
    *((STORED, UP, {"shape": shape}) for shape in ([9, 1 << 36], [9, 1 << 24], [9, 2])),
    *((STORED, UP, {"support_bytes": size}) for size in (0, 9, 11, -1, 1 << 50)),
    *((STORED, UP, {"slots": slots}) for slots in (0, 9, 11)),
    *((STORED, DOWN, {"shape": shape}) for shape in ([7, 40], [7, 57], [1 << 20, 50])),
    *((STORED, DOWN, {"slots": slots}) for slots in (87, 89, 350)),
]


@pytest.mark.parametrize(
    ("adapter", "parameter", "lie"), LIES, ids=lambda v: str(v).split(".")[-2:][0][:60]
)
def test_a_lie_with_a_fitting_digest_is_refused_without_taking_memory(adapter, parameter, lie):
    with forged(adapter) as directory:
        config = read_config(directory)
        config["parameters"][parameter].update(lie)
        sign(directory, config)
        refuse(directory)


def test_a_lie_that_contradicts_nothing_inside_contradicts_the_base(tmp_path):
    base, _ = golden_checkpoints()
    write_checkpoint(tmp_path / "base", base)
    with forged(RANDOM) as directory:
        config = read_config(directory)
        config["parameters"][DOWN]["shape"] = [7, 49]  # as many blocks as with 50 columns
        sign(directory, config)
        Adapter.open(directory)
        with pytest.raises(CheckpointMismatchError, match="1 in other shapes"):
            dare_adapters.export(tmp_path / "base", directory, tmp_path / "out", progress=False)


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.sampled_from([0, 1, 2, 4, 16, 32, 255, 65536, 1 << 20, 1 << 40])
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["sparse", "dense", "new", "blocked", "gaps", "bitmap", "F32", "U8"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2)
    ),
    max_leaves=4,
)


@settings(max_examples=120, deadline=None)
@given(data=st.data(), adapter=st.sampled_from([RANDOM, STORED]))
def test_any_signed_config_opens_or_is_refused_by_name(data, adapter):
    with forged(adapter) as directory:
        config = read_config(directory)
        for _ in range(data.draw(st.integers(1, 3))):
            inside = data.draw(st.booleans())
            place = config["parameters"] if inside else config
            if inside and isinstance(place, dict) and place:
                name = data.draw(st.sampled_from(sorted(place)))
                place = place[name]
            if not isinstance(place, dict) or not place:
                continue
            key = data.draw(st.sampled_from(sorted(place)))
            place[key] = data.draw(JSON_VALUES)
        sign(directory, config)
        with bounded_memory(), contextlib.suppress(AdapterFormatError):
            Adapter.open(directory)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "nonsense",
        "[]",
        "3",
        '"DARE"',
        "null",
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"peft_type": "DARE", "seed": ' + "9" * 10_000 + "}",
        '{"peft_type": "DARE", "format_version": 1e400}',
        '{"peft_type": "DARE"}',
        '{"peft_type": "LORA"}',
        '{"peft_type": ["DARE"]}',
        "\ud800".encode("utf-16", "surrogatepass").decode("latin-1"),
    ],
)
def test_a_config_that_is_none_is_refused(text):
    with forged(RANDOM) as directory:
        (directory / CONFIG).write_text(text, encoding="utf-8")
        refuse(directory)


def test_a_config_that_is_no_text_is_refused():
    with forged(RANDOM) as directory:
        (directory / CONFIG).write_bytes(b"\xff\xfe\x00{")
        refuse(directory, "not readable as JSON")


@pytest.mark.parametrize("depth", [70, 300, 900, 950, 960, 970, 980, 990, 1000])
@pytest.mark.parametrize("field", ["peft_type", "witness", "fidelity", "seed", "parameters"])
def test_nesting_is_refused_at_every_depth(depth, field):
    with forged(RANDOM) as directory:
        config = read_config(directory)
        config[field] = "NESTED"
        text = json.dumps(config).replace('"NESTED"', '{"a":' * depth + "1" + "}" * depth)
        (directory / CONFIG).write_text(text)
        refuse(directory)


def test_missing_files_are_named(tmp_path):
    with forged(RANDOM) as directory:
        (directory / TENSORS).unlink()
        with pytest.raises(AdapterNotFoundError, match=TENSORS):
            Adapter.open(directory)
        (directory / CONFIG).unlink()
        with pytest.raises(AdapterNotFoundError, match=CONFIG):
            Adapter.open(directory)
    with pytest.raises(AdapterNotFoundError):
        Adapter.open(tmp_path / "nowhere")


def test_a_newer_format_says_that_it_is_newer():
    with forged(RANDOM) as directory:
        config = read_config(directory)
        config["format_version"] = 2
        sign(directory, config)
        refuse(directory, "format version 2, this library reads up to 1; upgrade")


@pytest.mark.parametrize(
    "witness", ["", "F32:", "F32:AAAA", "X:" + "A" * 44, 3, None, "F32:" + "A" * 1000, [1]]
)
def test_a_witness_that_is_none_is_refused_when_it_is_compared(tmp_path, witness):
    base, _ = golden_checkpoints()
    write_checkpoint(tmp_path / "base", base)
    with forged(RANDOM) as directory:
        config = read_config(directory)
        config["witness"][DOWN] = witness
        sign(directory, config)
        with pytest.raises(AdapterFormatError, match="witness"):
            dare_adapters.export(tmp_path / "base", directory, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["[]", "{", "[" * 100_000])
def test_a_hostile_model_config_inside_an_adapter_is_refused(tmp_path, content):
    base, _ = golden_checkpoints()
    write_checkpoint(tmp_path / "base", base)
    with forged(RANDOM) as directory:
        (directory / "finetuned_config.json").write_text(content)
        with pytest.raises(AdapterFormatError, match="finetuned_config"):
            dare_adapters.export(tmp_path / "base", directory, tmp_path / "out", progress=False)
    assert list(tmp_path.iterdir()) == [tmp_path / "base"]


# --- checkpoints


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A sound base and fine-tune."""
    base, finetuned = golden_checkpoints()
    return (
        write_checkpoint(tmp_path / "base", base),
        write_checkpoint(tmp_path / "finetuned", finetuned),
    )


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
def test_code_in_a_pickled_checkpoint_is_not_run(tmp_path, pair, zipped):
    marker = tmp_path / "owned"
    directory = tmp_path / "evil"
    directory.mkdir()
    state = {"w": integers((2, 3)), "x": Payload(marker)}
    file = directory / "pytorch_model.bin"
    torch.save(state, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="weights_only"):
        extract(pair[0], directory, tmp_path / "out")
    file.write_bytes(pickle.dumps(Payload(marker), protocol=2))
    with pytest.raises(CheckpointError, match="weights_only"):
        extract(directory, pair[1], tmp_path / "out")
    assert not marker.exists()
    pickle.loads(pickle.dumps(Payload(marker)))  # the payload is a real one
    assert marker.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_checkpoint_of_tensors_gives_the_same_adapter(tmp_path, pair, zipped):
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
    one = extract(*pair, tmp_path / "one")
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


def test_what_a_fine_tune_lacks_is_listed(tmp_path, pair):
    _, finetuned = golden_checkpoints()
    del finetuned[UP], finetuned[NORM]
    write_checkpoint(tmp_path / "less", finetuned)
    with pytest.raises(CheckpointMismatchError, match="lacks 2 of the 6 parameters") as caught:
        extract(pair[0], tmp_path / "less", tmp_path / "out")
    assert UP in str(caught.value)
    assert NORM in str(caught.value)
    adapter = extract(
        pair[0], tmp_path / "less", tmp_path / "out", ignore_missing=["*.up_proj.*", NORM]
    )
    assert adapter.config.ignored_base_parameters == sorted([UP, NORM])


@pytest.mark.parametrize("shape", [(9, 38), (8, 37), (10, 37), (333,), (1, 9, 37)])
def test_other_shapes_are_refused_and_told(tmp_path, pair, shape):
    _, finetuned = golden_checkpoints()
    finetuned[UP] = integers(shape)
    write_checkpoint(tmp_path / "other", finetuned)
    with pytest.raises(CheckpointMismatchError, match="have other shapes") as caught:
        extract(pair[0], tmp_path / "other", tmp_path / "out")
    assert f"{UP} ([9, 37] against {list(shape)})" in str(caught.value)
    assert not (tmp_path / "out").exists()


# --- writing


def test_an_existing_path_is_not_overwritten_unless_asked(tmp_path, pair):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("kept")
    with pytest.raises(AdapterExistsError, match="exists; choose another path"):
        extract(*pair, out)
    assert os.listdir(out) == ["precious"]
    extract(*pair, out, overwrite=True)
    assert not (out / "precious").exists()
    Adapter.open(out)
    assert sorted(os.listdir(tmp_path)) == ["base", "finetuned", "out"]


def test_a_failed_overwrite_leaves_the_old_adapter(tmp_path, pair):
    before = extract(*pair, tmp_path / "out", bits=8).config.sha256
    _, broken = golden_checkpoints()
    broken[DOWN] = torch.full_like(broken[DOWN], math.nan)
    write_checkpoint(tmp_path / "broken", broken)
    with pytest.raises(CheckpointError):
        extract(pair[0], tmp_path / "broken", tmp_path / "out", overwrite=True)
    assert Adapter.open(tmp_path / "out").config.sha256 == before
    assert sorted(os.listdir(tmp_path)) == ["base", "broken", "finetuned", "out"]


def test_abandoned_work_is_removed_and_work_of_the_living_is_not(tmp_path, pair):
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    host = socket.gethostname()
    names = {pid: f".out[1].partial-{host}-{pid}-0123abcd" for pid in (done.pid, os.getpid())}
    for name in names.values():
        (tmp_path / name).mkdir()
        (tmp_path / name / TENSORS).write_bytes(b"half")
    extract(*pair, tmp_path / "out[1]")
    assert not (tmp_path / names[done.pid]).exists()
    assert (tmp_path / names[os.getpid()] / TENSORS).exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small file system to fill")
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"mount is not allowed here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def large_pair(tmp_path: Path, count: int = 4) -> tuple[Path, Path]:
    base = {f"layers.{i}.weight": integers((300, 400), i) for i in range(count)}
    return (
        write_checkpoint(tmp_path / "base", base),
        write_checkpoint(tmp_path / "finetuned", fine_tuned(base)),
    )


def test_what_does_not_fit_is_refused_before_the_work(tmp_path, small_disk):
    with pytest.raises(DareError, match=r"MB are needed and .* MB are free"):
        extract(*large_pair(tmp_path), small_disk / "out")
    assert os.listdir(small_disk) == []


@pytest.mark.parametrize(
    "options", [{"bits": 32}, {"bits": 4, "drop_rate": 0.0}, {"drop_rate": 0.5}]
)
def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path, small_disk, monkeypatch, options):
    module = sys.modules["dare_adapters.extract"]
    monkeypatch.setattr(module, "require_space", lambda *_: None)  # as if others filled it
    with pytest.raises(DareError, match="No space left on device; nothing was left"):
        extract(*large_pair(tmp_path), small_disk / "out", **options)
    assert os.listdir(small_disk) == []


SLOW_EXTRACT = """
import sys, time
import dare_adapters
from dare_adapters.tensor_file import TensorFileWriter

add = TensorFileWriter.add
def slowly(self, key, tensor):
    add(self, key, tensor)
    time.sleep(0.2)
TensorFileWriter.add = slowly
dare_adapters.extract(*sys.argv[1:], seed=1, progress=False)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a signal that cannot be caught")
def test_a_killed_extraction_leaves_nothing_that_loads(tmp_path):
    base, finetuned = large_pair(tmp_path, 40)
    out = tmp_path / "out"
    arguments = [sys.executable, "-c", SLOW_EXTRACT, str(base), str(finetuned), str(out)]
    process = subprocess.Popen(arguments)
    try:
        deadline = time.monotonic() + 60
        partial: list[Path] = []
        while not any(any(path.iterdir()) for path in partial):
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
            partial = list(tmp_path.glob(".out.partial-*"))
    finally:
        process.kill()
        process.wait()
    assert len(partial) == 1
    assert partial[0].exists()
    assert not out.exists()
    for left in (out, partial[0]):
        with pytest.raises(AdapterNotFoundError):
            Adapter.open(left)
    extract(base, finetuned, out, seed=1)
    Adapter.open(out)
    assert sorted(os.listdir(tmp_path)) == ["base", "finetuned", "out"]
