"""`dare-eval glue train`: fine-tunes, and what their scores are worth."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from dare_adapters.errors import AdapterExistsError
from dare_eval.glue.bench import TaskBench
from dare_eval.glue.data import hold_out, read_rows
from dare_eval.glue.scoring import majority_scores
from dare_eval.glue.tasks import Task
from dare_eval.glue.train import TRAINING_FILE, TrainingSettings, train
from dare_eval.identity import model_identity
from dare_eval.records import Cell, Records

__all__ = ["run_training"]


def run_training(
    base: str,
    tasks: Sequence[Task],
    out: Path,
    records: Records,
    settings: TrainingSettings,
    *,
    data_dir: Path | None,
    multi_task: bool = False,
    eval_rows: int | None = None,
    device: str | None = None,
    overwrite: bool = False,
) -> None:
    """Train what is not there yet, one task at a time or all at once, and score it on dev rows.

    Beside the fine-tune's score a record has that of the base encoder under the fine-tune's head
    (what the head alone can do) and that of the commonest label.

    Raises:
        AdapterExistsError: OUT has a fine-tune that was made with other settings.
    """
    of_base = model_identity(base)
    start = settings.start_from
    of_start = None if start is None else " ".join(model_identity(start).values())
    for group in [list(tasks)] if multi_task else [[task] for task in tasks]:
        own = settings.resolved(group)
        made = [_made(out / task.name, group, own, overwrite) for task in group]
        if None in made:
            rows = {task: read_rows(task, "train", data_dir) for task in group}
            there = overwrite or any(about is not None for about in made)
            train(base, rows, out, own, overwrite=there)
        cells: list[Cell] = []
        for task in group:
            about = _made(out / task.name, group, own)
            assert about is not None
            told = replace(own, start_from=of_start)  # no path: a record is read elsewhere
            config = {
                "experiment": "glue-train",
                "task": task.name,
                "tasks": [member.name for member in group],
                "method": "multi-task" if multi_task else "single-task",
                "base": of_base,
                "finetuned": model_identity(out / task.name),
                "eval_rows": eval_rows,
                **asdict(told),
            }
            bench = TaskBench(
                base,
                task,
                str(out / task.name),
                data_dir=data_dir,
                eval_rows=eval_rows,
                max_length=own.max_length,
                device=device,
            )
            cells.append((config, partial(_score, bench, told, about, data_dir)))
        records.run_all(cells, f"score {', '.join(task.title for task in group)}")


def _score(
    bench: TaskBench, settings: TrainingSettings, about: Mapping[str, Any], data_dir: Path | None
) -> Mapping[str, Any]:
    own, of_base = bench.measure(bench.delta), bench.measure(None)
    _, trained_on = hold_out(read_rows(bench.task, "train", data_dir), settings.held_out)
    return {
        "score": own["score"],
        "metric": own["metric"],
        "scores": own["scores"],
        "base_encoder": of_base["scores"],
        "majority": majority_scores(bench.evaluation, trained_on),
        "rows": own["rows"],
        "reduced": settings.reduced,
        **{key: about[key] for key in ("steps", "loss", "cpu_seconds")},
        "train_rows": about["rows"][bench.task.name],
    }


def _made(
    directory: Path, group: Sequence[Task], settings: TrainingSettings, overwrite: bool = False
) -> dict[str, Any] | None:
    """What a fine-tune that is there says of its training; None: it is to be made.

    Raises:
        AdapterExistsError: it was made with other settings, and is not to be overwritten.
    """
    if overwrite or not directory.exists():
        return None
    file = directory / TRAINING_FILE
    found: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    wanted = {"tasks": [task.name for task in group], **asdict(settings)}
    if any(found.get(name) != value for name, value in wanted.items()):
        raise AdapterExistsError(
            f"{directory} holds a model that was made with other settings; choose another --out, "
            "or replace it (--force)"
        )
    return found
