"""Statistics files: what is written is read, and what is hostile is refused by name."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import dare_adapters
from dare_adapters.adapter import Adapter
from dare_adapters.errors import (
    AdapterExistsError,
    AdapterFormatError,
    AdapterNotFoundError,
    DareError,
)
from dare_adapters.statistics import StatisticsFile, open_statistics, write_statistics
from dare_adapters.statistics.file import StatisticsInfo
from tests.checkpoints import fine_tuned, integers, write_checkpoint

WEIGHT, BIAS, FROZEN = "layer.weight", "layer.bias", "frozen.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes a matrix and a vector of a base with one matrix more."""
    root = tmp_path_factory.mktemp("statistics")
    base = {
        WEIGHT: integers((12, 20)),
        BIAS: integers((12,), 500),
        FROZEN: integers((20, 20), 900),
    }
    write_checkpoint(root / "base", base)
    write_checkpoint(root / "tuned", {**fine_tuned(base), FROZEN: base[FROZEN]})
    for name, seed in (("adapter", 1), ("other", 2)):
        dare_adapters.extract(
            root / "base",
            root / "tuned",
            root / name,
            drop_rate=0.5,
            seed=seed,
            on_large_delta="ignore",
            progress=False,
        )
    assert FROZEN not in Adapter.open(root / "adapter")
    return root


@pytest.fixture
def adapter(made: Path, tmp_path: Path) -> Adapter:
    return Adapter.open(shutil.copytree(made / "adapter", tmp_path / "adapter"))


def info(adapter: Adapter, kind: str = "fisher", **changes: Any) -> StatisticsInfo:
    settings = {"examples": 10, "dataset": "words", **changes}
    return StatisticsInfo(kind, adapter.config.sha256, **settings)


def fishers() -> dict[str, torch.Tensor]:
    shapes = {WEIGHT: (12, 20), BIAS: (12,), FROZEN: (20, 20)}
    return {n: integers(s, 40).abs() * 1e-9 for n, s in shapes.items()}


def grams() -> dict[str, torch.Tensor]:
    return {name: integers((20, 20)) @ integers((20, 20)).T for name in (WEIGHT, FROZEN)}


def tensors_of(kind: str) -> dict[str, torch.Tensor]:
    return fishers() if kind == "fisher" else grams()


@pytest.mark.parametrize("kind", ["fisher", "gram"])
def test_what_is_written_is_read(adapter: Adapter, kind: str):
    settings = {"batch_size": 16, "seed": 0}
    path = write_statistics(adapter.path, info(adapter, kind, settings=settings), tensors_of(kind))
    assert path == adapter.path / f"{kind}.safetensors"
    found = open_statistics(adapter.path, kind)
    assert found.keys() == tensors_of(kind).keys()
    for name, value in tensors_of(kind).items():
        assert torch.equal(found[name], value)
    assert found.info == info(adapter, kind, settings=settings)
    assert found.nbytes == path.stat().st_size
    assert "nowhere" not in found
    assert found.get("nowhere") is None
    with pytest.raises(KeyError):
        found["nowhere"]


def test_a_file_says_of_itself_what_its_format_says(adapter: Adapter):
    path = write_statistics(adapter.path, info(adapter), fishers())
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        assert set(file.keys()) == set(fishers())
    assert json.loads(metadata["dare_statistics"]) == {
        "format_version": 1,
        "kind": "fisher",
        "adapter_sha256": adapter.config.sha256,
        "examples": 10,
        "dataset": "words",
        "dtype": "F32",
        "settings": {},
    }


def test_an_adapter_with_statistics_opens_copies_and_keeps_them(adapter: Adapter, tmp_path: Path):
    write_statistics(adapter.path, info(adapter), fishers())
    assert Adapter.open(adapter.path).keys() == adapter.keys()
    adapter.save(tmp_path / "copy")
    assert torch.equal(open_statistics(tmp_path / "copy", "fisher")[BIAS], fishers()[BIAS])


def test_bfloat16_halves_the_file_and_reads_as_float32(adapter: Adapter, tmp_path: Path):
    values = {WEIGHT: torch.rand(12, 20)}
    sizes = {}
    for dtype in ("F32", "BF16"):
        out = tmp_path / dtype
        write_statistics(out, info(adapter, dtype=dtype), values)
        found = open_statistics(adapter, "fisher", out)
        assert found[WEIGHT].dtype == torch.float32
        expected = values[WEIGHT] if dtype == "F32" else values[WEIGHT].bfloat16().float()
        assert torch.equal(found[WEIGHT], expected)
        with safe_open(out / "fisher.safetensors", framework="pt") as file:
            sizes[dtype] = file.get_tensor(WEIGHT).nbytes
    assert sizes == {"F32": 960, "BF16": 480}


def test_the_gram_matrix_of_a_weight_stored_inputs_first_has_a_dimension_more(adapter: Adapter):
    tensors = {WEIGHT: torch.eye(12)[None], FROZEN: grams()[FROZEN][None]}
    write_statistics(adapter.path, info(adapter, "gram"), tensors)
    found = open_statistics(adapter, "gram")
    assert all(torch.equal(found[name], value) for name, value in tensors.items())


def test_an_existing_file_is_only_replaced_when_asked(adapter: Adapter):
    path = write_statistics(adapter.path, info(adapter), fishers())
    before = path.read_bytes()
    with pytest.raises(AdapterExistsError, match=r"fisher\.safetensors exists.*--force"):
        write_statistics(adapter.path, info(adapter, examples=20), fishers())
    assert path.read_bytes() == before
    write_statistics(adapter.path, info(adapter, examples=20), fishers(), overwrite=True)
    assert open_statistics(adapter, "fisher").info.examples == 20


def test_a_write_that_fails_leaves_what_was_there(adapter: Adapter):
    path = write_statistics(adapter.path, info(adapter), fishers())
    before, files = path.read_bytes(), sorted(adapter.path.iterdir())
    broken = {**fishers(), "z": torch.empty(2, device="meta")}
    with pytest.raises(TypeError):
        write_statistics(adapter.path, info(adapter), broken, overwrite=True)
    assert path.read_bytes() == before
    assert sorted(adapter.path.iterdir()) == files


def test_too_small_a_disk_is_told_before_anything_is_written(
    adapter: Adapter, monkeypatch: pytest.MonkeyPatch
):
    usage = shutil.disk_usage(adapter.path)._replace(free=1 << 19)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DareError, match="MB are needed"):
        write_statistics(adapter.path, info(adapter), fishers())
    assert not (adapter.path / "fisher.safetensors").exists()


@pytest.mark.parametrize(
    ("kind", "dtype", "message"),
    [
        ("hessian", "F32", "there are fisher, gram"),
        ("fisher", "F16", "F32, BF16"),
        ("gram", "BF16", "inverted"),
    ],
)
def test_what_is_no_statistic_is_not_written(adapter: Adapter, kind: str, dtype: str, message: str):
    with pytest.raises(ValueError, match=message):
        write_statistics(adapter.path, info(adapter, kind, dtype=dtype), fishers())


def test_statistics_travel_with_what_holds_them(adapter: Adapter):
    write_statistics(adapter.path, info(adapter), fishers())
    found = open_statistics(adapter, "fisher")
    assert copy.deepcopy(found) is found
    again = pickle.loads(pickle.dumps(found))
    assert isinstance(again, StatisticsFile)
    assert torch.equal(again[WEIGHT], found[WEIGHT])


def test_statistics_that_are_not_there_are_named_with_the_command_that_makes_them(adapter: Adapter):
    with pytest.raises(AdapterNotFoundError, match=r"gram\.safetensors.*dare-adapters stats"):
        open_statistics(adapter, "gram")
    with pytest.raises(ValueError, match="there are fisher, gram"):
        open_statistics(adapter, "hessian")


# Hostile files ------------------------------------------------------------------------------------


def test_statistics_of_another_adapter_are_refused(adapter: Adapter, made: Path):
    write_statistics(adapter.path, info(Adapter.open(made / "other")), fishers())
    with pytest.raises(AdapterFormatError, match="of another adapter"):
        open_statistics(adapter, "fisher")


def test_statistics_of_another_kind_are_refused(adapter: Adapter):
    path = write_statistics(adapter.path, info(adapter, "gram"), grams())
    path.rename(adapter.path / "fisher.safetensors")
    with pytest.raises(AdapterFormatError, match="holds gram statistics, not fisher"):
        open_statistics(adapter, "fisher")


@pytest.mark.parametrize(
    ("kind", "name", "value", "message"),
    [
        ("fisher", WEIGHT, torch.zeros(20, 12), r"layer\.weight has the shape \[20, 12\]"),
        ("fisher", BIAS, torch.zeros(1), r"layer\.bias has the shape \[1\], expected \[12\]"),
        ("fisher", FROZEN, torch.zeros(20, 21), r"frozen\.weight .*expected 400 entries"),
        ("fisher", "stranger", torch.zeros(2), "stranger is no parameter of the base"),
        ("fisher", WEIGHT, torch.zeros(12, 20, dtype=torch.float16), "is F16"),
        ("fisher", WEIGHT, torch.zeros(12, 20, dtype=torch.bfloat16), "is BF16, .* says F32"),
        ("fisher", WEIGHT, torch.zeros(12, 20, dtype=torch.int64), "is I64"),
        ("gram", WEIGHT, torch.zeros(20, 12), r"expected \(inputs, inputs\), or \(1, inputs"),
        ("gram", WEIGHT, torch.zeros(12, 12), r"layer\.weight has the shape \[12, 12\]"),
        ("gram", WEIGHT, torch.zeros(1, 20, 20), r"layer\.weight has the shape \[1, 20, 20\]"),
        ("gram", FROZEN, torch.zeros(2, 20, 20), r"frozen\.weight has the shape"),
        ("gram", FROZEN, torch.zeros(20), r"frozen\.weight has the shape"),
        ("gram", WEIGHT, torch.zeros(13, 13), r"layer\.weight has the shape \[13, 13\]"),
        ("gram", BIAS, torch.zeros(12, 12), r"layer\.bias has the shape"),
        ("gram", FROZEN, torch.zeros(20, 20, 1), r"frozen\.weight has the shape"),
    ],
)
def test_a_tensor_that_does_not_fit_the_adapter_is_refused_by_name(
    adapter: Adapter, kind: str, name: str, value: torch.Tensor, message: str
):
    rewrite(adapter, kind, tensors={**tensors_of(kind), name: value})
    with pytest.raises(AdapterFormatError, match=message):
        open_statistics(adapter, kind)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -1.0])
@pytest.mark.parametrize("kind", ["fisher", "gram"])
def test_numbers_that_no_statistic_has_are_refused_when_read(
    adapter: Adapter, kind: str, value: float
):
    tensors = tensors_of(kind)
    tensors[FROZEN][3, 3] = value
    rewrite(adapter, kind, tensors=tensors)
    found = open_statistics(adapter, kind)
    assert torch.equal(found[WEIGHT], tensors[WEIGHT])
    with pytest.raises(AdapterFormatError, match=r"frozen\.weight holds NaN, infinity"):
        found[FROZEN]


def test_gram_matrices_may_have_negative_entries_off_the_diagonal(adapter: Adapter):
    write_statistics(adapter.path, info(adapter, "gram"), grams())
    assert bool((open_statistics(adapter, "gram")[WEIGHT] < 0).any())


def rewrite(
    adapter: Adapter,
    kind: str = "fisher",
    change: Callable[[dict[str, Any]], object] = lambda raw: None,
    tensors: dict[str, torch.Tensor] | None = None,
) -> Path:
    """A statistics file with metadata and tensors of anyone's choice."""
    raw = {
        "format_version": 1,
        "kind": kind,
        "adapter_sha256": adapter.config.sha256,
        "examples": 10,
        "dataset": "words",
        "dtype": "F32",
        "settings": {},
    }
    change(raw)
    path = adapter.path / f"{kind}.safetensors"
    held = {n: t.contiguous() for n, t in (tensors or tensors_of(kind)).items()}
    save_file(held, path, {"dare_statistics": json.dumps(raw)})
    return path


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format_version", 2, "version 2, this library reads up to 1; upgrade"),
        ("format_version", "1", "format_version is '1'"),
        ("format_version", True, "format_version is True"),
        ("format_version", 0, "format_version is 0"),
        ("kind", "hessian", "kind is 'hessian'"),
        ("kind", ["fisher"], "kind is"),
        ("adapter_sha256", 7, "adapter_sha256 is 7"),
        ("adapter_sha256", "", "of another adapter"),
        ("examples", -1, "examples is -1"),
        ("examples", 1e30, "examples is 1e"),
        ("examples", None, "examples is None"),
        ("dataset", {}, "dataset is {}"),
        ("dtype", "F64", "dtype is 'F64'"),
        ("dtype", {"F32": 1}, "dtype is"),
        ("settings", [], r"settings is \[\]"),
    ],
)
def test_metadata_that_makes_no_sense_is_refused_by_field(
    adapter: Adapter, field: str, value: object, message: str
):
    rewrite(adapter, change=lambda raw: raw.update({field: value}))
    with pytest.raises(AdapterFormatError, match=message):
        open_statistics(adapter, "fisher")


def test_a_gram_file_cannot_claim_bfloat16(adapter: Adapter):
    rewrite(adapter, "gram", lambda raw: raw.update(dtype="BF16"))
    with pytest.raises(AdapterFormatError, match="expected one of F32"):
        open_statistics(adapter, "gram")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "no dare_statistics"),
        ({"format": "pt"}, "no dare_statistics"),
        ({"dare_statistics": "{"}, "not JSON"),
        ({"dare_statistics": "[" * 100_000}, "not JSON"),
        ({"dare_statistics": "[]"}, "not an object"),
        ({"dare_statistics": "{}"}, "format_version is None"),
        ({"dare_statistics": " " * (17 << 20)}, "no dare_statistics"),
    ],
)
def test_metadata_that_is_not_a_description_is_refused(
    adapter: Adapter, metadata: dict[str, str] | None, message: str
):
    save_file(fishers(), adapter.path / "fisher.safetensors", metadata)
    with pytest.raises(AdapterFormatError, match=message):
        open_statistics(adapter, "fisher")


@pytest.mark.parametrize("cut", [0, 7, 100, -1])
def test_a_file_that_was_cut_is_refused(adapter: Adapter, cut: int):
    path = rewrite(adapter)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(AdapterFormatError, match="not a safetensors file"):
        open_statistics(adapter, "fisher")


def test_a_file_that_claims_more_than_it_has_allocates_nothing(adapter: Adapter):
    shape = [1 << 40]
    header = {WEIGHT: {"dtype": "F32", "shape": shape, "data_offsets": [0, 1 << 42]}}
    text = json.dumps(header).encode()
    (adapter.path / "fisher.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(AdapterFormatError, match="not a safetensors file"):
        open_statistics(adapter, "fisher")
