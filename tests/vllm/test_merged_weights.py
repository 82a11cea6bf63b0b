"""Base plus mixture as a stream of checkpoint tensors: the tensors that export writes. No vLLM."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertForSequenceClassification,
    LlamaForCausalLM,
    MixtralForCausalLM,
    PreTrainedModel,
)

import dare_adapters
from dare_adapters.checkpoint import Checkpoint
from dare_adapters.errors import (
    ArchitectureMismatchError,
    BaseMismatchError,
    CheckpointMismatchError,
    CombinationError,
    UnsupportedParameterError,
)
from dare_vllm.merged_weights import MergedWeights
from dare_vllm.mixture import Mixture
from tests.conftest import Pack, PackMaker, raw_bytes, read_checkpoint, tiny_llama
from tests.hf.packs import task_pack
from tests.test_live import mixtral_config
from tests.test_patch import EXACT, grown_pack

ROUGH = {"drop_rate": 0.9, "bits": 4}


def over(base: Path, *adapters: object, untied: bool = False, **how: object) -> MergedWeights:
    """A mixture over a base."""
    mixture = Mixture.from_config({"adapters": list(adapters), **how})
    return MergedWeights(
        Checkpoint(base), mixture.open(), check_base=mixture.check_base, untied=untied
    )


def streamed(merged: MergedWeights) -> dict[str, torch.Tensor]:
    """All tensors, from the base's own reader."""
    return dict(merged.stream(iter(merged.base.items())))


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same names, dtypes and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert raw_bytes(found[name]) == raw_bytes(tensor), name


def expect_exported(pack: Pack, name: str, out: Path) -> None:
    """What streams out is what export writes, and its shapes were known before."""
    dare_adapters.export(pack.base, pack.adapters[name], out, progress=False)
    merged = over(pack.base, str(pack.adapters[name]))
    found = streamed(merged)
    assert_same_tensors(found, read_checkpoint(out))
    assert merged.shapes == {own: tuple(tensor.shape) for own, tensor in found.items()}


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_every_kind_of_adapter_makes_the_exported_tensors(
    make_pack: PackMaker, tmp_path: Path, name: str
):
    expect_exported(make_pack("plain"), name, tmp_path / "full")


@pytest.mark.parametrize("tied", [True, False])
def test_added_rows_make_the_exported_tensors(make_pack: PackMaker, tmp_path: Path, tied: bool):
    pack = grown_pack(make_pack, tied)
    expect_exported(pack, "a", tmp_path / "full")
    added = over(pack.base, str(pack.adapters["a"])).added_rows()
    embeddings = {"model.embed_tokens.weight": 5}
    assert added == (embeddings if tied else {**embeddings, "lm_head.weight": 5})


def test_experts_make_the_exported_tensors(make_pack: PackMaker, tmp_path: Path):
    pack = make_pack(
        "mixtral exported", MixtralForCausalLM, mixtral_config(), kinds={"a": EXACT, "b": ROUGH}
    )
    expect_exported(pack, "b", tmp_path / "full")


def test_a_new_head_and_other_names_make_the_exported_tensors(make_pack: PackMaker, tmp_path: Path):
    pack = task_pack(make_pack)
    assert pack.model_class is BertForSequenceClassification
    expect_exported(pack, "a", tmp_path / "full")
    merged = over(pack.base, str(pack.adapters["a"]))
    assert "classifier.weight" in merged.new.values()
    assert "bert.embeddings.word_embeddings.weight" in merged.shapes


def test_shards_make_the_exported_tensors(make_pack: PackMaker, tmp_path: Path):
    pack = make_pack("sharded", kinds={"a": EXACT, "b": ROUGH}, max_shard_size="40KB")
    expect_exported(pack, "b", tmp_path / "full")


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"combination_type": "ties", "density": 0.3, "majority_sign_method": "frequency"},
        {"combination_type": "dare_linear", "density": 0.5, "seed": 7},
        {"combination_type": "linear", "prune": "magnitude", "drop_rate": 0.75},
        {"combination_type": "karcher"},  # works on whole parameters of the base
    ],
    ids=lambda how: how.get("combination_type", "default"),
)
def test_a_mixture_makes_the_tensors_of_a_live_model_with_it(
    make_pack: PackMaker, how: dict[str, object]
):
    pack = make_pack("plain")
    live = pack.live()
    for name in ("a", "b"):
        live.load_dare_adapter(pack.adapters[name], adapter_name=name, activate=False)
    live.add_weighted_adapter(["a", "b"], [0.75, 0.5], "both", **how)
    live.set_dare_adapter("both")
    live.merge_dare_adapters()
    parts = [
        {"path": str(pack.adapters["a"]), "weight": 0.75},
        {"path": str(pack.adapters["b"]), "weight": 0.5},
    ]
    assert_same_tensors(streamed(over(pack.base, *parts, **how)), dict(live.state_dict()))


def test_a_mix_directory_is_one_of_the_adapters(make_pack: PackMaker, tmp_path: Path):
    pack = make_pack("plain")
    for name in ("a", "b"):
        shutil.copytree(pack.adapters[name], tmp_path / name)
    dare_adapters.combine(
        [tmp_path / "a", tmp_path / "b"], tmp_path / "mix", [1.0, 0.5], as_mix=True, progress=False
    )
    parts = [str(tmp_path / "a"), {"path": str(tmp_path / "b"), "weight": 0.5}]
    assert_same_tensors(
        streamed(over(pack.base, str(tmp_path / "mix"))), streamed(over(pack.base, *parts))
    )


def lora_of(pack: Pack, out: Path) -> PreTrainedModel:
    """A LoRA of the pack's base, saved by PEFT; the model that PEFT merges of it."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"]
    )
    torch.manual_seed(3)
    model = peft.get_peft_model(pack.live(torch.float32), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(out)
    return model.merge_and_unload()


def test_a_lora_takes_part_as_peft_merges_it(make_pack: PackMaker, tmp_path: Path):
    pack = make_pack("plain float", dtype=torch.float32)
    expected = lora_of(pack, tmp_path / "lora").state_dict()
    found = streamed(over(pack.base, str(tmp_path / "lora")))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
    assert not torch.equal(found["lm_head.weight"], read_checkpoint(pack.base)["lm_head.weight"])


def test_the_base_alone_streams_unchanged(make_pack: PackMaker):
    pack = make_pack("plain")
    merged = over(pack.base)
    assert merged.changed == []
    assert_same_tensors(streamed(merged), read_checkpoint(pack.base))


def test_what_the_engine_sets_as_defaults_of_pytorch_does_not_matter(make_pack: PackMaker):
    pack = make_pack("plain")
    parts = [str(pack.adapters["b"]), str(pack.adapters["c"])]
    expected = streamed(over(pack.base, *parts))
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = streamed(over(pack.base, *parts))
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_tensors(found, expected)


def test_a_base_that_was_cast_is_accepted_and_a_wrong_one_refused(
    make_pack: PackMaker, tmp_path: Path
):
    pack = make_pack("plain float", dtype=torch.float32)
    pack.live(torch.bfloat16).save_pretrained(tmp_path / "cast")
    found = streamed(over(tmp_path / "cast", str(pack.adapters["a"])))
    assert found["model.norm.weight"].dtype == torch.bfloat16
    wrong = pack.live()
    with torch.no_grad():
        wrong.model.norm.weight.add_(0.5)
    wrong.save_pretrained(tmp_path / "wrong")
    with pytest.raises(BaseMismatchError, match=r"model\.norm\.weight \(off by 0\.5\)"):
        over(tmp_path / "wrong", str(pack.adapters["a"]))
    over(tmp_path / "wrong", str(pack.adapters["a"]), check_base=False)


def test_parameters_that_the_base_lacks_are_named(make_pack: PackMaker, tmp_path: Path):
    pack = make_pack("plain")
    small = LlamaForCausalLM(tiny_llama(num_hidden_layers=1))
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(CheckpointMismatchError, match=r"9 parameters .* model\.layers\.1\."):
        over(tmp_path / "small", str(pack.adapters["a"]))


def test_parameters_that_never_come_are_named(make_pack: PackMaker):
    pack = make_pack("plain")
    merged = over(pack.base, str(pack.adapters["a"]))
    late = "model.layers.1.mlp.up_proj.weight"
    rest = [(name, tensor) for name, tensor in merged.base.items() if name != late]
    with pytest.raises(CheckpointMismatchError, match=f"1 parameters .*never read.*{late}"):
        list(merged.stream(iter(rest)))
    list(merged.stream(iter(rest), may_lack=lambda name: name == late))


def test_quantised_tensors_are_refused_by_name(make_pack: PackMaker, tmp_path: Path):
    pack = make_pack("plain")
    shutil.copytree(pack.base, tmp_path / "int8")
    file = tmp_path / "int8" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, file)
    with pytest.raises(UnsupportedParameterError, match=r"up_proj\.weight as torch\.int8"):
        over(tmp_path / "int8", str(pack.adapters["a"]), check_base=False)


def test_other_shapes_are_refused_by_name(make_pack: PackMaker, tmp_path: Path):
    pack = make_pack("plain")
    LlamaForCausalLM(tiny_llama(intermediate_size=144)).save_pretrained(tmp_path / "wide")
    with pytest.raises(ArchitectureMismatchError, match=r"6 parameters in other shapes"):
        over(tmp_path / "wide", str(pack.adapters["a"]), check_base=False)


def test_a_head_of_its_own_repeats_the_embedding_that_the_base_ties(
    make_pack: PackMaker, tmp_path: Path
):
    # vLLM gives a model a head of its own where the base stores one beside a tied embedding.
    pack = make_pack("tied twice", config=tiny_llama(tie_word_embeddings=True), kinds={"a": ROUGH})
    stored = {}
    for kind, directory in (("base", pack.base), ("finetuned", pack.finetuned["a"])):
        shutil.copytree(directory, tmp_path / kind)
        file = tmp_path / kind / "model.safetensors"
        tensors = load_file(file)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, file, {"format": "pt"})
        stored[kind] = tmp_path / kind
    adapter = tmp_path / "adapter"
    dare_adapters.extract(
        stored["base"], stored["finetuned"], adapter, on_large_delta="ignore", progress=False
    )
    apart = streamed(over(stored["base"], str(adapter), untied=True))
    assert torch.equal(apart["lm_head.weight"], apart["model.embed_tokens.weight"])
    base = read_checkpoint(stored["base"])
    assert not torch.equal(apart["lm_head.weight"], base["lm_head.weight"])
    assert "lm_head.weight" not in streamed(over(stored["base"], str(adapter)))


def test_a_fine_tune_of_another_config_is_told_of(
    make_pack: PackMaker, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    pack = make_pack("plain")
    shutil.copytree(pack.adapters["a"], tmp_path / "a")
    file = tmp_path / "a" / "finetuned_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    with caplog.at_level(logging.WARNING, logger="vllm.dare"):
        over(pack.base, str(pack.adapters["a"]))
        assert not caplog.records
        over(pack.base, str(tmp_path / "a"))
    assert '--hf-overrides {"rms_norm_eps": 0.5}' in caplog.text


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"adapters": "math"}, r"adapters is 'math'; it must be a list"),
        ({"adapters": [{"path": "x", "wait": 1}]}, r"adapters\[0\] is .*path, weight, revision"),
        ({"adapters": [{"weight": 1}]}, r"adapters\[0\] has no path"),
        ({"adapters": [{"path": "x", "weight": "2"}]}, r"adapters\[0\]\.weight is '2'"),
        ({"adapters": ["x"], "combination_type": "tie"}, r"tie"),
        ({"adapters": ["x"], "densty": 1}, r"no field 'densty'"),
        ({"adapters": ["x"], "combination_type": "ties", "denstiy": 1}, r"no field 'denstiy'"),
        ({"adapters": ["x"], "seed": "1"}, r"seed is '1'; it must be a int"),
        ({"adapters": ["x"], "combination_type": "slerp", "t": 0.5}, r"slerp combines"),
        ({"adapters": ["x"], "check_base": "no"}, r"check_base is 'no'"),
    ],
)
def test_a_field_out_of_range_is_refused_by_name(config: dict[str, object], message: str):
    with pytest.raises(CombinationError, match=message):
        Mixture.from_config(config)


def test_a_mixture_survives_json(make_pack: PackMaker):
    config = {
        "adapters": ["x", {"path": "y", "weight": 0.25, "revision": "v2"}],
        "combination_type": "ties",
        "density": [0.5, 0.25],
        "seed": 3,
        "check_base": False,
    }
    mixture = Mixture.from_config(config)
    assert Mixture.from_config(json.loads(json.dumps(mixture.to_config()))) == mixture
