"""The base that an adapter is for, and the heads that come and go with it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    BertForSequenceClassification,
    BertModel,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
)

import dare_adapters
from dare_adapters.errors import (
    ArchitectureMismatchError,
    BaseMismatchError,
    UnusedParametersWarning,
)
from tests.conftest import Pack, PackMaker, all_bytes, read_checkpoint, tiny_llama
from tests.hf.packs import expect, task_pack
from tests.test_live import bert_config
from tests.test_patch import EXACT, assert_holds, dense_deltas, expected_sum


def test_another_base_is_refused_with_its_parameters_and_the_right_base(pack: Pack):
    torch.manual_seed(1)
    other = LlamaForCausalLM(tiny_llama()).to(torch.bfloat16)
    before = all_bytes(other)
    with pytest.raises(BaseMismatchError) as raised:
        other.load_dare_adapter(pack.adapters["a"])
    assert re.search(r"model\.layers\.\d\.\S+\.weight \(off by 0\.\d+\)", str(raised.value))
    assert str(pack.base) in str(raised.value)
    assert other.dare_adapters == []
    assert all_bytes(other) == before


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.o_proj.weight", "model.norm.weight"])
def test_one_unit_in_the_last_place_of_one_parameter_is_another_base(pack: Pack, name: str):
    model = pack.live()
    model.get_parameter(name).data.view(torch.int16).add_(1)
    with pytest.raises(BaseMismatchError, match=f"1 of 21 .*{re.escape(name)}"):
        model.load_dare_adapter(pack.adapters["a"])
    model.load_dare_adapter(pack.adapters["a"], check_base=False)
    assert model.active_dare_adapters == ["a"]


@pytest.mark.parametrize(
    ("stored", "live", "through"),
    [
        (torch.float32, torch.bfloat16, None),
        (torch.float32, torch.float16, None),
        (torch.float32, torch.float32, torch.bfloat16),
        (torch.float32, torch.float32, torch.float16),
        (torch.bfloat16, torch.float32, None),
        (torch.bfloat16, torch.float16, None),
        (torch.bfloat16, torch.float32, torch.float16),
        (torch.float16, torch.float32, None),
        (torch.float16, torch.bfloat16, None),
    ],
    ids=str,
)
def test_the_base_in_another_dtype_is_the_base(
    make_pack: PackMaker, stored: torch.dtype, live: torch.dtype, through: torch.dtype | None
):
    pack = make_pack(f"cast-{stored}", dtype=stored)
    model = pack.live(through or live).to(live)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_dare_adapter(pack.adapters["a"])
    assert_holds(model, expected_sum(base, [(dense_deltas(pack, "a"), 1.0)]))


def test_another_architecture_is_refused_with_what_there_is(pack: Pack):
    other = BertModel(bert_config())
    with pytest.raises(ArchitectureMismatchError, match=r"LlamaForCausalLM.*BertModel has none"):
        other.load_dare_adapter(pack.adapters["a"])
    wide = LlamaForCausalLM(tiny_llama(intermediate_size=140))
    with pytest.raises(ArchitectureMismatchError, match=r"\[64, 140\].*\[64, 136\]"):
        wide.load_dare_adapter(pack.adapters["a"])
    shallow = LlamaForCausalLM(tiny_llama(num_hidden_layers=1))
    with pytest.raises(ArchitectureMismatchError, match=r"9 parameters.*model\.layers\.1\."):
        shallow.load_dare_adapter(pack.adapters["a"])


def test_without_strict_what_fits_is_loaded_and_the_rest_told(pack: Pack):
    model = pack.live()
    del model.model.layers[1]
    with pytest.warns(UnusedParametersWarning, match=r"9 parameters.*model\.layers\.1\."):
        model.load_dare_adapter(pack.adapters["a"], strict=False)
    expected = expect(pack, {"a": 1.0})
    assert_holds(model, {n: v for n, v in expected.items() if ".layers.1." not in n})


def test_a_head_comes_and_goes_with_the_adapter(make_pack: PackMaker):
    pack = task_pack(make_pack)
    model = BertForSequenceClassification.from_pretrained(pack.base, num_labels=3, dtype="auto")
    before = all_bytes(model)
    model.load_dare_adapter(pack.adapters["a"])
    assert_holds(model, read_checkpoint(pack.finetuned["a"]))
    model.disable_dare_adapters()
    assert all_bytes(model) == before
    model.load_dare_adapter(pack.adapters["b"], "half", weight=0.5)
    finetuned = read_checkpoint(pack.finetuned["b"])
    assert torch.equal(model.classifier.weight, finetuned["classifier.weight"])


def test_a_head_for_another_number_of_labels_is_refused_with_advice(make_pack: PackMaker):
    pack = task_pack(make_pack)
    model = BertForSequenceClassification.from_pretrained(pack.base, num_labels=2, dtype="auto")
    with pytest.raises(
        ArchitectureMismatchError, match=r"classifier\.\w+ has the shape \[2.*\[3.*num_labels"
    ):
        model.load_dare_adapter(pack.adapters["a"])


def test_a_bare_model_takes_all_but_the_head_and_tells_so(make_pack: PackMaker):
    pack = task_pack(make_pack)
    model = AutoModel.from_pretrained(pack.base, dtype="auto")
    with pytest.warns(UnusedParametersWarning, match=r"2 parameters.*classifier\.weight"):
        model.load_dare_adapter(pack.adapters["a"])
    finetuned = read_checkpoint(pack.finetuned["a"])
    bert = {n.removeprefix("bert."): v for n, v in finetuned.items() if n.startswith("bert.")}
    assert_holds(model, bert)


def test_an_adapter_of_a_head_alone_is_left_out_of_a_bare_model(
    make_pack: PackMaker, tmp_path: Path
):
    pack = task_pack(make_pack)
    probe = BertForSequenceClassification.from_pretrained(pack.base, num_labels=3, dtype="auto")
    probe.save_pretrained(tmp_path / "probe")  # the encoder is the base's own
    dare_adapters.extract(pack.base, tmp_path / "probe", tmp_path / "adapter", progress=False)
    model = AutoModel.from_pretrained(pack.base, dtype="auto")
    with pytest.warns(UnusedParametersWarning, match=r"2 parameters.*classifier\.weight"):
        model.load_dare_adapter(tmp_path / "adapter")
    assert all_bytes(model) == all_bytes(AutoModel.from_pretrained(pack.base, dtype="auto"))
    task = BertForSequenceClassification.from_pretrained(pack.base, num_labels=3, dtype="auto")
    task.load_dare_adapter(tmp_path / "adapter")
    assert_holds(task, read_checkpoint(tmp_path / "probe"))


def test_a_bare_decoder_takes_an_adapter_of_the_model_with_a_head(pack: Pack):
    model = LlamaModel.from_pretrained(pack.base, dtype="auto")
    with pytest.warns(UnusedParametersWarning, match=r"lm_head\.weight"):
        model.load_dare_adapter(pack.adapters["a"])
    expected = expect(pack, {"a": 1.0})
    del expected["lm_head.weight"]
    assert_holds(model, {name.removeprefix("model."): v for name, v in expected.items()})


def test_a_fine_tune_that_unties_its_head_needs_an_untied_base(
    make_pack: PackMaker, tmp_path: Path
):
    def untie(model: PreTrainedModel) -> None:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())

    config = tiny_llama(tie_word_embeddings=True)
    pack = make_pack("untied", config=config, kinds={"a": EXACT}, change=untie)
    finetuned = read_checkpoint(pack.finetuned["a"])
    assert not torch.equal(finetuned["lm_head.weight"], finetuned["model.embed_tokens.weight"])
    with pytest.warns(UnusedParametersWarning, match=r"lm_head\.weight.*tie_word_embeddings=False"):
        pack.live().load_dare_adapter(pack.adapters["a"])
    model = LlamaForCausalLM.from_pretrained(
        pack.base, dtype="auto", tie_word_embeddings=False
    ).eval()
    model.load_dare_adapter(pack.adapters["a"])
    assert_holds(model, finetuned)
    full = dare_adapters.export(pack.base, pack.adapters["a"], tmp_path / "full", progress=False)
    assert_holds(LlamaForCausalLM.from_pretrained(full, dtype="auto"), finetuned)


def test_the_base_is_verified_and_not_the_patched_weights(pack: Pack):
    model = pack.live()
    model.load_dare_adapter(pack.adapters["b"])
    patched = all_bytes(model)
    model.load_dare_adapter(pack.adapters["a"], activate=False)
    assert all_bytes(model) == patched
    torch.manual_seed(1)
    other = LlamaForCausalLM(tiny_llama()).to(torch.bfloat16)
    other.load_dare_adapter(pack.adapters["b"], check_base=False)
    with pytest.raises(BaseMismatchError):
        other.load_dare_adapter(pack.adapters["a"])
    assert other.active_dare_adapters == ["b"]
