"""Adapters of one base under other names, with other parameters, heads and tokens, are combined."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import BertForSequenceClassification, BertModel, PreTrainedModel

import dare_adapters
from dare_adapters.adapter import Adapter
from dare_adapters.combine.registry import get_method
from dare_adapters.errors import UnusedParametersWarning
from tests.combine.test_api import METHODS, dense, small_llama
from tests.conftest import Pack, PackMaker, all_bytes, read_checkpoint
from tests.hf_combine.combined_models import SOME, assert_near, loaded
from tests.test_live import bert_config
from tests.test_patch import EXACT, grown_pack


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of one BERT: of the bare encoder, and of the model with a head."""
    root = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    whole = BertForSequenceClassification(bert_config(num_labels=3)).float()
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.normal_(std=0.02)
    whole.save_pretrained(root / "task-base")
    whole.bert.save_pretrained(root / "bare-base")
    found = {}
    for kind, model_class in (("bare", BertModel), ("task", BertForSequenceClassification)):
        base = root / f"{kind}-base"
        tuned = model_class.from_pretrained(base, dtype=torch.float32)
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.002)
        tuned.save_pretrained(root / f"{kind}-tuned")
        found[kind] = root / kind
        dare_adapters.extract(base, root / f"{kind}-tuned", found[kind], progress=False, **EXACT)
    return {**found, "base": root / "task-base"}


@pytest.mark.parametrize("order", [("bare", "task"), ("task", "bare")], ids="-".join)
@pytest.mark.parametrize("kind", ["linear", "average", "ties", "slerp", "karcher"])
def test_names_that_differ_by_a_prefix_are_one_parameter(
    encoders: dict[str, Path], tmp_path: Path, order: Sequence[str], kind: str
):
    model = BertForSequenceClassification.from_pretrained(encoders["base"], dtype=torch.float32)
    before, start = all_bytes(model), {n: p.clone() for n, p in model.named_parameters()}
    for name in ("bare", "task"):
        model.load_dare_adapter(encoders[name], name, activate=False)
    options = {"density": 0.5} if kind == "ties" else {}
    model.add_weighted_adapter(order, [1, 1], "m", combination_type=kind, **options)
    own = {name: dense(Adapter.open(encoders[name])) for name in order}
    own["bare"] = {f"bert.{name}": delta for name, delta in own["bare"].items()}
    method, expected = get_method(kind), {}
    for name, value in start.items():
        zero = torch.zeros(value.shape)
        deltas = [own[who].get(name, zero) for who in order]
        if method.on_parameters:
            expected[name] = method.function([value + delta for delta in deltas], [1, 1])
        else:
            merged = [dare_adapters.delta.DenseDelta(delta) for delta in deltas]
            expected[name] = value + method.function(merged, [1, 1], **options).dense()
    model.set_dare_adapter("m")
    assert_near(model, expected)
    # The same one level further in, and from a directory.
    model.add_weighted_adapter(["m"], [0.5], "half", combination_type="linear", lambda_=2.0)
    model.set_dare_adapter("half")
    assert_near(model, expected)
    model.save_dare_adapter(tmp_path / "saved", "m")
    prefix = "" if order[0] == "bare" else "bert."
    assert f"{prefix}encoder.layer.0.attention.self.query.weight" in Adapter.open(
        tmp_path / "saved"
    )
    model.load_dare_adapter(tmp_path / "saved")
    assert_near(model, expected)
    model.disable_dare_adapters()
    assert all_bytes(model) == before


@pytest.mark.parametrize("kind", SOME)
def test_a_head_that_the_model_ties_never_replaces_its_embedding(
    make_pack: PackMaker, tmp_path: Path, kind: str
):
    def untie(model: PreTrainedModel) -> None:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())

    config = small_llama()
    config.tie_word_embeddings = True
    kinds = {"a": EXACT, "b": EXACT}
    pack = make_pack(
        "combine-untied", config=config, dtype=torch.float32, kinds=kinds, change=untie
    )
    model = pack.live()
    before, base = all_bytes(model), read_checkpoint(pack.base)
    own = {name: dense(Adapter.open(path)) for name, path in pack.adapters.items()}
    name = "model.embed_tokens.weight"
    paths = list(pack.adapters.values())
    with pytest.warns(UnusedParametersWarning, match="lm_head"):
        model.load_dare_adapter(paths, "m", combination_type=kind, **SOME[kind])
    live = model.model.embed_tokens.weight
    far = max(float(own[who][name].abs().max()) for who in "ab") * 2
    assert float((live - base[name]).abs().max()) <= far * 1.01
    made = dare_adapters.combine(
        paths, tmp_path / "out", combination_type=kind, bits=32, progress=False, **SOME[kind]
    )
    if kind != "ties":  # whose threshold is of all parameters, and here of one fewer
        torch.testing.assert_close(live, base[name] + made[name].dense(), rtol=0, atol=1e-7)
    other = pack.live()
    with pytest.warns(UnusedParametersWarning, match="lm_head"):
        other.load_dare_adapter(made)
    torch.testing.assert_close(
        other.model.embed_tokens.weight, base[name] + made[name].dense(), rtol=0, atol=1e-7
    )
    model.disable_dare_adapters()
    assert all_bytes(model) == before
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("kind", ["linear", "ties", "karcher"])
def test_a_head_and_added_tokens_are_the_first_ones(make_pack: PackMaker, kind: str):
    pack = grown_pack(make_pack, tied=True)
    model = loaded(pack)
    before = all_bytes(model)
    options = METHODS[kind]
    model.add_weighted_adapter(["b", "a"], [1, 1], "m", combination_type=kind, **options)
    model.set_dare_adapter("m")
    added = read_checkpoint(pack.finetuned["b"])["model.embed_tokens.weight"][97:]
    assert torch.equal(model.model.embed_tokens.weight[97:], added)
    assert model.config.vocab_size == 102
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.disable_dare_adapters()
    assert model.config.vocab_size == 97
    assert all_bytes(model) == before


def test_what_the_model_lacks_is_left_out_and_told(pack: Pack):
    model = pack.live()
    del model.model.layers[0]
    before = all_bytes(model)
    paths = [pack.adapters[name] for name in "ab"]
    for kind in ("ties", "slerp"):
        how = {"combination_type": kind, **METHODS[kind]}
        with pytest.raises(dare_adapters.errors.ArchitectureMismatchError, match=r"layers\.0\."):
            model.load_dare_adapter(paths, kind, **how)
        with pytest.warns(UnusedParametersWarning, match=r"9 parameters.*layers\.0\."):
            model.load_dare_adapter(paths, kind, strict=False, **how)
        assert all_bytes(model) != before
        model.disable_dare_adapters()
        assert all_bytes(model) == before
