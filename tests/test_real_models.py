"""Real checkpoints: a half-precision fine-tune of an encoder, a small model that writes stories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
)

import dare_adapters
from dare_adapters.adapter import Adapter
from dare_adapters.checkpoint import open_checkpoint
from dare_adapters.delta import NewParameter
from dare_adapters.errors import BaseMismatchError
from dare_adapters.export import check_base_checkpoint
from tests.conftest import all_bytes, read_checkpoint
from tests.development_data import encoder_base, shared


class Extracted(NamedTuple):
    """Checkpoints, and what was made of them."""

    base: Path
    finetuned: Path
    adapter: Path


def classifier(path: Path, dtype: Any = "auto") -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=2, dtype=dtype
    ).eval()


# all-MiniLM-L6-v2, fine-tuned on MRPC: saved in float16 over a base in float32 --------------------


@pytest.fixture(scope="module")
def mrpc(tmp_path_factory: pytest.TempPathFactory) -> Extracted:
    base, finetuned = encoder_base(), shared("models", "minilm-mrpc")
    out = tmp_path_factory.mktemp("mrpc") / "adapter"
    dare_adapters.extract(base, finetuned, out, on_large_delta="ignore", progress=False)
    return Extracted(base, finetuned, out)


def test_an_encoder_adapter_has_the_bases_names_and_the_head(mrpc: Extracted):
    adapter = Adapter.open(mrpc.adapter)
    base = open_checkpoint(mrpc.base)
    named = dict(adapter.deltas())
    assert adapter.config.finetuned_prefix == "bert."
    assert set(named) <= set(base)
    assert {n for n in adapter if isinstance(adapter[n], NewParameter)} == {
        "classifier.weight",
        "classifier.bias",
    }
    assert adapter.config.task_type == "SEQ_CLS"
    # The fine-tune takes 45 MB in float16, the base 90 MB.
    size = (mrpc.adapter / "adapter_model.safetensors").stat().st_size
    assert size * 30 < (mrpc.finetuned / "model.safetensors").stat().st_size


def test_its_survivors_are_rescaled_differences_within_four_bits(mrpc: Extracted):
    adapter = Adapter.open(mrpc.adapter)
    base, finetuned = open_checkpoint(mrpc.base), open_checkpoint(mrpc.finetuned)
    name = "encoder.layer.3.intermediate.dense.weight"
    exact = finetuned[f"bert.{name}"].float() - base[name]
    delta = adapter[name]
    assert not isinstance(delta, NewParameter)
    found = delta.dense()
    # One survivor in each ten columns of every row, and at four bits its sign and rough size.
    blocks = torch.nn.functional.pad(found != 0, (0, -found.shape[1] % 10)).unflatten(1, (-1, 10))
    assert int(blocks.sum(dim=2).max()) == 1
    kept = found != 0
    assert 0.08 < kept.float().mean() < 0.1
    assert (found[kept].sign() == exact[kept].sign()).all()
    error = (found[kept] - 10 * exact[kept]).square().sum() / (10 * exact[kept]).square().sum()
    assert error < 0.02


def test_its_witness_knows_the_base_and_no_other_model(mrpc: Extracted):
    adapter = Adapter.open(mrpc.adapter)
    check_base_checkpoint(open_checkpoint(mrpc.base), adapter)
    assert len(adapter.config.witness) > 100
    other = shared("models", "minilm-sst2")
    with pytest.raises(BaseMismatchError, match="is not the base"):
        check_base_checkpoint(open_checkpoint(other), adapter)
    live = classifier(other)
    before = all_bytes(live)
    with pytest.raises(BaseMismatchError):
        live.load_dare_adapter(mrpc.adapter)
    assert all_bytes(live) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_loads_onto_the_base_in_any_precision_and_off_again(mrpc: Extracted, dtype: torch.dtype):
    live = classifier(mrpc.base, dtype)
    before = all_bytes(live)
    live.load_dare_adapter(mrpc.adapter, "mrpc")
    assert all_bytes(live) != before
    head = read_checkpoint(mrpc.finetuned)["classifier.weight"]
    assert torch.equal(live.classifier.weight, head.to(dtype))
    live.disable_dare_adapters()
    assert all_bytes(live) == before


def test_its_export_equals_the_live_model(mrpc: Extracted, tmp_path: Path):
    live = classifier(mrpc.base)
    live.load_dare_adapter(mrpc.adapter)
    full = dare_adapters.export(mrpc.base, mrpc.adapter, tmp_path / "full", progress=False)
    assert all_bytes(classifier(full)) == all_bytes(live)


def test_without_dropping_or_rounding_it_is_the_fine_tune(mrpc: Extracted, tmp_path: Path):
    dare_adapters.extract(
        mrpc.base,
        mrpc.finetuned,
        tmp_path / "whole",
        drop_rate=0.0,
        bits=32,
        on_large_delta="ignore",
        progress=False,
    )
    full = dare_adapters.export(mrpc.base, tmp_path / "whole", tmp_path / "full", progress=False)
    exported, finetuned = read_checkpoint(full), read_checkpoint(mrpc.finetuned)
    for name, value in finetuned.items():
        assert torch.equal(exported[name].half(), value), name


def test_it_answers_as_the_fine_tune_does(mrpc: Extracted):
    lines = shared("data", "glue", "mrpc", "dev.jsonl").read_text(encoding="utf-8").splitlines()
    rows = sorted((json.loads(line) for line in lines[:64]), key=lambda row: len(row["sentence1"]))
    tokenizer = AutoTokenizer.from_pretrained(mrpc.finetuned)

    def answers(model: PreTrainedModel) -> torch.Tensor:
        found = []
        for start in range(0, len(rows), 32):
            part = rows[start : start + 32]
            texts = [[row[f"sentence{n}"] for row in part] for n in (1, 2)]
            tokens = tokenizer(
                *texts, padding=True, truncation=True, max_length=128, return_tensors="pt"
            )
            with torch.inference_mode():
                found.append(model(**tokens).logits.argmax(dim=1))
        return torch.cat(found)

    expected = answers(classifier(mrpc.finetuned, torch.float32))
    live = classifier(mrpc.base)
    live.load_dare_adapter(mrpc.adapter)
    same = (answers(live) == expected).float().mean()
    assert same > 0.9
    # The fine-tune's head over the base alone does not.
    bare = classifier(mrpc.base)
    bare.classifier = live.classifier
    assert (answers(bare) == expected).float().mean() < same - 0.1


# stories260K: a base that writes sentences, and a synthetic fine-tune -----------------------------


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Extracted:
    base = shared("models", "stories260K")
    root = tmp_path_factory.mktemp("stories")
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.003)
    model.save_pretrained(root / "finetuned")
    AutoTokenizer.from_pretrained(base).save_pretrained(root / "finetuned")
    dare_adapters.extract(base, root / "finetuned", root / "adapter", progress=False)
    return Extracted(base, root / "finetuned", root / "adapter")


def story(model: PreTrainedModel, path: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokens = tokenizer("Once upon a time", return_tensors="pt")
    with torch.inference_mode():
        said = model.generate(**tokens, max_new_tokens=40, do_sample=False)
    return str(tokenizer.decode(said[0], skip_special_tokens=True))


def test_a_tied_embedding_is_patched_once_and_exported_as_it_is_live(
    stories: Extracted, tmp_path: Path
):
    live = LlamaForCausalLM.from_pretrained(stories.base)
    assert live.lm_head.weight.data_ptr() == live.model.embed_tokens.weight.data_ptr()
    live.load_dare_adapter(stories.adapter)
    assert live.lm_head.weight.data_ptr() == live.model.embed_tokens.weight.data_ptr()
    full = dare_adapters.export(stories.base, stories.adapter, tmp_path / "full", progress=False)
    assert all_bytes(LlamaForCausalLM.from_pretrained(full)) == all_bytes(live)
    assert story(LlamaForCausalLM.from_pretrained(full), full) == story(live, stories.base)


def test_the_base_writes_its_own_story_again_afterwards(stories: Extracted):
    live = LlamaForCausalLM.from_pretrained(stories.base)
    before, told = all_bytes(live), story(live, stories.base)
    assert "there was" in told
    live.load_dare_adapter(stories.adapter)
    live.delete_dare_adapter("adapter")
    assert all_bytes(live) == before
    assert story(live, stories.base) == told


def test_the_whole_difference_tells_the_fine_tunes_story(stories: Extracted, tmp_path: Path):
    dare_adapters.extract(
        stories.base, stories.finetuned, tmp_path / "whole", drop_rate=0.0, bits=32, progress=False
    )
    live = LlamaForCausalLM.from_pretrained(stories.base)
    finetuned = LlamaForCausalLM.from_pretrained(stories.finetuned)
    prompt = torch.arange(3, 35)[None]
    with torch.inference_mode():
        expected = finetuned(prompt).logits
        far = (live(prompt).logits - expected).abs().max()
        live.load_dare_adapter(tmp_path / "whole")
        near = (live(prompt).logits - expected).abs().max()
    assert far > 0.05
    assert near < 1e-4
    for name, value in finetuned.named_parameters():
        # Base plus float32 difference: off by one rounding at most.
        assert torch.allclose(live.get_parameter(name), value, rtol=2**-23, atol=2**-24), name
    assert story(live, stories.base) == story(finetuned, stories.finetuned)


def test_its_witness_refuses_the_fine_tune_as_a_base(stories: Extracted):
    adapter = Adapter.open(stories.adapter)
    check_base_checkpoint(open_checkpoint(stories.base), adapter)
    with pytest.raises(BaseMismatchError, match=r"\d+ of \d+ sampled parameters differ"):
        check_base_checkpoint(open_checkpoint(stories.finetuned), adapter)
    live = LlamaForCausalLM.from_pretrained(stories.finetuned)
    with pytest.raises(BaseMismatchError):
        live.load_dare_adapter(stories.adapter)
