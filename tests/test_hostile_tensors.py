"""Damaged and lying tensors of an adapter are refused by name, before memory is taken."""

from __future__ import annotations

import contextlib
import json
import math
import struct
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dare_adapters.adapter import Adapter
from dare_adapters.errors import AdapterFormatError
from tests.forged_adapters import (
    DOWN,
    EMBED,
    HEAD,
    NORM,
    ONE_BIT,
    RANDOM,
    STORED,
    TENSORS,
    UP,
    bounded_memory,
    forged,
    key_of,
    read_config,
    refuse,
    replace_tensor,
    sign,
)
from tests.golden.make_golden import GOLDEN
from tests.reference import RawTensor, read_safetensors, write_safetensors


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
