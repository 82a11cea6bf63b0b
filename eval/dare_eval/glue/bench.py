"""What one task's fine-tune keeps of its answers under any source of deltas."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dare_adapters.source import DeltaSource
from dare_eval.errors import DataNotFoundError
from dare_eval.glue.data import limited, read_rows
from dare_eval.glue.encoder import GlueEncoder
from dare_eval.glue.scoring import Evaluation
from dare_eval.glue.tasks import TASKS, Task
from dare_eval.glue.train import TRAINING_FILE, load_tokenizer
from dare_eval.identity import model_identity

__all__ = ["TaskBench", "find_finetuned", "training_of"]


class TaskBench:
    """A base, one fine-tune of it, and dev rows; nothing is loaded before it is needed.

    Args:
        base: directory or hub id.
        task: of the fine-tune.
        finetuned: directory or hub id.
        data_dir: as `read_rows` takes it.
        eval_rows: dev rows at most.
        max_length: in tokens.
        device: where to compute; default: a GPU if there is one.

    Attributes:
        config: what every cell's config says of these.
    """

    def __init__(
        self,
        base: str,
        task: Task,
        finetuned: str,
        *,
        data_dir: Path | None,
        eval_rows: int | None = None,
        max_length: int = 128,
        device: str | None = None,
    ) -> None:
        self.base, self.task, self.finetuned, self.device = base, task, finetuned, device
        self.config: dict[str, Any] = {
            "task": task.name,
            "base": model_identity(base),
            "finetuned": model_identity(finetuned),
            "eval_rows": eval_rows,
            "max_length": max_length,
        }
        self._data_dir = data_dir

    @cached_property
    def encoder(self) -> GlueEncoder:
        """The base's encoder under the fine-tune's head."""
        return GlueEncoder(self.base, {self.task: self.finetuned}, self.device)

    @property
    def delta(self) -> DeltaSource:
        """Fine-tune minus base of the encoder."""
        return self.encoder.deltas[self.task.name]

    @cached_property
    def evaluation(self) -> Evaluation:
        """The dev rows."""
        return Evaluation(
            self.task,
            limited(read_rows(self.task, "dev", self._data_dir), self.config["eval_rows"]),
            load_tokenizer(self.finetuned),
            max_length=self.config["max_length"],
        )

    def measure(self, source: DeltaSource | None) -> dict[str, Any]:
        """The scores of the encoder with a source's deltas; None: as the base has it.

        Returns:
            `score`, `metric`, `scores`, `rows`, and `error`: the squared change of the logits from
            the fine-tune's over the squared change that fine-tuning made.
        """
        logits = self._base_logits if source is None else self._logits(source)
        scores = self.evaluation.scores(logits)
        change = (self._base_logits - self._finetuned_logits).double().square().sum()
        left = (logits - self._finetuned_logits).double().square().sum()
        return {
            "score": scores["score"],
            "metric": self.task.metric,
            "scores": scores,
            "error": float(left / change) if change > 0 else 0.0,
            "rows": self.evaluation.count,
        }

    def _logits(self, source: DeltaSource) -> torch.Tensor:
        with self.encoder.wearing(source):
            return self.evaluation.logits(self.encoder.model(self.task.name))

    @cached_property
    def _finetuned_logits(self) -> torch.Tensor:
        return self._logits(self.delta)

    @cached_property
    def _base_logits(self) -> torch.Tensor:
        return self.evaluation.logits(self.encoder.model(self.task.name))


def find_finetuned(given: list[str]) -> dict[Task, str]:
    """Fine-tunes by task, from TASK=MODEL and from directories with a folder for each task.

    Raises:
        DataNotFoundError: a directory holds no task's fine-tune.
        ValueError: a task is given twice, or is none.
    """
    found: dict[Task, str] = {}
    for item in given:
        name, equals, model = item.partition("=")
        if equals:
            if name not in TASKS or not model:
                raise ValueError(f"{item!r} is not TASK=MODEL, TASK one of {', '.join(TASKS)}")
            own = {TASKS[name]: model}
        else:
            own = {
                task: str(Path(item) / task.name)
                for task in TASKS.values()
                if (Path(item) / task.name / "config.json").is_file()
            }
            if not own:
                raise DataNotFoundError(
                    f"{item} has no folder such as sst2 with a fine-tune in it; make them with "
                    "`dare-eval glue train`, or name them as TASK=MODEL"
                )
        for task in own:
            if task in found:
                raise ValueError(f"{task.name} has two fine-tunes: {found[task]} and {own[task]}")
        found.update(own)
    # In one order, however they are given: a merge of the same tasks is the same cell.
    return {task: found[task] for task in TASKS.values() if task in found}


def training_of(finetuned: str) -> Mapping[str, Any]:
    """What `dare-eval glue train` says of a fine-tune it made; nothing of another."""
    file = Path(finetuned) / TRAINING_FILE
    found: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    return found
