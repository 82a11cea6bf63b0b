"""Edited and lying configs of an adapter are refused by name, before memory is taken."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dare_adapters
from dare_adapters.adapter import Adapter
from dare_adapters.errors import AdapterFormatError, AdapterNotFoundError, CheckpointMismatchError
from tests.checkpoints import write_checkpoint
from tests.forged_adapters import (
    CONFIG,
    DOWN,
    EMBED,
    HEAD,
    NORM,
    RANDOM,
    STORED,
    TENSORS,
    UP,
    Json,
    bounded_memory,
    forged,
    read_config,
    refuse,
    sign,
    write_config,
)
from tests.golden.make_golden import golden_checkpoints

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
