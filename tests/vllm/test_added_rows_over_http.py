"""Added tokens over HTTP: as text, by a tokenizer that knows them, for whoever has them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from tests.conftest import Pack
from tests.vllm.dense_models import add_densely
from tests.vllm.engines import assert_says_the_same
from tests.vllm.grown import extract_grown, grow
from tests.vllm.server import Server

pytest.importorskip("vllm", reason="needs the environment of make test-vllm")
openai = pytest.importorskip("openai")
pytestmark = pytest.mark.vllm

WORDS = {f"w{number}": number for number in range(97)}
CALLS = ["<call>", "</call>", "<end>"]
TEXT, IDS = "w5 w9 <call> w33", [5, 9, 97, 33]


@pytest.fixture(scope="module")
def tools(pack: Pack, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of a fine-tune that has three tokens more, and a tokenizer that knows them."""
    root = tmp_path_factory.mktemp("tools")
    grow(pack, "a", len(CALLS), root)
    words = Tokenizer(WordLevel(WORDS, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w2")
    tokenizer.add_tokens(CALLS, special_tokens=True)
    tokenizer.save_pretrained(root / "finetuned")
    extract_grown(pack, root / "finetuned", root / "with-tokenizer")
    return root / "with-tokenizer"


@pytest.fixture(scope="module")
def server(pack: Pack, tools: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`dare-adapters serve`, which makes room for what its adapters add."""
    found = Server(
        tmp_path_factory.mktemp("server"),
        pack.base,
        *(f"tools={tools}", f"plain={pack.adapters['b']}"),
        *("--tokenizer", tools, "--served-model-name", "base"),
        *("--max-model-len", 256, "--num-gpu-blocks-override", 64),
    )
    yield found
    found.close()


def test_text_with_added_tokens_is_understood_and_they_come_back_as_text(
    server: Server, pack: Pack, tools: Path
) -> None:
    model = add_densely(pack, {tools: 1.0})
    answer = server.greedy("tools", TEXT, 12)
    assert_says_the_same([answer], model, [IDS])
    again = server.greedy("tools", IDS, 12)
    assert again.tokens == answer.tokens
    words = [*WORDS, *CALLS]
    assert answer.text.split() == [words[token] for token in answer.tokens]
    assert any(token >= 97 for token in answer.tokens)


@pytest.mark.parametrize("model", ["base", "plain"])
def test_nobody_else_may_name_them_and_that_is_a_400(server: Server, model: str) -> None:
    for prompt in (TEXT, IDS):
        with pytest.raises(openai.BadRequestError, match="token 97 is out of vocabulary"):
            server.greedy(model, prompt)
    answer = server.greedy(model, "w5 w9", 12)
    assert max(answer.tokens) < 97
    assert "<" not in answer.text


def test_the_base_and_others_are_answered_as_ever(server: Server, pack: Pack) -> None:
    plain = add_densely(pack, {pack.adapters["b"]: 1.0})
    for name, model in (("base", pack.live(torch.float32)), ("plain", plain)):
        assert_says_the_same([server.greedy(name, [1, 5, 9])], model, [[1, 5, 9]])
