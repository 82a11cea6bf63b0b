"""`dare-eval glue train`: fine-tunes, and what their scores are worth."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dare_adapters.errors import AdapterExistsError
from dare_eval.glue.data import hold_out, limited, read_rows
from dare_eval.glue.encoder import GlueEncoder
from dare_eval.glue.scoring import Evaluation, majority_scores
from dare_eval.glue.tasks import Task
from dare_eval.glue.train import TRAINING_FILE, TrainingSettings, load_tokenizer, train
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
    overwrite: bool = False,
) -> None:
    """Train what is not there yet, one task at a time or all at once, and score it on dev rows.

    Beside the fine-tune's score a record has that of the base encoder under the fine-tune's head
    (what the head alone can do) and that of the commonest label.

    Raises:
        AdapterExistsError: OUT has a fine-tune that was made with other settings.
    """
    of_base = model_identity(base)
    groups = [list(tasks)] if multi_task else [[task] for task in tasks]
    cells: list[Cell] = []
    for group in groups:
        own = settings.resolved(group)
        for task in group:
            config = {
                "experiment": "glue-train",
                "task": task.name,
                "tasks": [member.name for member in group],
                "method": "multi-task" if multi_task else "single-task",
                "base": of_base,
                "eval_rows": eval_rows,
                **asdict(own),
            }
            cells.append(
                (config, _cell(base, task, group, out, own, data_dir, eval_rows, overwrite))
            )
    records.run_all(cells, "train")


def _cell(
    base: str,
    task: Task,
    group: Sequence[Task],
    out: Path,
    settings: TrainingSettings,
    data_dir: Path | None,
    eval_rows: int | None,
    overwrite: bool,
) -> Callable[[], Mapping[str, Any]]:
    def run() -> Mapping[str, Any]:
        made = _made(out / task.name, group, settings)
        if made is None or overwrite:
            rows = {member: read_rows(member, "train", data_dir) for member in group}
            train(base, rows, out, settings, overwrite=overwrite)
            made = _made(out / task.name, group, settings)
        assert made is not None
        finetuned = out / task.name
        encoder = GlueEncoder(base, {task: finetuned})
        evaluation = Evaluation(
            task,
            limited(read_rows(task, "dev", data_dir), eval_rows),
            load_tokenizer(finetuned),
            max_length=settings.max_length,
        )
        of_base = evaluation.scores(evaluation.logits(encoder.model(task.name)))
        with encoder.wearing(encoder.deltas[task.name]):
            own = evaluation.scores(evaluation.logits(encoder.model(task.name)))
        _, trained_on = hold_out(read_rows(task, "train", data_dir), settings.held_out)
        return {
            "score": own["score"],
            "metric": task.metric,
            "scores": own,
            "base_encoder": of_base,
            "majority": majority_scores(evaluation, trained_on),
            "rows": evaluation.count,
            "finetuned": model_identity(finetuned),
            "reduced": settings.reduced,
            **{key: made[key] for key in ("steps", "loss", "cpu_seconds")},
            "train_rows": made["rows"][task.name],
        }

    return run


def _made(
    directory: Path, group: Sequence[Task], settings: TrainingSettings
) -> dict[str, Any] | None:
    """What a fine-tune that is there says of its training; None: there is none."""
    if not directory.exists():
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
