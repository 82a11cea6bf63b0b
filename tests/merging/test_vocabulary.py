"""Merges of models whose tokens differ, against loops over tokens."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import dare_adapters
from dare_adapters.errors import RecipeError
from dare_adapters.merging.api import merge
from dare_adapters.merging.chat_template import BUILT_IN, read_chat_template
from dare_adapters.merging.rows import AlignedDelta, AlignedTensor, RowPlanner
from dare_adapters.recipe import ModelPath, ModelReference, RecipeWarning
from tests.conftest import read_checkpoint, tiny_llama

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SPECIAL = ["<unk>", "<s>", "</s>"]
WORDS = [*SPECIAL, "one", "two", "three", "four"]
MESSAGES = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
]


@dataclass(frozen=True)
class Model:
    """A model on disk, and what is in it."""

    path: Path
    tensors: Mapping[str, torch.Tensor]
    vocabulary: Mapping[str, int]

    def row(self, name: str, token: str) -> torch.Tensor | None:
        """A token's row, float32, or None."""
        place = self.vocabulary.get(token)
        tensor = self.tensors[name]
        return tensor[place].float() if place is not None and place < len(tensor) else None


ModelMaker = Callable[..., Model]


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **named)


def trained_tokenizer(texts: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL))
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **named)


@pytest.fixture
def make_model(tmp_path: Path) -> ModelMaker:
    """Makes models with tokenizers."""

    def make(
        name: str,
        words: Sequence[str] | PreTrainedTokenizerFast | None = tuple(WORDS),
        *,
        added: Sequence[str | AddedToken] = (),
        rows: int | None = None,
        dtype: torch.dtype = torch.float32,
        template: str | None = None,
        model: PreTrainedModel | None = None,
        **config: object,
    ) -> Model:
        tokenizer = words if isinstance(words, PreTrainedTokenizerFast) else None
        if tokenizer is None and words is not None:
            tokenizer = word_tokenizer(words)
        vocabulary = {}
        if tokenizer is not None:
            tokenizer.add_tokens(list(added))
            tokenizer.chat_template = template
            tokenizer.save_pretrained(tmp_path / name)
            vocabulary = tokenizer.get_vocab()
        torch.manual_seed(sum(map(ord, name)))
        if model is None:
            small = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
            settings = {**small, "num_key_value_heads": 1, "pad_token_id": None, **config}
            model = LlamaForCausalLM(tiny_llama(vocab_size=rows or len(vocabulary), **settings))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
        model.to(dtype).save_pretrained(tmp_path / name)
        return Model(tmp_path / name, read_checkpoint(tmp_path / name), vocabulary)

    return make


def aligned(
    name: str, tokens: Mapping[str, int], inputs: Sequence[Model], base: Model | None
) -> list[torch.Tensor]:
    """Every model's rows in the output's order, by mergekit's rules, one token after the other."""
    made = [torch.zeros(len(tokens), inputs[0].tensors[name].shape[1]) for _ in inputs]
    for token, place in tokens.items():
        found = [model.row(name, token) for model in inputs]
        having = [row for row in found if row is not None]
        if base is not None and base.row(name, token) is not None:
            other = base.row(name, token)
        else:
            other = sum(having) / len(having) if having else torch.zeros_like(made[0][0])
        for own, row in zip(made, found, strict=True):
            own[place] = other if row is None else row
    return made


def task_recipe(base: Model, *others: Model, weight: float = 0.5, **keys: object) -> dict:
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(base.path),
        "models": [{"model": str(m.path), "parameters": {"weight": weight}} for m in others],
        **keys,
    }


def linear_recipe(*inputs: Model, **keys: object) -> dict:
    entries = [
        {"model": str(model.path), "parameters": {"weight": n}} for n, model in enumerate(inputs, 1)
    ]
    return {"merge_method": "linear", "models": entries, **keys}


def run(recipe: dict, out: Path, **options: object) -> dict[str, torch.Tensor]:
    merge(recipe, out, progress=False, **options)
    return read_checkpoint(out)


def output_tokens(out: Path) -> dict[str, int]:
    return AutoTokenizer.from_pretrained(out).get_vocab()


def generate(out: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(out)
    model, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    ids = tokenizer("one two", return_tensors="pt").input_ids
    made = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    return tokenizer.decode(made[0])


def test_a_union_takes_every_token_and_what_a_model_lacks_from_the_base(make_model, tmp_path):
    base = make_model("base", added=["<b>"])
    shuffled = [*SPECIAL, "four", "three", "two", "one", "five"]
    others = [make_model("a", added=["<x>", "<y>"]), make_model("b", shuffled, added=["<y>"])]
    out = tmp_path / "out"
    recipe = task_recipe(base, *others, tokenizer={"source": "union"})
    tensors = run(recipe, out)
    tokens = output_tokens(out)
    assert sorted(tokens, key=tokens.__getitem__) == [*WORDS, "<b>", "five", "<x>", "<y>"]
    for name in (EMBED, HEAD):
        start, *rest = aligned(name, tokens, [base, *others], base)
        wanted = start + sum(0.5 * (own - start) for own in rest)
        torch.testing.assert_close(tensors[name], wanted)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == len(tokens)
    assert generate(out)


def test_without_a_base_what_a_model_lacks_is_the_mean_of_those_that_have_it(make_model, tmp_path):
    inputs = [make_model("a"), make_model("b", added=["<x>"]), make_model("c", added=["<x>"])]
    tensors = run(linear_recipe(*inputs, tokenizer_source="union"), tmp_path / "out")
    rows = aligned(EMBED, output_tokens(tmp_path / "out"), inputs, None)
    wanted = sum(n * own for n, own in enumerate(rows, 1)) / 6
    torch.testing.assert_close(tensors[EMBED], wanted)


def test_vocabularies_that_were_trained_on_other_texts_unite(make_model, tmp_path):
    one = trained_tokenizer(["low lower lowest newer newest wider"] * 3, 40)
    two = trained_tokenizer(["show shower shallow the thinnest thick"] * 3, 44)
    inputs = [make_model("a", one, added=["<tool>"]), make_model("b", two)]
    tensors = run(linear_recipe(*inputs, tokenizer_source="union"), tmp_path / "out")
    tokens = output_tokens(tmp_path / "out")
    assert set(tokens) == {*inputs[0].vocabulary, *inputs[1].vocabulary}
    first, second = aligned(EMBED, tokens, inputs, None)
    torch.testing.assert_close(tensors[EMBED], (first + 2 * second) / 3)
    assert generate(tmp_path / "out")


def test_the_base_s_tokenizer_leaves_out_others_tokens_and_is_copied_as_it_is(make_model, tmp_path):
    base, other = make_model("base"), make_model("a", [*SPECIAL, "two", "one", "five"])
    tensors = run(task_recipe(base, other, tokenizer_source="base"), tmp_path / "out")
    start, own = aligned(HEAD, base.vocabulary, [base, other], base)
    torch.testing.assert_close(tensors[HEAD], start + 0.5 * (own - start))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (base.path / file).read_bytes()


def test_a_model_s_tokenizer_moves_the_ids_that_configs_name(make_model, tmp_path):
    base = make_model("base", bos_token_id=1, eos_token_id=[2, 6])
    GenerationConfig(eos_token_id=[2, 6], bos_token_id=1).save_pretrained(base.path)
    other = make_model("a", ["four", "</s>", "<s>", "<unk>", "one"])
    recipe = task_recipe(base, other, tokenizer_source=str(other.path))
    tensors = run(recipe, tmp_path / "out")
    start, own = aligned(EMBED, other.vocabulary, [base, other], base)
    torch.testing.assert_close(tensors[EMBED], start + 0.5 * (own - start))
    for file in ("config.json", "generation_config.json"):
        config = json.loads((tmp_path / "out" / file).read_text())
        assert (config["bos_token_id"], config["eos_token_id"]) == (2, [1, 0])
    assert output_tokens(tmp_path / "out") == other.vocabulary
    assert generate(tmp_path / "out")


def test_ids_of_tokens_that_are_gone_become_the_tokenizer_s_own(make_model, tmp_path):
    base = make_model("base", bos_token_id=1, eos_token_id=6, pad_token_id=5)
    words = [*SPECIAL, "one"]
    other = make_model("a", words)
    recipe = task_recipe(base, other, tokenizer_source=str(other.path))
    with pytest.warns(RecipeWarning, match="lacks the tokens that pad_token_id"):
        run(recipe, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    assert config["pad_token_id"] is None


def test_rules_say_where_a_token_s_row_comes_from(make_model, tmp_path):
    base = make_model("base")
    a, b = make_model("a", added=["<x>", "<y>"]), make_model("b", added=["<x>", "<y>", "<z>"])
    tokens = {
        "<x>": {"source": str(b.path)},
        "<y>": {"source": {"kind": "zero"}, "force": True},
        "<z>": {"source": {"kind": "model_token", "model": str(a.path), "token": "two"}},
        "new": {"source": {"kind": "model_token", "model": str(b.path), "token_id": 3}},
        "one": {"source": str(a.path), "force": True},
        "two": {},
    }
    recipe = task_recipe(base, a, b, tokenizer={"source": "union", "tokens": tokens})
    tensors = run(recipe, tmp_path / "out")
    ids = output_tokens(tmp_path / "out")
    assert ids["new"] == max(ids.values())
    for name in (EMBED, HEAD):
        start, own_a, own_b = aligned(name, ids, [base, a, b], base)
        start[ids["<x>"]] = b.row(name, "<x>")
        for own in (start, own_a, own_b):
            own[ids["<y>"]] = 0
            own[ids["new"]] = b.tensors[name][3]
            own[ids["one"]] = a.row(name, "one")
        start[ids["<z>"]] = own_a[ids["<z>"]] = a.row(name, "two")
        torch.testing.assert_close(tensors[name], start + 0.5 * (own_a + own_b - 2 * start))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"source": "{a}"}, "has no token 'new'"),
        ({"source": {"kind": "model_token", "model": "{a}", "token": "no"}}, "has no token 'no'"),
        ({"source": {"kind": "model_token", "model": "{a}", "token_id": 99}}, "no row 99"),
    ],
)
def test_a_rule_that_cannot_be_followed_is_refused_before_anything_is_written(
    make_model, tmp_path, rule, message
):
    base, a = make_model("base"), make_model("a")
    rule = json.loads(json.dumps(rule).replace("{a}", str(a.path)))
    tokenizer = {"source": "union", "tokens": {"new": rule}}
    with pytest.raises(RecipeError, match=message):
        run(task_recipe(base, a, tokenizer=tokenizer), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_token_that_no_model_has_gets_zeros_and_a_warning(make_model, tmp_path):
    base, a = make_model("base"), make_model("a")
    tokenizer = {"source": "base", "tokens": {"new": {}}}
    with pytest.warns(RecipeWarning, match=r"1 tokens \('new'\) are in no model"):
        tensors = run(task_recipe(base, a, tokenizer=tokenizer), tmp_path / "out")
    assert not tensors[EMBED][output_tokens(tmp_path / "out")["new"]].any()


def test_padding_rows_are_each_model_s_mean(make_model, tmp_path):
    base, a = make_model("base", added=["<b>"]), make_model("a", added=["<x>", "<y>"])
    tokenizer = {"source": "union", "pad_to_multiple_of": 8}
    tensors = run(task_recipe(base, a, tokenizer=tokenizer), tmp_path / "out")
    tokens = output_tokens(tmp_path / "out")
    start, own = aligned(HEAD, tokens, [base, a], base)
    start, own = (torch.cat([x, x.mean(0).expand(16 - len(tokens), -1)]) for x in (start, own))
    torch.testing.assert_close(tensors[HEAD], start + 0.5 * (own - start))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 16
    assert generate(tmp_path / "out")


def test_tied_embeddings_stay_tied(make_model, tmp_path):
    base = make_model("base", tie_word_embeddings=True)
    a = make_model("a", added=["<x>"], tie_word_embeddings=True)
    tensors = run(task_recipe(base, a, tokenizer_source="union"), tmp_path / "out")
    assert HEAD not in tensors
    start, own = aligned(EMBED, output_tokens(tmp_path / "out"), [base, a], base)
    torch.testing.assert_close(tensors[EMBED], start + 0.5 * (own - start))
    assert generate(tmp_path / "out")


def test_a_bias_of_the_head_goes_with_its_rows(make_model, tmp_path):
    def phi(rows: int) -> PhiForCausalLM:
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
        config = PhiConfig(vocab_size=rows, num_attention_heads=2, **sizes)
        return PhiForCausalLM(config)

    base, a = make_model("base", model=phi(7)), make_model("a", added=["<x>"], model=phi(8))
    tensors = run(task_recipe(base, a, tokenizer_source="union"), tmp_path / "out")
    one, two = base.tensors["lm_head.bias"], a.tensors["lm_head.bias"]
    one = torch.cat([one, two[7:]])
    torch.testing.assert_close(tensors["lm_head.bias"], one + 0.5 * (two - one))
    assert generate(tmp_path / "out")


@pytest.mark.parametrize(
    ("method", "parameters", "own"),
    [
        ("dare_ties", {"density": 0.5}, {"weight": 0.5}),
        ("della", {"density": 0.6}, {"weight": 0.5}),
        ("model_stock", {}, {}),
        ("sce", {"select_topk": 0.5}, {}),
    ],
)
def test_other_methods_run_on_united_vocabularies(make_model, tmp_path, method, parameters, own):
    base, a, b = make_model("base"), make_model("a", added=["<x>"]), make_model("b")
    recipe = {
        "merge_method": method,
        "base_model": str(base.path),
        "models": [{"model": str(m.path), "parameters": own} for m in (a, b)],
        "parameters": parameters,
        "tokenizer_source": "union",
    }
    tensors = run(recipe, tmp_path / "out")
    assert tensors[EMBED].shape == (8, 16)
    # Only one model has it, so that all are the same there.
    torch.testing.assert_close(tensors[EMBED][7], a.row(EMBED, "<x>"))


def test_slices_without_a_base_take_embeddings_and_heads_from_their_own_models(
    make_model, tmp_path
):
    a, b = make_model("a"), make_model("b", [*SPECIAL, "two", "one", "three", "four"])
    slices = [
        {"sources": [{"model": str(a.path), "layer_range": [0, 1]}]},
        {"sources": [{"model": str(b.path), "layer_range": [1, 2]}]},
    ]
    recipe = {"merge_method": "passthrough", "slices": slices, "tokenizer_source": "union"}
    tensors = run(recipe, tmp_path / "out")
    assert torch.equal(tensors[EMBED], a.tensors[EMBED])
    for token, place in a.vocabulary.items():
        assert torch.equal(tensors[HEAD][place], b.row(HEAD, token))


def test_rows_of_half_precision_are_not_rounded_before_they_are_merged(make_model, tmp_path):
    base, a = make_model("base", dtype=torch.bfloat16), make_model("a", added=["<x>"])
    recipe = task_recipe(base, a, weight=1.0, tokenizer_source="union", out_dtype="float32")
    tensors = run(recipe, tmp_path / "out")
    assert torch.equal(tensors[EMBED][7], a.tensors[EMBED][7])


def test_tokens_beyond_the_embeddings_are_taken_out_of_the_tokenizer(make_model, tmp_path):
    tokenizer = trained_tokenizer(["low lower lowest newer newest wider"] * 3, 40)
    size = len(tokenizer)
    base = make_model("base", tokenizer, added=["<x>"], rows=size - 2)
    a = make_model("a", trained_tokenizer(["low lower lowest newer newest wider"] * 3, 40))
    tensors = run(task_recipe(base, a, tokenizer_source="base"), tmp_path / "out")
    tokens = output_tokens(tmp_path / "out")
    assert len(tokens) == size - 2
    assert "<x>" not in tokens
    assert len(tensors[EMBED]) == size - 2
    assert generate(tmp_path / "out")


def test_models_with_equal_rows_and_no_tokenizer_key_are_merged_row_by_row(make_model, tmp_path):
    base, a = make_model("base"), make_model("a", [*SPECIAL, "four", "three", "two", "one"])
    tensors = run(task_recipe(base, a), tmp_path / "out")
    torch.testing.assert_close(tensors[EMBED], (base.tensors[EMBED] + a.tensors[EMBED]) / 2)
    same = (tmp_path / "out" / "tokenizer.json").read_bytes()
    assert same == (base.path / "tokenizer.json").read_bytes()


def test_extra_rows_are_left_out_and_counted(make_model, tmp_path):
    base, a = make_model("base"), make_model("a", added=["<x>"], rows=10)
    with pytest.warns(RecipeWarning, match=r"3 rows .* are left out, among them those of '<x>'"):
        tensors = run(task_recipe(base, a), tmp_path / "out")
    for name in (EMBED, HEAD):
        torch.testing.assert_close(tensors[name], (base.tensors[name] + a.tensors[name][:7]) / 2)
    assert generate(tmp_path / "out")


def test_a_model_with_fewer_rows_takes_part_in_those_it_has(make_model, tmp_path):
    base, a, b = make_model("base", added=["<x>"]), make_model("a"), make_model("b", added=["<x>"])
    tensors = run(task_recipe(base, a, b), tmp_path / "out")
    start = base.tensors[EMBED]
    wanted = start + 0.5 * (b.tensors[EMBED] - start)
    wanted[:7] += 0.5 * (a.tensors[EMBED] - start[:7])
    torch.testing.assert_close(tensors[EMBED], wanted)


def test_without_a_base_rows_are_of_the_models_that_have_them(make_model, tmp_path):
    a, b = make_model("a", added=["<x>"]), make_model("b")
    tensors = run(linear_recipe(a, b), tmp_path / "out")
    torch.testing.assert_close(
        tensors[EMBED][:7], (a.tensors[EMBED][:7] + 2 * b.tensors[EMBED]) / 3
    )
    torch.testing.assert_close(tensors[EMBED][7], a.tensors[EMBED][7])


def test_rows_that_are_other_tokens_are_refused_by_number(make_model, tmp_path):
    base, a = make_model("base"), make_model("a", [*SPECIAL, "one", "three", "two", "four", "five"])
    with pytest.raises(RecipeError, match=r"4 \('two' of .*here 'three'\), 5 .*source: union"):
        run(task_recipe(base, a), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_tokenizer_is_taken_by_row_with_a_warning(make_model, tmp_path):
    base, a = make_model("base"), make_model("a", None, rows=9)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        tensors = run(task_recipe(base, a), tmp_path / "out")
    texts = [str(one.message) for one in told if one.category is RecipeWarning]
    assert ["cannot be looked at" in text for text in texts] == [True, False]
    assert "2 rows" in texts[1]
    torch.testing.assert_close(tensors[EMBED], (base.tensors[EMBED] + a.tensors[EMBED][:7]) / 2)
    with pytest.warns(RecipeWarning, match="taken to be in the order of"):
        run(task_recipe(base, a, tokenizer_source="union"), tmp_path / "union")


def test_a_head_that_no_model_has_all_rows_of_is_refused(make_model, tmp_path):
    a, b = make_model("a", added=["<x>"]), make_model("b")
    slices = [
        {"sources": [{"model": str(a.path), "layer_range": [0, 1]}]},
        {"sources": [{"model": str(b.path), "layer_range": [1, 2]}]},
    ]
    with pytest.raises(RecipeError, match=r"lm_head\.weight would have 8 rows"):
        run({"merge_method": "passthrough", "slices": slices}, tmp_path / "out")


@pytest.mark.parametrize("which", ["base", "a"])
def test_a_tokenizer_without_a_fast_form_is_refused_by_name(make_model, tmp_path, which):
    found = {name: make_model(name) for name in ("base", "a")}
    (found[which].path / "tokenizer.json").unlink()
    (found[which].path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    (found[which].path / "tokenizer.model").write_bytes(b"no sentencepiece model")
    with pytest.raises(RecipeError, match=f"tokenizer of .*{which} .*as a fast one"):
        run(task_recipe(found["base"], found["a"], tokenizer_source="union"), tmp_path / "out")


def test_a_base_without_a_tokenizer_cannot_have_one_built(make_model, tmp_path):
    base, a = make_model("base", None, rows=7), make_model("a")
    with pytest.raises(RecipeError, match="has no tokenizer"):
        run(task_recipe(base, a, tokenizer_source="union"), tmp_path / "out")


def test_the_commonest_chat_template_is_taken(make_model, tmp_path):
    often, seldom = "{{ messages[0]['content'] }} often", "{{ messages[0]['content'] }} seldom"
    base, a = make_model("base", template=seldom), make_model("a", template=often)
    b = make_model("b", template=often + "\n")
    run(task_recipe(base, a, b, chat_template="auto"), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) == "S often"
    run(task_recipe(base, a, chat_template="auto"), tmp_path / "two")
    assert read_chat_template(tmp_path / "two") == seldom


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("alpaca", "S\n\n### Instruction:\none\n\n### Response:\ntwo</s>\n\n"),
        ("chatml", "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\none<|im_end|>\n"),
        ("exaone", "[|system|]S[|endofturn|]\n[|user|]one\n[|assistant|]two[|endofturn|]\n"),
        ("llama3", "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"),
        ("mistral", "<s>[INST] S\n\none [/INST] two</s>[INST] three [/INST]"),
    ],
)
def test_built_in_chat_templates_render_their_format(make_model, tmp_path, name, wanted):
    base, a = make_model("base", template="old {{ messages }}"), make_model("a")
    recipe = task_recipe(base, a, chat_template=name, tokenizer_source="union")
    run(recipe, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert text.startswith(wanted)
    assert name in BUILT_IN
    assert "old" not in (tmp_path / "out" / "tokenizer_config.json").read_text()


def test_a_chat_template_replaces_one_that_is_in_the_tokenizer_s_config(make_model, tmp_path):
    base, a = make_model("base"), make_model("a")
    file = base.path / "tokenizer_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "chat_template": "old {{ messages }}"}))
    assert read_chat_template(base.path) == "old {{ messages }}"
    own = "{% generation %}{{ messages[0].content }}{% endgeneration %}"
    run(task_recipe(base, a, chat_template=own), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) == "S"


def test_a_template_that_is_no_jinja_or_has_no_tokenizer_is_refused(make_model, tmp_path):
    base, a, bare = make_model("base"), make_model("a"), make_model("bare", None, rows=7)
    with pytest.raises(RecipeError, match="not a Jinja template"):
        run(task_recipe(base, a, chat_template="{% for x in messages %}{{ x }}"), tmp_path / "out")
    with pytest.raises(RecipeError, match="no tokenizer, which a chat template"):
        run(task_recipe(bare, a, chat_template="chatml"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_holds_new_tokens_in_the_base_s_spare_rows(make_model, tmp_path):
    base, a = make_model("base", rows=12), make_model("a", added=["<x>"])
    recipe = task_recipe(base, a, tokenizer_source="union")
    merge(recipe, tmp_path / "out", as_adapter=True, bits=32, progress=False)
    dare_adapters.export(base.path, tmp_path / "out", tmp_path / "whole", progress=False)
    made = read_checkpoint(tmp_path / "whole")
    wanted = base.tensors[EMBED].clone()
    wanted[:7] = (wanted[:7] + a.tensors[EMBED][:7]) / 2
    wanted[7] = a.row(EMBED, "<x>")
    torch.testing.assert_close(made[EMBED], wanted)
    assert output_tokens(tmp_path / "whole")["<x>"] == 7


def test_an_adapter_keeps_the_base_s_rows_where_others_have_more(make_model, tmp_path):
    base, a = make_model("base"), make_model("a", added=["<x>"])
    with pytest.warns(RecipeWarning, match="1 rows"):
        merge(task_recipe(base, a), tmp_path / "out", as_adapter=True, bits=32, progress=False)
    dare_adapters.export(base.path, tmp_path / "out", tmp_path / "whole", progress=False)
    made = read_checkpoint(tmp_path / "whole")
    torch.testing.assert_close(made[HEAD], (base.tensors[HEAD] + a.tensors[HEAD][:7]) / 2)


@pytest.mark.parametrize(
    ("source", "message"), [("union", "has 8 embeddings and its base"), ("{a}", "elsewhere")]
)
def test_an_adapter_cannot_move_or_add_rows(make_model, tmp_path, source, message):
    base = make_model("base", rows=9 if source == "{a}" else 7)
    a = make_model("a", [*SPECIAL, "two", "one", "three", "four", "five"])
    recipe = task_recipe(base, a, tokenizer_source=source.replace("{a}", str(a.path)))
    with pytest.raises(RecipeError, match=message):
        merge(recipe, tmp_path / "out", as_adapter=True, progress=False)
    assert not (tmp_path / "out").exists()


def test_an_adapter_with_rows_of_its_own_is_merged_by_token(make_model, tmp_path):
    base, a = make_model("base"), make_model("a", added=["<x>"])
    dare_adapters.extract(
        base.path, a.path, tmp_path / "adapter", drop_rate=0, bits=32, progress=False,
        on_large_delta="ignore",
    )  # fmt: skip
    recipe = task_recipe(base, Model(tmp_path / "adapter", {}, {}), tokenizer_source="union")
    tensors = run(recipe, tmp_path / "out")
    torch.testing.assert_close(tensors[EMBED][:7], (base.tensors[EMBED] + a.tensors[EMBED][:7]) / 2)
    torch.testing.assert_close(tensors[EMBED][7], a.tensors[EMBED][7])


def test_any_range_of_rows_reads_as_the_whole_does():
    torch.manual_seed(0)
    tensors = [torch.randn(6, 3), torch.randn(4, 3).to(torch.bfloat16)]
    maps = [torch.tensor([5, -1, 0, 1, 2, -1, -1]), torch.tensor([-1, 3, 0, 1, 2, -1, -1])]
    names = [ModelReference(ModelPath(name)) for name in "ab"]
    planner = RowPlanner(names, maps, torch.arange(5))
    plan = planner.plan(0, {0: 6, 1: 4}, "embed")
    tensor = AlignedTensor(plan, (3,), torch.float32, lambda number: tensors[number])
    for model in (0, 1):
        whole = tensor.whole(model)
        for start in range(7):
            for stop in range(start, 8):
                assert torch.equal(tensor.rows(model, start, stop), whole[start:stop])
        torch.testing.assert_close(whole[6], whole[:5].mean(0))
    delta = AlignedDelta(tensor, 1, 0)
    assert torch.equal(delta.dense(), tensor.whole(1) - tensor.whole(0))
    delta.release()
    assert torch.equal(delta.read(2, 4)[1].view(2, 3), tensors[1][:2].float() - tensors[0][:2])
