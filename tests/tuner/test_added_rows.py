"""Fine-tunes whose vocabulary grew, in PEFT's layers: as the exported model answers."""

from __future__ import annotations

import filecmp
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

import dare_adapters
from dare_adapters import DareConfig
from dare_adapters.tuner.holder import DareHolder
from tests.conftest import PackMaker, all_bytes
from tests.tuner.architectures import ARCHITECTURES, logits

# A head of its own; one weight under three names.
NAMES = ("llama", "t5")
# Sizes of three fine-tunes' vocabularies, as additions to the base's.
GROWTH = {"eight": 8, "none": 0, "three": 3}
FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass
class Grown:
    """One base, adapters of fine-tunes with more words than it, and what these are exported to."""

    live: Callable[[], PreTrainedModel]
    words: int
    adapters: dict[str, Path]
    exported: dict[str, PreTrainedModel]
    inputs: dict[str, torch.Tensor]

    def loaded(self, *names: str) -> PeftModel:
        model = PeftModel.from_pretrained(self.live(), self.adapters[names[0]], names[0])
        for name in names[1:]:
            model.load_adapter(self.adapters[name], name)
        return model.eval()

    def new_words(self, row: int = 0) -> dict[str, torch.Tensor]:
        """Inputs of which a row has words that only the adapter "eight" knows."""
        made = {name: tokens.clone() for name, tokens in self.inputs.items()}
        for tokens in made.values():
            tokens[row, 2:4] = torch.tensor([self.words + 7, self.words + 1])
        return made


@pytest.fixture(params=NAMES, scope="module")
def grown(
    request: pytest.FixtureRequest,
    make_pack: PackMaker,
    tmp_path_factory: pytest.TempPathFactory,
) -> Grown:
    name = request.param
    architecture = ARCHITECTURES[name]
    words = architecture.config().vocab_size
    adapters, exported = {}, {}
    for kind, more in GROWTH.items():
        pack = make_pack(
            f"grown-{name}-{kind}",
            architecture.model_class,
            architecture.config(),
            dtype=torch.float32,
            spread=0.02,
            kinds={kind: {"drop_rate": 0.5, "bits": 4}},
            change=lambda model, size=words + more: model.resize_token_embeddings(size),
        )
        adapters[kind] = pack.adapters[kind]
        out = tmp_path_factory.mktemp(f"exported-{kind}") / "model"
        dare_adapters.export(pack.base, pack.adapters[kind], out, progress=False)
        exported[kind] = architecture.model_class.from_pretrained(out).eval()
    return Grown(pack.live, words, adapters, exported, architecture.inputs())


def answer(model: torch.nn.Module, tokens: torch.Tensor, **how: object) -> list[list[int]]:
    with torch.no_grad():
        made = model.generate(input_ids=tokens, do_sample=False, max_new_tokens=5, **how)
    return made.tolist()


def with_adapter(grown: Grown) -> PreTrainedModel:
    model = grown.live()
    report = model.load_adapter(str(grown.adapters["eight"]))
    assert not report.missing_keys
    return model


ROUTES = {
    "PeftModel": lambda grown: grown.loaded("eight"),
    "low_cpu_mem_usage": lambda grown: PeftModel.from_pretrained(
        grown.live(), grown.adapters["eight"], low_cpu_mem_usage=True
    ),
    "load_adapter": with_adapter,
    "from_pretrained": lambda grown: type(grown.live()).from_pretrained(grown.adapters["eight"]),
}


@pytest.mark.parametrize("route", ROUTES)
def test_new_words_are_read_answered_scored_and_saved_again(
    route: str, grown: Grown, tmp_path: Path
) -> None:
    model, full = ROUTES[route](grown), grown.exported["eight"]
    inputs = grown.new_words()
    assert torch.equal(logits(model, inputs), logits(full, inputs))
    with torch.no_grad():
        labels = inputs["input_ids"]
        assert model(**inputs, labels=labels).loss == full(**inputs, labels=labels).loss
    for beams in (1, 3):
        found = answer(model, inputs["input_ids"], num_beams=beams)
        assert found == answer(full, inputs["input_ids"], num_beams=beams)
    assert model.get_input_embeddings().weight.shape == full.get_input_embeddings().weight.shape
    model.save_pretrained(tmp_path)
    saved = tmp_path / "eight" if route == "PeftModel" else tmp_path
    for file in FILES:
        assert filecmp.cmp(saved / file, grown.adapters["eight"] / file, shallow=False), file


def test_the_config_is_the_bases_until_the_adapter_is_merged_for_good(
    grown: Grown, tmp_path: Path
) -> None:
    """PEFT writes whole embeddings into an adapter whose model's `vocab_size` is another."""
    model = grown.loaded("eight")
    inputs = grown.new_words()
    labels = inputs["input_ids"]
    expected = grown.exported["eight"](**inputs, labels=labels).loss
    model.merge_adapter()
    assert model(**inputs, labels=labels).loss == expected
    model.unmerge_adapter()
    assert model(**inputs, labels=labels).loss == expected
    assert model.config.vocab_size == grown.words
    with pytest.raises(Exception, match=r"index out of range"), model.disable_adapter():
        model(**inputs, labels=labels)
    assert model.config.vocab_size == grown.words, "after an error too"
    merged = model.merge_and_unload()
    assert merged.config.vocab_size == grown.words + GROWTH["eight"]
    assert merged(**inputs, labels=labels).loss == expected
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, inputs), logits(grown.exported["eight"], inputs))


def test_unmerging_or_unloading_brings_the_base_back_with_its_own_size(grown: Grown) -> None:
    before = all_bytes(grown.live())
    model = grown.loaded("eight", "three")
    for name in ("eight", "three"):
        model.set_adapter(name)
        model.merge_adapter()
        expected = logits(grown.exported[name], grown.inputs)
        assert torch.equal(logits(model, grown.inputs), expected)
        model.unmerge_adapter()
    unloaded = model.unload()
    assert all_bytes(unloaded) == before
    assert torch.equal(logits(unloaded, grown.inputs), logits(grown.live(), grown.inputs))
    unloaded(**grown.inputs, labels=grown.inputs["input_ids"])


def test_adapters_of_other_sizes_are_switched_and_active_together(grown: Grown) -> None:
    model = grown.loaded("eight", "none", "three")
    for name in ("none", "three", "eight"):
        model.set_adapter(name)
        assert torch.equal(
            logits(model, grown.inputs), logits(grown.exported[name], grown.inputs)
        ), name
    model.base_model.set_adapter(["three", "eight"])
    patched = grown.live()
    for name in ("three", "eight"):
        patched.load_dare_adapter(grown.adapters[name], name, activate=False)
    patched.set_dare_adapter(["three", "eight"])
    inputs = grown.new_words()
    assert torch.equal(logits(model, inputs), logits(patched, inputs))


def test_rows_of_a_batch_have_the_words_of_their_own_adapter(grown: Grown) -> None:
    rows = ["eight", "none", "__base__"]
    model = grown.loaded("eight", "none", "three")
    inputs = grown.new_words()
    found = logits(model, {**inputs, "adapter_names": rows})
    full = {**grown.exported, "__base__": grown.live()}
    for row, name in enumerate(rows):
        own = {key: tokens[row : row + 1] for key, tokens in inputs.items()}
        expected = logits(full[name], own)[0]
        words = expected.shape[-1]
        assert torch.allclose(found[row, :, :words], expected, atol=1e-5), name
        assert bool((found[row, :, words:] == -torch.inf).all()), name
    for beams in (1, 2):
        together = answer(model, inputs["input_ids"], num_beams=beams, adapter_names=rows)
        for row, name in enumerate(rows):
            alone = answer(full[name], inputs["input_ids"][row : row + 1], num_beams=beams)[0]
            length = min(len(alone), len(together[row]))
            assert together[row][:length] == alone[:length], name


def test_a_batch_of_several_makes_no_weight_of_any_adapters_size(
    grown: Grown, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = grown.loaded("eight", "none", "three")
    of_words = {grown.words + more for more in GROWTH.values()}
    made = DareHolder.effective_of

    def effective_of(self: DareHolder, local: str, adapters: Sequence[str]) -> torch.Tensor:
        value = made(self, local, adapters)
        assert value.shape[0] not in of_words
        return value

    monkeypatch.setattr(DareHolder, "effective_of", effective_of)
    with pytest.raises(AssertionError), torch.no_grad():
        model(**grown.inputs)  # one adapter alone: such a weight is made, and found
    inputs = {name: tokens[:1].repeat(4, 1) for name, tokens in grown.new_words().items()}
    for tokens in inputs.values():
        tokens[1:, 2:4] = 5
    with torch.no_grad():
        model(**inputs, adapter_names=["eight", "none", "three", "__base__"])


def test_rows_that_a_padded_base_has_already_are_each_adapters_own(grown: Grown) -> None:
    base = grown.live()
    base.resize_token_embeddings(grown.words + 5)
    with torch.no_grad():
        base.get_input_embeddings().weight[grown.words :].normal_()
    model = PeftModel.from_pretrained(base, grown.adapters["eight"], "eight")
    model.load_adapter(grown.adapters["three"], "three")
    model.eval()
    names = ["three", "eight", "__base__"]
    inputs = {name: tokens[:1].repeat(3, 1) for name, tokens in grown.inputs.items()}
    for tokens in inputs.values():
        tokens[:, 1:4] = torch.tensor([grown.words + 1, grown.words + 2, grown.words + 4])
        tokens[1, 1] = grown.words + 7
    with torch.no_grad():
        mixed = model(**inputs, adapter_names=names).logits
        for row, name in enumerate(names):
            own = {key: tokens[row : row + 1] for key, tokens in inputs.items()}
            with model.disable_adapter() if name == "__base__" else nullcontext():
                if name != "__base__":
                    model.set_adapter(name)
                expected = model(**own).logits[0]
            width = expected.shape[-1]
            assert torch.allclose(mixed[row, :, :width], expected, atol=1e-5)
            assert bool((mixed[row, :, width:] == -torch.inf).all())


def test_a_word_that_a_rows_adapter_lacks_is_refused_unless_it_is_masked(grown: Grown) -> None:
    rows = ["eight", "none", "__base__"]
    model = grown.loaded("eight", "none")
    inputs = grown.new_words(row=1)
    message = rf"row 1 of \w*input_ids has the token {grown.words + 7}.* adapter 'none' ends at "
    with pytest.raises(ValueError, match=message):
        logits(model, {**inputs, "adapter_names": rows})
    padded = {name: tokens.clone() for name, tokens in grown.inputs.items()}
    padded["input_ids"][:, -1] = grown.words + 7
    mask = torch.ones_like(padded["input_ids"])
    mask[:, -1] = 0
    found = logits(model, {**padded, "attention_mask": mask, "adapter_names": rows})
    same = {**padded, "input_ids": padded["input_ids"].clone()}
    same["input_ids"][1:, -1] = 0  # what is masked makes no difference
    expected = logits(model, {**same, "attention_mask": mask, "adapter_names": rows})
    assert torch.allclose(found[:, :-1], expected[:, :-1], atol=1e-5)


def test_added_rows_go_on_training(grown: Grown, tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(grown.live(), grown.adapters["eight"], is_trainable=True)
    inputs = grown.new_words()
    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    rows = {n: p for n, p in model.named_parameters() if n.rpartition(".")[0].endswith("_rows")}
    assert rows
    assert all(bool(p.grad.abs().sum() > 0) for p in rows.values())
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    moved = logits(model, inputs)
    model.save_pretrained(tmp_path)
    patched = grown.live()
    patched.load_dare_adapter(tmp_path)
    assert torch.equal(logits(patched, inputs), moved)


def test_a_recipe_beside_it_follows_the_sizes_too(grown: Grown) -> None:
    model = grown.loaded("eight")
    model.add_adapter("recipe", DareConfig(drop_rate=0.5, init_weights=False, seed=1))
    model.set_adapter("recipe")
    assert logits(model, grown.inputs).shape[-1] == grown.words
    model.set_adapter("eight")
    model.delete_adapter("recipe")
    assert torch.equal(logits(model, grown.inputs), logits(grown.exported["eight"], grown.inputs))
