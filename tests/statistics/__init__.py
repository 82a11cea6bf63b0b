"""Statistics of adapters: small models, small data, and words to make texts of."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tests.conftest import tiny_llama

WORDS = ["the", "a", "cat", "dog", "runs", "sleeps", "eats", "fast", "slowly"]
WORDS += ["good", "bad", "film", "story", "on", "under", "red", "blue"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def bert_config(**changes: object) -> BertConfig:
    settings = {"vocab_size": 30, "intermediate_size": 24, "max_position_embeddings": 40}
    return BertConfig(**{**SMALL, **settings, "num_labels": 3, **changes})


def lively(model: PreTrainedModel) -> PreTrainedModel:
    """Far from its initialisation, where probabilities are all alike and biases zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def bert(**changes: object) -> PreTrainedModel:
    return lively(BertForSequenceClassification(bert_config(**changes)))


def llama(**changes: object) -> PreTrainedModel:
    settings = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24}
    return lively(
        LlamaForCausalLM(
            tiny_llama(
                **{**settings, "num_hidden_layers": 1, "num_attention_heads": 2, **changes},
            )
        )
    )


def gpt2() -> PreTrainedModel:
    return lively(
        GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=16, n_layer=1, n_head=2, n_positions=40))
    )


def token_batches(
    count: int, size: int, length: int = 7, labels: int | None = 3, seed: int = 0
) -> list[dict[str, torch.Tensor]]:
    """Batches of random tokens, each row padded on the right by a number of its own.

    `labels` is the number of classes, 1 for regression, None for no labels.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        tokens = torch.randint(4, 30, (size, length), generator=generator)
        real = torch.randint(3, length + 1, (size, 1), generator=generator)
        mask = (torch.arange(length) < real).long()
        batch = {"input_ids": tokens * mask, "attention_mask": mask}
        if labels == 1:
            batch["labels"] = torch.randn(size, generator=generator)
        elif labels is not None:
            batch["labels"] = torch.randint(labels, (size,), generator=generator)
        found.append(batch)
    return found


def save_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, for 30 tokens."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )
    tokenizer.save_pretrained(directory)
    return tokenizer


def texts(count: int, seed: int = 0) -> list[str]:
    """Sentences of two to nine words."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        length = int(torch.randint(2, 10, (), generator=generator))
        numbers = torch.randint(len(WORDS), (length,), generator=generator).tolist()
        found.append(" ".join(WORDS[number] for number in numbers))
    return found
