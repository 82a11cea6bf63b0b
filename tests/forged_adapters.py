"""Golden adapters as an attacker changes them, and what must then happen."""

from __future__ import annotations

import contextlib
import hashlib
import json
import resource
import shutil
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dare_adapters.adapter import Adapter
from dare_adapters.errors import AdapterFormatError
from tests.golden.make_golden import GOLDEN
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
