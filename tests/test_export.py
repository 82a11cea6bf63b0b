"""An exported checkpoint is an ordinary one of the fine-tune's class, equal to the live model."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    BertForSequenceClassification,
    BertModel,
    GenerationConfig,
    LlamaForCausalLM,
    MixtralForCausalLM,
    PreTrainedModel,
)

import dare_adapters
from dare_adapters.errors import (
    AdapterExistsError,
    AdapterNotFoundError,
    BaseMismatchError,
    CheckpointError,
    CheckpointMismatchError,
)
from tests.conftest import Pack, PackMaker, all_bytes, read_checkpoint, tiny_llama
from tests.hf.packs import task_pack
from tests.test_live import mixtral_config
from tests.test_patch import EXACT, grown_pack

ROUGH = {"drop_rate": 0.9, "bits": 4}


def exported(pack: Pack, name: str, out: Path, **options: object) -> Path:
    found = dare_adapters.export(pack.base, pack.adapters[name], out, progress=False, **options)
    assert found == out
    return out


def assert_equals_live(pack: Pack, directory: Path, live: PreTrainedModel) -> None:
    """The exported model, read by transformers, has every bit of the live one."""
    again, report = pack.model_class.from_pretrained(
        directory, dtype="auto", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.dtype == live.dtype
    assert all_bytes(again) == all_bytes(live)


@pytest.mark.parametrize("weight", [1.0, 0.5, -1.0, 0.0])
@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_an_export_equals_the_live_model_at_any_weight(
    make_pack: PackMaker, tmp_path: Path, name: str, weight: float
):
    pack = make_pack("plain")
    live = pack.live()
    live.load_dare_adapter(pack.adapters[name], weight=weight)
    assert_equals_live(pack, exported(pack, name, tmp_path / "full", weight=weight), live)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("weight", [1.0, 0.5])
@pytest.mark.parametrize("name", ["a", "b"])
def test_a_grown_vocabulary_is_exported_as_it_is_live(
    make_pack: PackMaker, tmp_path: Path, tied: bool, weight: float, name: str
):
    pack = grown_pack(make_pack, tied)
    live = pack.live()
    live.load_dare_adapter(pack.adapters[name], weight=weight)
    directory = exported(pack, name, tmp_path / "full", weight=weight)
    assert_equals_live(pack, directory, live)
    assert json.loads((directory / "config.json").read_text())["vocab_size"] == 102
    if name == "a" and weight == 1.0:
        finetuned = read_checkpoint(pack.finetuned["a"])
        full = read_checkpoint(directory)
        assert full.keys() == finetuned.keys()
        assert all(torch.equal(full[key], value) for key, value in finetuned.items())


@pytest.mark.parametrize("name", ["a", "b"])
def test_experts_are_exported_one_by_one_and_equal_the_live_model(
    make_pack: PackMaker, tmp_path: Path, name: str
):
    pack = make_pack(
        "mixtral exported", MixtralForCausalLM, mixtral_config(), kinds={"a": EXACT, "b": ROUGH}
    )
    live = pack.live()
    live.load_dare_adapter(pack.adapters[name])
    directory = exported(pack, name, tmp_path / "full")
    assert_equals_live(pack, directory, live)
    assert read_checkpoint(directory).keys() == read_checkpoint(pack.base).keys()


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_a_bare_base_is_exported_under_the_names_of_the_task_model(
    make_pack: PackMaker, tmp_path: Path, name: str, weight: float
):
    pack = task_pack(make_pack)
    assert "embeddings.word_embeddings.weight" in read_checkpoint(pack.base)
    live = BertForSequenceClassification.from_pretrained(pack.base, num_labels=3, dtype="auto")
    live.load_dare_adapter(pack.adapters[name], weight=weight)
    directory = exported(pack, name, tmp_path / "full", weight=weight)
    assert_equals_live(pack, directory, live)
    full, finetuned = read_checkpoint(directory), read_checkpoint(pack.finetuned[name])
    assert full.keys() == finetuned.keys()
    assert torch.equal(full["classifier.weight"], finetuned["classifier.weight"])
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert len(config["id2label"]) == 3


def test_a_task_base_is_exported_under_the_names_of_a_bare_fine_tune(
    make_pack: PackMaker, tmp_path: Path
):
    task = task_pack(make_pack)
    base, finetuned = task.finetuned["a"], tmp_path / "bare"
    model = BertModel.from_pretrained(base, dtype="auto")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.002)
    model.save_pretrained(finetuned)
    dare_adapters.extract(base, finetuned, tmp_path / "adapter", progress=False, **EXACT)
    dare_adapters.export(base, tmp_path / "adapter", tmp_path / "full", progress=False)
    full, expected = read_checkpoint(tmp_path / "full"), read_checkpoint(finetuned)
    assert full.keys() == expected.keys()
    assert all(torch.equal(full[name], value) for name, value in expected.items())


def test_an_export_is_sharded_like_the_base(make_pack: PackMaker, tmp_path: Path):
    pack = make_pack("sharded", kinds={"a": EXACT, "b": ROUGH}, max_shard_size="40KB")
    shards = sorted(file.name for file in pack.base.glob("*.safetensors"))
    assert len(shards) > 2
    for name in ("a", "b"):
        directory = exported(pack, name, tmp_path / name)
        assert sorted(file.name for file in directory.glob("*.safetensors")) == shards
        index = json.loads((directory / "model.safetensors.index.json").read_text())
        base_index = json.loads((pack.base / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == base_index["weight_map"]
        full = read_checkpoint(directory)
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in full.values())
        for file in shards:
            held = {key for key, own in index["weight_map"].items() if own == file}
            assert load_file(directory / file).keys() == held
            with safe_open(directory / file, "pt") as reader:
                assert reader.metadata() == {"format": "pt"}
        live = pack.live()
        live.load_dare_adapter(pack.adapters[name])
        assert_equals_live(pack, directory, live)


def test_an_export_of_one_file_has_no_index(make_pack: PackMaker, tmp_path: Path):
    directory = exported(make_pack("plain"), "a", tmp_path / "full")
    assert {file.name for file in directory.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }


@pytest.mark.parametrize("stored", [torch.float32, torch.float16], ids=str)
def test_an_export_has_the_dtype_of_the_base_and_not_of_the_fine_tune(
    make_pack: PackMaker, tmp_path: Path, stored: torch.dtype
):
    pack = make_pack(f"cast-{stored}", dtype=stored)
    finetuned = LlamaForCausalLM.from_pretrained(pack.finetuned["a"], dtype=torch.bfloat16)
    finetuned.save_pretrained(tmp_path / "finetuned")
    dare_adapters.extract(
        pack.base,
        tmp_path / "finetuned",
        tmp_path / "adapter",
        on_large_delta="ignore",
        progress=False,
    )
    dare_adapters.export(pack.base, tmp_path / "adapter", tmp_path / "full", progress=False)
    assert {tensor.dtype for tensor in read_checkpoint(tmp_path / "full").values()} == {stored}
    config = json.loads((tmp_path / "full" / "config.json").read_text())
    assert config["dtype"] == str(stored).removeprefix("torch.")
    live = pack.live()
    live.load_dare_adapter(tmp_path / "adapter")
    assert_equals_live(pack, tmp_path / "full", live)


def test_an_export_has_the_companions_of_the_fine_tune(make_pack: PackMaker, tmp_path: Path):
    pack = make_pack("plain")
    base, finetuned = tmp_path / "base", tmp_path / "finetuned"
    shutil.copytree(pack.base, base)
    shutil.copytree(pack.finetuned["a"], finetuned)
    for directory, mark in ((base, "base"), (finetuned, "fine-tune")):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (directory / name).write_text(json.dumps({"made by": mark}))
    (base / "chat_template.jinja").write_text("old")
    (finetuned / "chat_template.jinja").write_text("new")
    (finetuned / "training_args.bin").write_bytes(b"not a companion")
    GenerationConfig(max_new_tokens=7, pad_token_id=0).save_pretrained(finetuned)
    config = json.loads((finetuned / "config.json").read_text())
    (finetuned / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.25}))
    dare_adapters.extract(base, finetuned, tmp_path / "adapter", progress=False)
    full = dare_adapters.export(base, tmp_path / "adapter", tmp_path / "full", progress=False)
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    ):
        assert (full / name).read_bytes() == (finetuned / name).read_bytes()
    assert not (full / "training_args.bin").exists()
    model = LlamaForCausalLM.from_pretrained(full, dtype="auto")
    assert model.config.rms_norm_eps == 0.25
    assert model.generation_config.max_new_tokens == 7


def test_companions_that_the_fine_tune_did_not_change_come_from_the_base(
    make_pack: PackMaker, tmp_path: Path
):
    pack = make_pack("plain")
    base, finetuned = tmp_path / "base", tmp_path / "finetuned"
    shutil.copytree(pack.base, base)
    shutil.copytree(pack.finetuned["a"], finetuned)
    for directory in (base, finetuned):
        (directory / "tokenizer.json").write_text("{}")
    dare_adapters.extract(base, finetuned, tmp_path / "adapter", progress=False)
    assert not (tmp_path / "adapter" / "tokenizer.json").exists()
    full = dare_adapters.export(base, tmp_path / "adapter", tmp_path / "full", progress=False)
    assert (full / "tokenizer.json").read_text() == "{}"


def test_another_base_is_refused_by_name_and_nothing_is_written(
    make_pack: PackMaker, tmp_path: Path
):
    pack = make_pack("plain")
    torch.manual_seed(1)
    LlamaForCausalLM(tiny_llama()).to(torch.bfloat16).save_pretrained(tmp_path / "other")
    with pytest.raises(BaseMismatchError, match=r"model\.layers\.\d\.\S+ \(off by") as raised:
        dare_adapters.export(
            tmp_path / "other", pack.adapters["a"], tmp_path / "full", progress=False
        )
    assert str(pack.base) in str(raised.value)
    assert {file.name for file in tmp_path.iterdir()} == {"other"}


def test_a_base_that_differs_by_one_unit_in_the_last_place_is_refused(
    make_pack: PackMaker, tmp_path: Path
):
    pack = make_pack("plain")
    shutil.copytree(pack.base, tmp_path / "base")
    state = load_file(tmp_path / "base" / "model.safetensors")
    state["model.norm.weight"].view(torch.int16).add_(1)
    save_file(state, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    options = {"progress": False}
    with pytest.raises(BaseMismatchError, match=r"1 of 21 .*model\.norm\.weight"):
        dare_adapters.export(tmp_path / "base", pack.adapters["a"], tmp_path / "full", **options)
    full = dare_adapters.export(
        tmp_path / "base", pack.adapters["a"], tmp_path / "full", check_base=False, **options
    )
    live = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype="auto")
    live.load_dare_adapter(pack.adapters["a"], check_base=False)
    assert_equals_live(pack, full, live)


@pytest.mark.parametrize(
    "changes", [{"intermediate_size": 140}, {"num_hidden_layers": 1}, {"vocab_size": 90}]
)
def test_a_base_of_another_shape_is_refused(
    make_pack: PackMaker, tmp_path: Path, changes: dict[str, int]
):
    pack = make_pack("plain")
    LlamaForCausalLM(tiny_llama(**changes)).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointMismatchError, match="does not fit"):
        dare_adapters.export(
            tmp_path / "other", pack.adapters["a"], tmp_path / "full", progress=False
        )
    assert not (tmp_path / "full").exists()


def test_an_existing_directory_is_only_replaced_when_asked(make_pack: PackMaker, tmp_path: Path):
    pack = make_pack("plain")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("keep")
    with pytest.raises(AdapterExistsError):
        exported(pack, "a", tmp_path / "full")
    assert (tmp_path / "full" / "mine").read_text() == "keep"
    exported(pack, "a", tmp_path / "full", overwrite=True)
    assert not (tmp_path / "full" / "mine").exists()


def test_what_is_not_there_is_refused(make_pack: PackMaker, tmp_path: Path):
    pack = make_pack("plain")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError):
        dare_adapters.export(tmp_path / "empty", pack.adapters["a"], tmp_path / "full")
    with pytest.raises(AdapterNotFoundError):
        dare_adapters.export(pack.base, tmp_path / "empty", tmp_path / "full")
    assert not (tmp_path / "full").exists()


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), True])
def test_a_weight_that_makes_no_sense_is_refused(
    make_pack: PackMaker, tmp_path: Path, weight: float
):
    with pytest.raises(ValueError, match="weight"):
        exported(make_pack("plain"), "a", tmp_path / "full", weight=weight)
    assert not (tmp_path / "full").exists()


def test_the_number_of_workers_changes_no_byte(make_pack: PackMaker, tmp_path: Path):
    pack = make_pack("plain")
    one = exported(pack, "b", tmp_path / "one", workers=1)
    four = exported(pack, "b", tmp_path / "four", workers=4)
    for file in one.iterdir():
        assert file.read_bytes() == (four / file.name).read_bytes()


def test_a_failure_while_writing_leaves_nothing_behind(
    make_pack: PackMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    # The function hides the module of the same name as an attribute of the package.
    monkeypatch.setattr(sys.modules["dare_adapters.checkpoint_writer"], "add_rows", fail)
    with pytest.raises(KeyboardInterrupt):
        exported(make_pack("plain"), "a", tmp_path / "full")
    assert list(tmp_path.iterdir()) == []
