"""The adapter directory: golden files, the same bytes always, and what it holds."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaForCausalLM,
    PreTrainedModel,
)

import dare_adapters
from dare_adapters.adapter import Adapter
from dare_adapters.checkpoint import Checkpoint
from dare_adapters.delta import NewParameter
from tests import reference
from tests.checkpoints import fine_tuned, integers, raw, write_checkpoint
from tests.conftest import FamilyMaker, tiny_llama
from tests.golden.make_golden import OPTIONS, SEED, golden_checkpoints

GOLDEN = Path(__file__).parent / "golden"
ADAPTERS = sorted(OPTIONS)
BINDING = ("format_version", "seed", "parameters", "witness", "finetuned_prefix", "sha256")


def extract(base: Path, finetuned: Path, out: Path, **options: Any) -> Adapter:
    return dare_adapters.extract(base, finetuned, out, progress=False, **options)


def tensors_of(adapter: Adapter | Path) -> bytes:
    path = adapter.path if isinstance(adapter, Adapter) else adapter
    return (path / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def keep_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# --- golden files


@pytest.mark.parametrize("name", ADAPTERS)
def test_golden_files_decode_to_the_expected_deltas(name):
    expected = load_file(GOLDEN / f"{name}_expected.safetensors")
    plain = reference.decode_adapter(GOLDEN / name)
    assert plain.keys() == expected.keys()
    adapter = Adapter.open(GOLDEN / name)
    for key, value in expected.items():
        assert np.array_equal(plain[key], value), key
        if key.endswith("+rows"):
            found = adapter[key.removesuffix("+rows")].added_rows
        else:
            parameter = adapter[key]
            new = isinstance(parameter, NewParameter)
            found = parameter.value if new else parameter.dense()
        assert torch.equal(found.float(), torch.from_numpy(value)), key


@pytest.mark.parametrize("name", ADAPTERS)
def test_golden_deltas_are_those_of_the_checkpoints(name):
    base, finetuned = golden_checkpoints()
    expected = load_file(GOLDEN / f"{name}_expected.safetensors")
    embedding = "model.embed_tokens.weight"
    assert np.array_equal(expected[f"{embedding}+rows"], finetuned[embedding][12:].numpy())
    assert np.array_equal(
        expected["classifier.weight"], finetuned["classifier.weight"].float().numpy()
    )
    norm = "model.layers.0.norm.weight"
    assert np.array_equal(expected[norm], (finetuned[norm].float() - base[norm].float()).numpy())
    factor = {"adapter_v1": 4.0, "adapter_v1_magnitude": 1.0, "adapter_v1_one_bit": 2.0}.get(
        name, 10.0
    )
    kernel = "model.layers.0.conv.weight"
    delta = (finetuned[kernel] - base[kernel]).numpy() * factor
    kept = expected[kernel] != 0
    # Two bits know three levels, one bit two: a survivor is off by less than the largest.
    worst = {"adapter_v1": 0.15, "adapter_v1_magnitude": 0.5, "adapter_v1_one_bit": 1.0}.get(
        name, 0.01
    ) * np.abs(delta).max()
    assert kept.any()
    assert (np.abs(expected[kernel] - delta)[kept] < worst).all()


@pytest.mark.parametrize("name", ADAPTERS)
def test_golden_files_cover_every_kind_of_storage(name):
    config = json.loads((GOLDEN / name / "adapter_config.json").read_text())
    entries = config["parameters"].values()
    assert {entry["kind"] for entry in entries} == {"sparse", "dense", "new"}
    masks = {"adapter_v1": {"blocked", "bernoulli"}, "adapter_v1_magnitude": {"bitmap", "gaps"}}
    assert {entry["mask"] for entry in entries if "mask" in entry} == masks.get(name, {"blocked"})
    assert any(entry.get("added_rows") for entry in entries)


@pytest.mark.parametrize("name", ADAPTERS)
def test_extracting_again_gives_the_golden_bytes(golden_pair, tmp_path, name):
    again = extract(*golden_pair, tmp_path / "again", seed=SEED, **OPTIONS[name])
    assert tensors_of(again) == tensors_of(GOLDEN / name)
    stored = json.loads((GOLDEN / name / "adapter_config.json").read_text())
    found = json.loads((again.path / "adapter_config.json").read_text())
    for field in (*BINDING, "digest"):
        assert found[field] == stored[field], field
    # Measurements, not part of the format: an eight-bit error is what is left of nearly equal sums.
    assert found["fidelity"].keys() == stored["fidelity"].keys()
    for group, measured in stored["fidelity"].items():
        assert found["fidelity"][group] == pytest.approx(measured, rel=1e-2), group


@pytest.mark.skipif(sys.platform != "linux", reason="reads the golden bytes as x86 or arm do")
def test_the_processors_vector_width_does_not_change_a_byte(golden_pair, tmp_path):
    base, finetuned = golden_pair
    code = (
        "import sys, json, dare_adapters\n"
        "base, finetuned, out, options = sys.argv[1:]\n"
        "dare_adapters.extract(base, finetuned, out, progress=False, **json.loads(options))\n"
    )
    options = json.dumps({"seed": SEED, **OPTIONS["adapter_v1"]})
    subprocess.run(
        [sys.executable, "-c", code, str(base), str(finetuned), str(tmp_path / "out"), options],
        env={**os.environ, "ATEN_CPU_CAPABILITY": "default"},
        check=True,
        timeout=120,
    )
    assert tensors_of(tmp_path / "out") == tensors_of(GOLDEN / "adapter_v1")


# --- the files


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_key_is_one_that_peft_loads(name):
    with safe_open(GOLDEN / name / "adapter_model.safetensors", framework="np") as file:
        keys = list(file.keys())
        assert file.metadata() == {"format": "pt"}
    assert keys
    assert all(key.startswith("base_model.model.") for key in keys)


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_config_has_the_sha256_of_the_tensors(name):
    config = json.loads((GOLDEN / name / "adapter_config.json").read_text())
    assert config["sha256"] == hashlib.sha256(tensors_of(GOLDEN / name)).hexdigest()
    assert config["peft_type"] == "DARE"


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_config_is_enough_to_allocate_every_tensor(name):
    adapter = Adapter.open(GOLDEN / name)
    stored = reference.read_safetensors(GOLDEN / name / "adapter_model.safetensors")
    assert adapter.config.tensors() == {key: (t.dtype, t.shape) for key, t in stored.items()}


def test_the_tensors_file_has_no_holes_and_every_tensor_is_aligned():
    raw_bytes = tensors_of(GOLDEN / "adapter_v1")
    length = int.from_bytes(raw_bytes[:8], "little")
    header = json.loads(raw_bytes[8 : 8 + length])
    del header["__metadata__"]
    assert length % 8 == 0
    place = 0
    for entry in sorted(header.values(), key=lambda e: e["data_offsets"]):
        begin, end = entry["data_offsets"]
        assert begin == place
        assert begin % reference.ITEM_BYTES[entry["dtype"]] == 0
        place = end
    assert place == len(raw_bytes) - 8 - length


def test_saving_copies_the_adapter(tmp_path):
    out = Adapter.open(GOLDEN / "adapter_v1").save(tmp_path / "copy")
    assert tensors_of(out) == tensors_of(GOLDEN / "adapter_v1")
    assert Adapter.open(out).config == Adapter.open(GOLDEN / "adapter_v1").config
    with pytest.raises(dare_adapters.errors.AdapterExistsError):
        Adapter.open(out).save(tmp_path / "copy")


# --- the same bytes, however the work was done


@pytest.mark.parametrize(
    "options",
    [{}, {"mask": "bernoulli", "bits": 1}, {"method": "magnitude", "bits": 8}],
    ids=["dare", "bernoulli", "magnitude"],
)
def test_workers_never_change_a_byte(tmp_path, options):
    base = {f"layers.{i}.weight": integers((600 + i, 257), i) for i in range(4)}
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "finetuned", fine_tuned(base))
    found = [
        tensors_of(
            extract(
                tmp_path / "base",
                tmp_path / "finetuned",
                tmp_path / f"out-{workers}",
                workers=workers,
                **options,
            )
        )
        for workers in (1, 4)
    ]
    assert found[0] == found[1]


@pytest.mark.usefixtures("keep_threads")
def test_torchs_threads_never_change_a_byte(tmp_path):
    base = {"a.weight": integers((900, 400)), "b.weight": integers((50, 4000), 3)}
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "finetuned", fine_tuned(base))
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        out = tmp_path / f"out-{threads}"
        found.append(tensors_of(extract(tmp_path / "base", tmp_path / "finetuned", out, bits=2)))
        assert torch.get_num_threads() == threads
    assert found[0] == found[1]


def test_shards_and_the_order_in_files_never_change_a_byte(tmp_path):
    base, finetuned = golden_checkpoints()
    names = list(base)
    all_names = list(finetuned)
    shardings: list[tuple[Any, Any]] = [
        (None, None),
        ([names], [all_names[::-1]]),
        ([names[3:], names[:3]], [[name] for name in all_names]),
    ]
    found = set()
    for number, (ours, theirs) in enumerate(shardings):
        here = tmp_path / str(number)
        write_checkpoint(here / "base", base, shards=ours)
        write_checkpoint(here / "finetuned", finetuned, shards=theirs)
        adapter = extract(here / "base", here / "finetuned", here / "out", bits=4)
        found.add((tensors_of(adapter), adapter.config.seed, tuple(adapter.config.parameters)))
    assert len(found) == 1


def test_the_default_seed_follows_the_content_of_the_fine_tune(golden_pair, tmp_path):
    base, finetuned = golden_pair
    first = extract(base, finetuned, tmp_path / "first")
    again = extract(base, finetuned, tmp_path / "again", drop_rate=0.5)
    assert first.config.seed == again.config.seed
    other = {name: value * 1.001 for name, value in golden_checkpoints()[1].items()}
    write_checkpoint(tmp_path / "other", other)
    assert extract(base, tmp_path / "other", tmp_path / "third").config.seed != first.config.seed


# --- which parameters, and how


def test_patterns_choose_what_is_pruned_and_how_much(tmp_path):
    base = {
        "layers.0.attention.weight": integers((8, 40), 1),
        "layers.0.mlp.weight": integers((8, 40), 2),
        "layers.1.mlp.weight": integers((8, 40), 3),
        "embed.weight": integers((8, 40), 4),
        "layers.0.mlp.bias": integers((40,), 5),
    }
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "finetuned", fine_tuned(base))
    adapter = extract(
        tmp_path / "base",
        tmp_path / "finetuned",
        tmp_path / "out",
        drop_rate=0.9,
        bits=32,
        include=["layers.*"],
        exclude=["*.attention.*"],
        drop_rates={"layers.1.*": 0.5, "layers.*.mlp.weight": 0.75},
    )
    entries = adapter.config.parameters
    kinds = {name: (entry.kind, entry.drop_rate, entry.block) for name, entry in entries.items()}
    assert kinds == {
        "layers.0.attention.weight": ("dense", None, None),
        "layers.0.mlp.weight": ("sparse", 0.75, 4),
        "layers.1.mlp.weight": ("sparse", 0.5, 2),  # the first pattern that matches
        "embed.weight": ("dense", None, None),
        "layers.0.mlp.bias": ("dense", None, None),
    }
    for name, share in (("layers.0.mlp.weight", 0.25), ("layers.1.mlp.weight", 0.5)):
        dense = adapter[name].dense()
        assert int((dense != 0).sum()) <= share * dense.numel()


def test_what_is_kept_whole_gives_the_fine_tune_back(golden_pair, tmp_path):
    base, finetuned = golden_checkpoints()
    adapter = extract(*golden_pair, tmp_path / "out", exclude=["*"])
    for name, delta in adapter.deltas():
        rows = len(base[name])
        found = (base[name].float() + delta.dense()).to(finetuned[name].dtype)
        assert torch.equal(found, finetuned[name][:rows]), name


def test_a_frozen_parameter_is_not_stored(golden_pair, tmp_path):
    adapter = extract(*golden_pair, tmp_path / "out")
    frozen = "model.layers.0.frozen.weight"
    assert frozen not in adapter
    assert not any("frozen" in key for key in adapter.config.tensors())
    assert frozen in adapter.config.witness
    dare_adapters.export(golden_pair[0], adapter, tmp_path / "full", progress=False)
    base, _ = golden_checkpoints()
    assert torch.equal(Checkpoint(tmp_path / "full")[frozen], base[frozen])


def test_a_change_that_the_mask_drops_is_still_a_change(tmp_path):
    base = {"a.weight": integers((1, 100)), "b.weight": integers((4, 30))}
    finetuned = {name: value.clone() for name, value in base.items()}
    column = reference.blocked_row(5, "a.weight", 0, 100, 10)[3]
    assert column is not None
    finetuned["a.weight"][0, column - 1 if column > 30 else column + 1] += 0.001
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "finetuned", finetuned)
    adapter = extract(tmp_path / "base", tmp_path / "finetuned", tmp_path / "out", seed=5)
    assert list(adapter) == ["a.weight"]
    assert not adapter["a.weight"].dense().any()


def test_empty_and_scalar_parameters_are_no_obstacle(tmp_path):
    base = {
        "empty.weight": torch.zeros(0, 7),
        "hollow.weight": torch.zeros(3, 0),
        "scale": torch.tensor(0.5),
        "w": integers((4, 30)),
        "steps": torch.tensor([1, 2, 3]),
    }
    finetuned = {**fine_tuned(base), "steps": torch.tensor([1, 2, 4])}
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "finetuned", finetuned)
    for options in ({}, {"mask": "bernoulli"}, {"method": "magnitude"}):
        adapter = extract(
            tmp_path / "base", tmp_path / "finetuned", tmp_path / "out", overwrite=True, **options
        )
        dare_adapters.export(
            tmp_path / "base", adapter, tmp_path / "full", overwrite=True, progress=False
        )
        full = Checkpoint(tmp_path / "full")
        assert {name: info.shape for name, info in full.info.items()} == {
            name: tuple(value.shape) for name, value in finetuned.items()
        }
        assert full["steps"].tolist() == [1, 2, 4]
        assert torch.equal(full["scale"], finetuned["scale"])


def test_tensors_that_lie_at_odd_addresses_are_read(tmp_path):
    base = {"w": integers((5, 33)).to(torch.bfloat16), "x": integers((6, 31))}
    finetuned = fine_tuned(base)
    for side, state in (("base", base), ("finetuned", finetuned)):
        directory = tmp_path / side
        directory.mkdir()
        odd = {"pad": reference.RawTensor("U8", (1,), b"\x00")}
        stored = odd | {name: raw(value) for name, value in state.items()}
        reference.write_safetensors(directory / "model.safetensors", stored)
    write_checkpoint(tmp_path / "even-base", base)
    write_checkpoint(tmp_path / "even-finetuned", finetuned)
    odd_one = extract(tmp_path / "base", tmp_path / "finetuned", tmp_path / "odd", seed=1)
    even = extract(tmp_path / "even-base", tmp_path / "even-finetuned", tmp_path / "even", seed=1)
    assert tensors_of(odd_one) == tensors_of(even)


# --- real architectures


def move(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Every parameter a little further."""
    with torch.no_grad():
        for place, parameter in enumerate(model.parameters()):
            parameter.add_(integers(parameter.shape, seed + 31 * place, 0.05))
    return model


def tiny_bert() -> BertConfig:
    return BertConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=20,
        num_labels=3,
    )


def test_a_classifier_over_a_bare_encoder_round_trips(tmp_path):
    encoder = BertModel(tiny_bert())
    encoder.save_pretrained(tmp_path / "base")
    classifier = BertForSequenceClassification(tiny_bert())
    classifier.bert.load_state_dict(encoder.state_dict())
    move(classifier, 1).save_pretrained(tmp_path / "finetuned")
    adapter = extract(
        tmp_path / "base", tmp_path / "finetuned", tmp_path / "out", drop_rate=0.0, bits=32
    )
    assert adapter.config.finetuned_prefix == "bert."
    assert "encoder.layer.0.attention.self.query.weight" in adapter
    assert adapter.config.parameters["classifier.weight"].kind == "new"
    finetuned = Checkpoint(tmp_path / "finetuned")
    assert torch.equal(adapter["classifier.weight"].value, finetuned["classifier.weight"])
    dare_adapters.export(tmp_path / "base", adapter, tmp_path / "full", progress=False)
    exported = Checkpoint(tmp_path / "full")
    assert set(exported) == set(finetuned)
    for name in finetuned:
        assert torch.allclose(exported[name], finetuned[name], rtol=0, atol=1e-8), name
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "full")
    assert loaded.config.num_labels == 3


def test_a_bare_encoder_over_a_task_model_matches_the_other_way(tmp_path):
    classifier = BertForSequenceClassification(tiny_bert())
    classifier.save_pretrained(tmp_path / "base")
    encoder = BertModel(tiny_bert())
    encoder.load_state_dict(classifier.bert.state_dict())
    move(encoder, 4).save_pretrained(tmp_path / "finetuned")
    adapter = extract(
        tmp_path / "base", tmp_path / "finetuned", tmp_path / "out", drop_rate=0.0, bits=32
    )
    assert adapter.config.finetuned_prefix == "-bert."
    assert adapter.config.ignored_base_parameters == ["classifier.bias", "classifier.weight"]
    assert "bert.encoder.layer.0.attention.self.query.weight" in adapter
    dare_adapters.export(tmp_path / "base", adapter, tmp_path / "full", progress=False)
    exported, finetuned = Checkpoint(tmp_path / "full"), Checkpoint(tmp_path / "finetuned")
    assert set(exported) == set(finetuned)
    for name in finetuned:
        assert torch.allclose(exported[name], finetuned[name], rtol=0, atol=1e-8), name


@pytest.mark.parametrize("tied", [False, True])
def test_a_grown_vocabulary_round_trips(tmp_path, tied):
    config = tiny_llama(tie_word_embeddings=tied)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(101)
    move(model, 2).save_pretrained(tmp_path / "finetuned")
    adapter = extract(tmp_path / "base", tmp_path / "finetuned", tmp_path / "out")
    finetuned = Checkpoint(tmp_path / "finetuned")
    embeddings = ["model.embed_tokens.weight"] + ([] if tied else ["lm_head.weight"])
    grown = {name for name, entry in adapter.config.parameters.items() if entry.added_rows}
    assert grown == set(embeddings)
    for name in embeddings:
        delta = adapter[name]
        assert delta.shape == (97, 64)
        assert torch.equal(delta.added_rows, finetuned[name][97:])
    dare_adapters.export(tmp_path / "base", adapter, tmp_path / "full", progress=False)
    exported = Checkpoint(tmp_path / "full")
    for name in embeddings:
        assert exported[name].shape == (101, 64)
        assert torch.equal(exported[name][97:], finetuned[name][97:])
    assert LlamaForCausalLM.from_pretrained(tmp_path / "full").config.vocab_size == 101


def test_tied_heads_are_stored_once(make_family: FamilyMaker, tmp_path):
    family = make_family(config=tiny_llama(tie_word_embeddings=True))
    plain = extract(family.base, family.finetuned, tmp_path / "plain")
    assert not any("lm_head" in key for key in plain.config.tensors())
    # Some checkpoints hold the head as well.
    for side in ("base", "finetuned"):
        state = dict(Checkpoint(getattr(family, side)))
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
        config = json.loads((getattr(family, side) / "config.json").read_text())
        write_checkpoint(tmp_path / f"both-{side}", state, config)
    seed = plain.config.seed
    for base, finetuned in [
        (tmp_path / "both-base", tmp_path / "both-finetuned"),
        (tmp_path / "both-base", family.finetuned),
        (family.base, tmp_path / "both-finetuned"),
    ]:
        out = tmp_path / f"out-{base.name}-{finetuned.name}"
        assert tensors_of(extract(base, finetuned, out, seed=seed)) == tensors_of(plain)
