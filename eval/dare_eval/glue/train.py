"""Full fine-tunes on GLUE with transformers' Trainer: one task, or several over one encoder."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from dare_adapters.errors import CheckpointError, DareError
from dare_adapters.output import complete_directory
from dare_eval.glue.data import Row, hold_out, limited
from dare_eval.glue.tasks import Task

__all__ = [
    "TRAINING_FILE",
    "SharedEncoder",
    "TrainingSettings",
    "load_classifier",
    "load_tokenizer",
    "train",
]

TRAINING_FILE = "dare_eval_training.json"
"""In a fine-tune's directory: how it was made."""


@dataclass(frozen=True)
class TrainingSettings:
    """How a fine-tune is made; the defaults are MergeLM's for RoBERTa-base.

    Attributes:
        learning_rate: of AdamW; None: the task's own (of several tasks, the least).
        warmup: share of the steps over which the rate rises; then it falls linearly.
        train_rows: at most so many of each task, drawn at random; None: all.
        held_out: rows of each task's training data that are not trained on: hyper-parameters are
            chosen on them.
        group_by_length: batches of rows of similar length, which pads less.
        start_from: a fine-tune of the same base on another task, whose encoder training starts
            from in place of the base's (intermediate-task training, Phang et al. 2018; RoBERTa's
            RTE is made so from MNLI).
    """

    epochs: float = 10
    batch_size: int = 16
    max_length: int = 128
    learning_rate: float | None = None
    warmup: float = 0.06
    weight_decay: float = 0.01
    seed: int = 0
    train_rows: int | None = None
    held_out: int = 256
    group_by_length: bool = False
    start_from: str | None = None

    def resolved(self, tasks: Sequence[Task]) -> TrainingSettings:
        """With the learning rate that these tasks are trained with."""
        if self.learning_rate is not None:
            return self
        return replace(self, learning_rate=min(task.learning_rate for task in tasks))

    @property
    def reduced(self) -> dict[str, list[Any]]:
        """Settings that differ from MergeLM's: name -> [MergeLM's, here]."""
        paper = TrainingSettings(held_out=0)
        return {
            name: [getattr(paper, name), value]
            for name, value in asdict(self).items()
            if value != getattr(paper, name) and name != "seed"
        }


class SharedEncoder(nn.Module):
    """Classifiers that share one encoder, each with its own head.

    Args:
        classifiers: by task, of one architecture; the first one's encoder becomes everyone's.
    """

    def __init__(self, classifiers: Mapping[str, PreTrainedModel]) -> None:
        super().__init__()
        first = next(iter(classifiers.values()))
        for classifier in classifiers.values():
            setattr(classifier, classifier.base_model_prefix, first.base_model)
        self.names = list(classifiers)
        self.classifiers = nn.ModuleDict(classifiers)

    def forward(
        self, tasks: torch.Tensor, labels: torch.Tensor, inputs: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The loss over a batch whose rows may be of different tasks.

        Args:
            tasks: int64 (rows,), places in `names`.
            labels: float32 (rows,).
            inputs: tokens, (rows, length).
        """
        losses = []
        for place in sorted(set(tasks.tolist())):
            own = tasks == place
            model: Any = self.classifiers[self.names[place]]
            target = labels[own] if model.config.num_labels == 1 else labels[own].long()
            part = {name: tensor[own] for name, tensor in inputs.items()}
            losses.append(model(**part, labels=target).loss * own.sum())
        return {"loss": torch.stack(losses).sum() / len(tasks)}


def train(
    base: str,
    tasks: Mapping[Task, Sequence[Row]],
    out: Path,
    settings: TrainingSettings,
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Fine-tune all parameters; each task becomes a checkpoint OUT/<task>.

    Args:
        base: directory or hub id of an encoder.
        tasks: all training rows of each; one task or several over a shared encoder.
        out: where the checkpoints go, each complete or absent.
        settings: see there.
        overwrite: replace checkpoints that exist.

    Returns:
        What is known of the training: steps, rows, loss, CPU seconds.

    Raises:
        CheckpointError: the base, or what is started from, does not load.
        AdapterExistsError: a checkpoint exists and `overwrite` is not set.
    """
    settings = settings.resolved(list(tasks))
    torch.manual_seed(settings.seed)
    tokenizer = load_tokenizer(base)
    shared = SharedEncoder({task.name: load_classifier(base, task.labels) for task in tasks})
    if settings.start_from is not None:
        _take_encoder(shared, settings.start_from)
    rows = {task: _training_rows(own, settings) for task, own in tasks.items()}
    examples = [
        example
        for place, (task, own) in enumerate(rows.items())
        for example in _tokenised(tokenizer, own, place, settings.max_length)
    ]
    clock = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=shared,
            args=_arguments(scratch, settings),
            train_dataset=examples,
            data_collator=_Collator(tokenizer),
        )
        done = trainer.train()
    found = {
        "steps": done.global_step,
        "rows": {task.name: len(own) for task, own in rows.items()},
        "loss": done.training_loss,
        "cpu_seconds": round(time.process_time() - clock, 1),
    }
    shared.to("cpu")
    for task in tasks:
        with complete_directory(out / task.name, overwrite) as directory:
            model: Any = shared.classifiers[task.name]
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
            about = {"base": base, "tasks": [t.name for t in tasks], **asdict(settings), **found}
            text = json.dumps(about, indent=1) + "\n"
            (directory / TRAINING_FILE).write_text(text, encoding="utf-8")
    return found


def load_classifier(model: str | Path, labels: int) -> Any:
    """A sequence classifier in float32, in eval mode.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    try:
        found = AutoModelForSequenceClassification.from_pretrained(
            model, num_labels=labels, dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{model} does not load as a sequence classifier: {error}") from error
    return found.eval()


def load_tokenizer(model: str | Path) -> Any:
    """A model's tokenizer.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{model} has no tokenizer that loads: {error}") from error


def _take_encoder(shared: SharedEncoder, source: str) -> None:
    """The weights of a fine-tune's encoder; its head is for another task, and stays behind.

    Raises:
        CheckpointError: it has no encoder of the base's kind.
    """
    encoder: Any = next(iter(shared.classifiers.values())).base_model
    try:
        other = AutoModelForSequenceClassification.from_pretrained(source, dtype=torch.float32)
        encoder.load_state_dict(other.base_model.state_dict())
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"training cannot start from {source}: it has no encoder of the base's kind ({error})"
        ) from error


def _training_rows(rows: Sequence[Row], settings: TrainingSettings) -> list[Row]:
    _, rest = hold_out(rows, settings.held_out)
    if not rest:
        raise DareError("there are no rows to train on")
    return limited(rest, settings.train_rows, settings.seed)


def _tokenised(
    tokenizer: Any, rows: Sequence[Row], place: int, max_length: int
) -> list[dict[str, Any]]:
    columns = map(list, zip(*(row.texts for row in rows), strict=True))
    tokens = tokenizer(*columns, truncation=True, max_length=max_length)
    return [
        {**{name: tokens[name][number] for name in tokens}, "task": place, "label": row.label}
        for number, row in enumerate(rows)
    ]


class _Collator:
    """Rows to a batch that is padded to its longest."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        tokens = [{k: v for k, v in row.items() if k not in ("task", "label")} for row in rows]
        return {
            "tasks": torch.tensor([row["task"] for row in rows]),
            "labels": torch.tensor([row["label"] for row in rows], dtype=torch.float32),
            "inputs": dict(self._tokenizer.pad(tokens, return_tensors="pt")),
        }


def _arguments(scratch: str, settings: TrainingSettings) -> TrainingArguments:
    return TrainingArguments(
        output_dir=scratch,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup,  # below 1 it is a share of all steps
        weight_decay=settings.weight_decay,
        seed=settings.seed,
        train_sampling_strategy="group_by_length" if settings.group_by_length else "random",
        remove_unused_columns=False,
        label_names=["labels"],
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        dataloader_pin_memory=False,
    )
