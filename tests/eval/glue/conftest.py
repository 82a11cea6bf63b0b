"""A tiny encoder, tiny GLUE-like data that it can learn, and fine-tunes made by the tool itself."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from dare_eval.glue.tasks import TASKS, Task
from dare_eval.glue.train import TrainingSettings
from dare_eval.glue.training import run_training
from dare_eval.records import Records

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
GOOD, BAD = [f"g{n}" for n in range(8)], [f"b{n}" for n in range(8)]
SETTINGS = TrainingSettings(epochs=6, learning_rate=3e-3, held_out=24, max_length=24)


@dataclass(frozen=True)
class Lab:
    """What the experiments take.

    Attributes:
        base: a bare encoder.
        data: a data directory.
        finetuned: with a folder for each of `tasks`.
        records: of the training.
    """

    base: str
    data: Path
    finetuned: Path
    records: Records
    tasks: tuple[Task, ...]

    def of(self, *names: str) -> dict[Task, str]:
        """Fine-tunes by task."""
        return {TASKS[name]: str(self.finetuned / name) for name in names}


def write_tokenizer(directory: Path) -> None:
    """Words to numbers, with the markers of BERT's pairs."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *GOOD, *BAD])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=24,
    ).save_pretrained(directory)


SIZES = {
    "vocab_size": len(SPECIAL) + len(GOOD) + len(BAD),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 48,
    "pad_token_id": 0,
    "type_vocab_size": 2,
}


def write_rows(file: Path, task: str, count: int, seed: int) -> None:
    """Texts of good and bad words; the label says which are more, of two texts whether alike."""
    generator = random.Random(f"{task}{seed}")
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as lines:
        for number in range(count):
            share = generator.choice((0.1, 0.9))
            texts = [_words(generator, share) for _ in range(len(TASKS[task].columns))]
            label: float = int(share > 0.5)
            if TASKS[task].labels == 1:
                label = 5.0 * label + 0.1 * generator.random()
            row = {"idx": number, "sentence1": texts[0], "label": label}
            lines.write(json.dumps({**row, "sentence2": texts[1]} if texts[1:] else row) + "\n")


def _words(generator: random.Random, share: float) -> str:
    count = generator.randint(3, 7)
    return " ".join(
        generator.choice(GOOD if generator.random() < share else BAD) for _ in range(count)
    )


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for task in ("sst2", "mrpc", "stsb"):
        write_rows(root / "glue" / task / "train.jsonl", task, 120, 0)
        write_rows(root / "glue" / task / "dev.jsonl", task, 60, 1)
    return root


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("models") / "tiny-bert"
    BertModel(BertConfig(**SIZES)).save_pretrained(directory)
    write_tokenizer(directory)
    return str(directory)


@pytest.fixture(scope="session")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> str:
    """With a language modelling head, which its fine-tunes do not have."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("models") / "tiny-roberta"
    RobertaForMaskedLM(RobertaConfig(**SIZES)).save_pretrained(directory)
    write_tokenizer(directory)
    return str(directory)


@pytest.fixture(scope="session")
def lab(bert: str, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    root = tmp_path_factory.mktemp("lab")
    tasks = tuple(TASKS[name] for name in ("sst2", "mrpc", "stsb"))
    records = Records(root / "records")
    run_training(bert, tasks, root / "finetuned", records, SETTINGS, data_dir=data_dir)
    return Lab(bert, data_dir, root / "finetuned", records, tasks)
