"""GLUE's rows, from the hub or from a directory, and which training rows are kept out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from dare_adapters.errors import DareError
from dare_adapters.statistics.data import read_rows as read_from_hub
from dare_eval.errors import DataNotFoundError
from dare_eval.glue.tasks import HUB_DATASET, Task

__all__ = ["Row", "hold_out", "limited", "read_rows"]


@dataclass(frozen=True)
class Row:
    """One example.

    Attributes:
        texts: one or two.
        label: a class's number, or a score (STS-B: 0 … 5).
    """

    texts: tuple[str, ...]
    label: float


def read_rows(task: Task, split: Literal["train", "dev"], data_dir: Path | None) -> list[Row]:
    """All rows of a split.

    Args:
        task: which.
        split: dev is GLUE's validation split (MNLI: matched), whose labels are public.
        data_dir: with glue/<task>/train.jsonl and dev.jsonl (MNLI: dev_matched.jsonl), lines with
            sentence1, perhaps sentence2, and label; None: the hub's data set.

    Raises:
        DataNotFoundError: there is no such file, or the hub cannot be read.
        DareError: a row lacks a text or has a label that the task does not know.
    """
    rows: Sequence[Mapping[str, Any]]
    if data_dir is None:
        columns = task.columns
        where = f"{HUB_DATASET} ({task.name})"
        try:
            rows = read_from_hub(
                HUB_DATASET, task.name, "train" if split == "train" else task.dev[1]
            )
        except DareError as error:
            raise DataNotFoundError(
                f"{task.title}'s {split} rows cannot be had from the hub: {error}. Offline, name "
                "a directory with them (--data-dir)"
            ) from error
    else:
        columns = ("sentence1", "sentence2")[: len(task.columns)]
        file = data_dir / "glue" / task.name / f"{split if split == 'train' else task.dev[0]}.jsonl"
        where = str(file)
        rows = _read_lines(file, task, split)
    return [_row(task, columns, row, where, number) for number, row in enumerate(rows, 1)]


def hold_out(rows: Sequence[Row], count: int) -> tuple[list[Row], list[Row]]:
    """Training rows that hyper-parameters are chosen on, and the rest, to train on.

    Which rows they are depends on their texts alone, not on their order, so that training and
    merging agree on them. At most a quarter of all are held out.
    """
    count = min(count, len(rows) // 4)
    order = sorted(range(len(rows)), key=lambda place: _digest(rows[place]))
    chosen = set(order[:count])
    held_out = [rows[place] for place in order[:count]]
    return held_out, [row for place, row in enumerate(rows) if place not in chosen]


def limited(rows: Sequence[Row], count: int | None, seed: int = 0) -> list[Row]:
    """At most `count` rows, drawn at random where there are more."""
    if count is None or count >= len(rows):
        return list(rows)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return [rows[place] for place in order[:count].tolist()]


def _read_lines(file: Path, task: Task, split: str) -> list[dict[str, Any]]:
    if not file.is_file():
        raise DataNotFoundError(
            f"{file} does not exist, and it should hold {task.title}'s {split} rows as JSON lines; "
            "check --data-dir, leave the task out of --tasks, or leave --data-dir out to use the "
            "hub's data set"
        )
    with file.open(encoding="utf-8") as lines:
        try:
            return [json.loads(line) for line in lines if line.strip()]
        except ValueError as error:
            raise DareError(f"{file} is not JSON lines: {error}") from error


def _row(
    task: Task, columns: tuple[str, ...], row: Mapping[str, Any], where: str, number: int
) -> Row:
    try:
        texts, label = tuple(row[column] for column in columns), row["label"]
    except (KeyError, TypeError) as error:
        raise DareError(f"{where}, row {number}: no {error}; it has {list(row)}") from error
    known = isinstance(label, (int, float)) and (task.labels == 1 or label in range(task.labels))
    if not known or not all(isinstance(text, str) for text in texts):
        raise DareError(
            f"{where}, row {number}: texts {texts!r:.80} and label {label!r:.20}; {task.title} has "
            + ("scores" if task.labels == 1 else f"labels 0 … {task.labels - 1}")
        )
    return Row(texts, label)


def _digest(row: Row) -> bytes:
    return hashlib.sha256("\0".join(row.texts).encode()).digest()
