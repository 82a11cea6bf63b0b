"""What is beside the tensors: config, tokenizer and vocabulary, as mergekit writes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

import dare_adapters
from tests.conftest import read_checkpoint
from tests.mergekit.models import FAR, llama, save_family
from tests.mergekit.test_methods import FLOAT32, assert_same

pytestmark = [
    pytest.mark.mergekit,
    pytest.mark.filterwarnings("ignore::dare_adapters.recipe.RecipeWarning"),
]

SPECIAL = ["<unk>", "<s>", "</s>"]
CORPUS = ["one two three two one", "the merge of the models", "a token and another token"]
CHAT = ["<|im_start|>", "<|im_end|>"]
TEXTS = [*CORPUS, "<|im_start|>one two<|im_end|>", "</s> three <pause> two"]
TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}{% endfor %}"
)
MESSAGES = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three"}]
# What a tokenizer is made of; the rest of what is written is config.json and tensors.
FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")

TASK = """
merge_method: task_arithmetic
base_model: $base
models:
- {model: $same, parameters: {weight: 0.5}}
- {model: $speaker, parameters: {weight: [0.3, 0.7]}}
"""
COPIED = {
    "whole": """
merge_method: slerp
base_model: $base
models: [{model: $same}]
parameters: {t: 0.4}
""",
    "stacked": """
merge_method: passthrough
base_model: $same
slices:
- sources: [{model: $same, layer_range: [0, 3]}]
- sources: [{model: $base, layer_range: [1, 4]}]
""",
    "rounded": """
merge_method: linear
base_model: $base
models: [{model: $base, parameters: {weight: 1}}, {model: $same, parameters: {weight: 2}}]
dtype: float32
out_dtype: bfloat16
""",
}
ALIGNED = {
    "union": TASK + "tokenizer_source: union\n",
    "base": TASK + "tokenizer: {source: base}\n",
    "of_a_model": TASK + "tokenizer_source: $speaker\n",
    "padded": TASK + "tokenizer: {source: union, pad_to_multiple_of: 64}\n",
    "rules": TASK
    + """
tokenizer:
  source: union
  tokens:
    <|im_start|>: {source: $speaker}
    <|im_end|>: {source: $speaker, force: true}
    <pause>: {source: {kind: zero}}
    <turn>: {source: {kind: model_token, model: $base, token: "</s>"}}
    <again>: {source: {kind: model_token, model: $same, token_id: 4}, force: true}
""",
    "templated": TASK + "tokenizer_source: union\nchat_template: chatml\n",
    "templated_by_plurality": TASK + "tokenizer_source: union\nchat_template: auto\n",
    "linear_union": """
merge_method: linear
base_model: $base
models: [{model: $base, parameters: {weight: 1}}, {model: $speaker, parameters: {weight: 2}}]
tokenizer_source: union
""",
    "slerp_union": """
merge_method: slerp
base_model: $base
models: [{model: $speaker}]
parameters: {t: 0.4}
tokenizer_source: union
""",
    "ties_union": """
merge_method: ties
base_model: $base
models:
- {model: $same, parameters: {weight: 1, density: 0.6}}
- {model: $speaker, parameters: {weight: 0.5, density: 0.4}}
tokenizer_source: union
""",
    "stacked_union": """
merge_method: passthrough
base_model: $base
slices:
- sources: [{model: $base, layer_range: [0, 3]}]
- sources: [{model: $speaker, layer_range: [1, 4]}]
tokenizer_source: union
""",
}


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> dict[str, Path]:
    """A base, a fine-tune of its vocabulary, and one that learnt two tokens."""
    root = tmp_path_factory.mktemp("speakers")
    size = len(_tokenizer())
    paths = save_family(root, "", llama(vocab_size=size), {"same": FAR})
    paths["speaker"] = save_family(root / "x", "", llama(vocab_size=size + 2), {"a": FAR})["a"]
    for name, path in paths.items():
        tokenizer = _tokenizer(CHAT if name == "speaker" else ())
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(path)
        temperature = {"base": 0.5, "same": 0.6, "speaker": 0.7}[name]
        GenerationConfig(do_sample=True, temperature=temperature).save_pretrained(path)
    return paths


def _tokenizer(added: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    core = Tokenizer(tokenizer_models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=60, special_tokens=SPECIAL))
    found = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    found.add_tokens(list(added), special_tokens=True)
    return found


@pytest.fixture(scope="module")
def outs(mergekit, families, write_recipes, tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Recipe -> our directory and mergekit's."""
    root = tmp_path_factory.mktemp("directories")
    files = write_recipes({**COPIED, **ALIGNED}, families)
    theirs = mergekit.merge(files)
    return {
        name: (dare_adapters.merge(file, root / name, progress=False), theirs[name])
        for name, file in files.items()
    }


def read_config(directory: Path) -> dict[str, object]:
    config = AutoConfig.from_pretrained(directory).to_dict()
    return {key: config[key] for key in set(config) - {"_name_or_path", "transformers_version"}}


@pytest.mark.parametrize("name", [*COPIED, *ALIGNED])
def test_the_config_is_that_of_mergekit(name, outs):
    ours, theirs = outs[name]
    assert read_config(ours) == read_config(theirs)


@pytest.mark.parametrize("name", COPIED)
def test_tokenizer_files_are_copied_byte_for_byte_from_the_same_model(name, outs):
    ours, theirs = outs[name]
    for file in FILES:
        assert (ours / file).read_bytes() == (theirs / file).read_bytes(), file


@pytest.mark.parametrize("name", [*COPIED, *ALIGNED])
def test_nothing_is_left_out_that_mergekit_writes(name, outs):
    ours, theirs = outs[name]
    written = {file.name for file in theirs.iterdir()} - {"README.md", "mergekit_config.yml"}
    assert written <= {file.name for file in ours.iterdir()}


@pytest.mark.parametrize("name", ALIGNED)
def test_a_vocabulary_is_made_as_mergekit_makes_it(name, outs):
    ours, theirs = (AutoTokenizer.from_pretrained(out) for out in outs[name])
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.special_tokens_map == theirs.special_tokens_map
    for text in TEXTS:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.apply_chat_template(MESSAGES, tokenize=False) == theirs.apply_chat_template(
        MESSAGES, tokenize=False
    )


@pytest.mark.parametrize("name", [name for name in [*COPIED, *ALIGNED] if name != "rounded"])
def test_rows_are_those_of_their_tokens_as_in_mergekit(name, outs):
    ours, theirs = outs[name]
    assert_same(read_checkpoint(ours), read_checkpoint(theirs), FLOAT32)


@pytest.mark.parametrize("name", [*COPIED, *ALIGNED])
def test_the_models_that_load_say_the_same(name, outs):
    tokens = AutoTokenizer.from_pretrained(outs[name][0])("one two three", return_tensors="pt")
    with torch.inference_mode():
        ours, theirs = (
            AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()(**tokens).logits
            for out in outs[name]
        )
    tolerance = 0.02 if name == "rounded" else 1e-4
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()
