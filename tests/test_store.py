"""Any source of deltas becomes an adapter directory: complete and small, or none."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

import dare_adapters
from dare_adapters.adapter import Adapter
from dare_adapters.adapter_writer import AdapterWriter
from dare_adapters.combine.combination import Combination
from dare_adapters.delta import Delta, DenseDelta, NewParameter, NoChange
from dare_adapters.errors import (
    AdapterExistsError,
    AdapterNotFoundError,
    CheckpointError,
    CombinationError,
)
from dare_adapters.mask import BlockedSupport
from dare_adapters.open_source import open_source
from dare_adapters.source import WHOLE, DeltaSource, Renamed
from dare_adapters.store import save_source
from tests.combine.sources import (
    KINDS,
    SHAPES,
    MemorySource,
    aligned_deltas,
    delta_of,
    distinct,
    encoded,
    normal,
)
from tests.conftest import Pack, PackMaker, tiny_llama
from tests.killed_process import kill_while_writing
from tests.reference import decode_adapter, read_safetensors

TENSORS = "adapter_model.safetensors"
NAME = "layers.0.weight"


class Whole(MemorySource):
    """As if nobody had pruned it."""

    def stored_bits(self, name: str) -> int:
        return WHOLE


def source_of(**deltas: Delta | NewParameter) -> MemorySource:
    return MemorySource(deltas)


def entry_bytes(adapter: Adapter, name: str) -> int:
    stored = read_safetensors(adapter.path / TENSORS)
    return sum(len(stored[key].data) for key in adapter.config.parameters[name].tensors(name))


# --- what is stored


@pytest.mark.parametrize("kind", KINDS)
def test_at_32_bits_every_kind_of_delta_comes_back_exactly(tmp_path: Path, kind: str):
    deltas = {
        f"p{number}.weight": delta_of(kind, normal(shape, number), number)
        for number, shape in enumerate(SHAPES)
    }
    written = save_source(MemorySource(deltas), tmp_path / "out", bits=32)
    again = Adapter.open(tmp_path / "out", verify=True)
    decoded = decode_adapter(tmp_path / "out")
    assert set(again) == {name for name, delta in deltas.items() if bool(delta.dense().any())}
    for name in again:
        expected = deltas[name].dense()
        assert torch.equal(again[name].dense(), expected)
        assert np.array_equal(decoded[name], expected.double().numpy())
        vector = len(expected.shape) < 2
        assert written.config.parameters[name].kind == ("dense" if vector else "sparse")


@settings(max_examples=60, deadline=None)
@given(deltas=aligned_deltas(most=1), bits=st.sampled_from([16, 8, 4, 2, 1]), data=st.data())
def test_at_fewer_bits_nothing_that_was_zero_changes_and_the_rest_is_near(
    tmp_path_factory: pytest.TempPathFactory, deltas: list[Delta], bits: int, data: st.DataObject
):
    delta, out = deltas[0], tmp_path_factory.mktemp("store") / "out"
    save_source(source_of(w=delta), out, bits=bits)
    found, expected = Adapter.open(out, verify=True), delta.dense()
    if not bool(expected.any()):
        assert list(found) == []
        return
    change = found["w"].dense()
    assert not bool(change[expected == 0].any())
    if bits == 16:
        largest = float(expected.abs().max())
        assert torch.allclose(change, expected, rtol=2**-8, atol=largest * 2**-20)
    elif bits == 8 and len(delta.shape) > 1:
        rows = expected.reshape(delta.rows, -1).abs().amax(dim=1, keepdim=True)
        apart = (change - expected).reshape(delta.rows, -1).abs()
        assert bool((apart <= rows / 100 + 1e-12).all())


def test_what_does_not_change_is_not_stored(tmp_path: Path):
    zero = DenseDelta(torch.zeros(3, 5))
    source = source_of(a=NoChange((3, 5)), b=zero, c=NoChange((7,)), d=DenseDelta(torch.ones(2, 2)))
    assert list(save_source(source, tmp_path / "out")) == ["d"]
    assert len(save_source(source_of(a=zero), tmp_path / "nothing")) == 0
    assert list(Adapter.open(tmp_path / "nothing")) == []


def test_rows_are_added_to_what_does_not_change(tmp_path: Path):
    rows = torch.randn(2, 5)
    deltas = {"pruned": MemorySource, "whole": Whole}
    for name, kind in deltas.items():
        source = kind({"embed.weight": DenseDelta(torch.zeros(3, 5), rows)})
        save_source(source, tmp_path / name, bits=4)
        delta = Adapter.open(tmp_path / name)["embed.weight"]
        assert torch.equal(delta.added_rows, rows)
        assert torch.equal(delta.dense(), torch.zeros(3, 5))


@pytest.mark.parametrize(
    "value",
    [torch.randn(3, 4), torch.randn(2).bfloat16(), torch.arange(4), torch.tensor([True, False])],
    ids=lambda value: str(value.dtype),
)
def test_a_new_value_is_stored_as_it_is(tmp_path: Path, value: torch.Tensor):
    save_source(source_of(head=NewParameter(value)), tmp_path / "out", bits=1)
    found = Adapter.open(tmp_path / "out")["head"]
    assert isinstance(found, NewParameter)
    assert found.value.dtype == value.dtype
    assert torch.equal(found.value, value)


def test_what_nobody_pruned_stays_whole_at_any_bits(tmp_path: Path):
    values = distinct((7, 53), 1)
    for bits in (None, 1):
        out = tmp_path / str(bits)
        written = save_source(Whole({"w": DenseDelta(values)}), out, bits=bits)
        assert torch.equal(written["w"].dense(), values)
        assert written.config.parameters["w"].kind == "dense"
        assert written.config.bits == (bits or 32)


@pytest.mark.parametrize("kind", ["float32", "blocked", "bernoulli", "stored"])
@pytest.mark.parametrize("bits", [32, 8, 4, 2, 1])
def test_no_other_encoding_is_smaller(tmp_path: Path, kind: str, bits: int):
    values = distinct((40, 53), 3)
    delta = delta_of(kind, values, 3)
    written = save_source(source_of(w=delta), tmp_path / "out", bits=bits)
    kept = (delta.dense() != 0).sum(dim=1)
    per_row = [-(-int(count) * bits // 8) for count in kept]
    scales = {32: 0, 8: 2, 4: 1, 2: 1, 1: 2}[bits] * len(per_row)
    bitmap = sum(per_row) + scales + 40 * 7
    every = 40 * -(-53 * bits // 8) + scales
    full = int(kept.sum()) == values.numel()
    assert entry_bytes(written, "w") <= (every if full else bitmap)
    if bits > 1:  # one bit has no code for zero
        assert entry_bytes(written, "w") <= every


def test_a_blocked_mask_is_kept_only_if_seed_and_name_give_it_again(
    make_pack: PackMaker, tmp_path: Path
):
    kinds = {"a": {"drop_rate": 0.9, "bits": 4, "seed": 7}}
    pack = make_pack("store-seeded", config=tiny_llama(num_hidden_layers=1), kinds=kinds)
    adapter = Adapter.open(pack.adapters["a"])
    name = "model.layers.0.mlp.up_proj.weight"
    halved = Combination([adapter], [0.5])
    entry = save_source(halved, tmp_path / "same").config.parameters[name]
    assert (entry.mask, entry.block) == ("blocked", 10)
    renamed = Combination([Renamed(adapter, {f"inner.{n}": n for n in adapter})], [0.5])
    entry = save_source(renamed, tmp_path / "renamed").config.parameters[f"inner.{name}"]
    assert entry.mask in ("gaps", "bitmap")
    # A source in memory has no seed that an adapter could tell.
    support = BlockedSupport(7, NAME, 8, 40, 10)
    alone = source_of(**{NAME: encoded(distinct((8, 40), 1), support, 32)})
    assert save_source(alone, tmp_path / "alone").config.parameters[NAME].mask != "blocked"
    for directory in ("same", "renamed", "alone"):
        Adapter.open(tmp_path / directory, verify=True)


def test_a_lora_becomes_an_adapter_with_its_product(make_pack: PackMaker, tmp_path: Path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = LlamaForCausalLM(tiny_llama(num_hidden_layers=1)).float()
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"])
    tuned = peft.get_peft_model(base, config)
    with torch.no_grad():
        for parameter_name, parameter in tuned.named_parameters():
            if "lora_" in parameter_name:
                parameter.normal_(std=0.05)
    tuned.save_pretrained(tmp_path / "lora")
    written = save_source(open_source(tmp_path / "lora"), tmp_path / "out", bits=32)
    assert written.stored_bits("model.layers.0.self_attn.q_proj.weight") == 32
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model.load_dare_adapter(tmp_path / "out")
    merged = dict(tuned.merge_and_unload().named_parameters())
    for parameter_name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, merged[parameter_name], rtol=0, atol=1e-6)
    assert save_source(open_source(tmp_path / "lora"), tmp_path / "default").config.bits == 16


def test_an_adapter_itself_is_copied(make_pack: PackMaker, tmp_path: Path):
    pack = make_pack("plain")
    for name, path in pack.adapters.items():
        save_source(Combination([Combination([Adapter.open(path)], [1])], [1]), tmp_path / name)
        for file in path.iterdir():
            assert (tmp_path / name / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_threads_change_no_byte(make_pack: PackMaker, tmp_path: Path, workers: int):
    adapters = [Adapter.open(path) for path in make_pack("plain").adapters.values()]
    source = Combination(adapters, [1, 1, 1], "dare_ties", {"density": 0.3})
    one = save_source(source, tmp_path / "one", workers=1).config.sha256
    assert save_source(source, tmp_path / "other", workers=workers).config.sha256 == one


def test_without_a_bar_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    save_source(source_of(w=DenseDelta(torch.ones(2, 3))), tmp_path / "out")
    assert capfd.readouterr() == ("", "")
    save_source(source_of(w=DenseDelta(torch.ones(2, 3))), tmp_path / "bar", progress=True)
    assert "combine" in capfd.readouterr().err


# --- complete, or not there


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("shape", [(4, 9), (9,)])
def test_what_is_no_number_is_refused_with_its_parameter(
    tmp_path: Path, bits: int, value: float, shape: tuple[int, ...]
):
    damaged = torch.ones(shape)
    damaged.view(-1)[5] = value
    source = source_of(**{"a.weight": DenseDelta(torch.ones(2, 2)), NAME: DenseDelta(damaged)})
    with pytest.raises(CheckpointError, match=NAME):
        save_source(source, tmp_path / "out", bits=bits)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("bits", [3, 64, True, 4.0, "8"])
def test_bits_that_are_none_are_refused(tmp_path: Path, bits: object):
    with pytest.raises(CombinationError, match="32, 16, 8, 4, 2, 1"):
        save_source(source_of(w=DenseDelta(torch.ones(2, 2))), tmp_path / "out", bits=bits)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("when", ["write", "read"])
def test_a_failure_midway_leaves_nothing_or_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], when: str
):
    class Failing(DenseDelta):
        def read(self, start: int, stop: int) -> tuple[None, torch.Tensor]:
            raise error("stop")

    good = {f"layers.{number}.weight": DenseDelta(torch.ones(3, 4)) for number in range(6)}
    before = save_source(MemorySource(good), tmp_path / "old", bits=8).config.sha256
    bad: DeltaSource = MemorySource(good)
    if when == "read":
        bad = MemorySource({**good, "layers.3.weight": Failing(torch.ones(3, 4))})
    else:
        real, calls = AdapterWriter.add, []

        def add(self: AdapterWriter, *args: object) -> None:
            calls.append(args)
            if len(calls) == 4:
                raise error("stop")
            real(self, *args)

        monkeypatch.setattr(AdapterWriter, "add", add)
    with pytest.raises(error, match="stop"):
        save_source(bad, tmp_path / "out", bits=8)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["old"]
    if when == "read":
        with pytest.raises(error, match="stop"):
            save_source(bad, tmp_path / "old", bits=8, overwrite=True)
    assert os.listdir(tmp_path) == ["old"]
    assert Adapter.open(tmp_path / "old").config.sha256 == before


def test_what_exists_is_refused_before_anything_is_read(tmp_path: Path):
    class Unreadable(MemorySource):
        def __getitem__(self, name: str) -> Delta:
            raise AssertionError(f"{name} was read")

        def is_new(self, name: str) -> bool:
            return False

    (tmp_path / "out").mkdir()
    with pytest.raises(AdapterExistsError):
        save_source(Unreadable({"w": DenseDelta(torch.ones(2, 2))}), tmp_path / "out")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_killed_combination_leaves_nothing_that_loads(make_pack: PackMaker, tmp_path: Path):
    pack: Pack = make_pack("plain")
    out, paths = tmp_path / "out", [pack.adapters[name] for name in "ab"]
    left = kill_while_writing(lambda: dare_adapters.combine(paths, out, progress=False), out)
    for place in (out, left):
        with pytest.raises(AdapterNotFoundError):
            Adapter.open(place)
        with pytest.raises(AdapterNotFoundError):
            open_source(place)
    save_source(Combination([Adapter.open(path) for path in paths], [1, 1]), out)
    Adapter.open(out)
    assert os.listdir(tmp_path) == ["out"]
