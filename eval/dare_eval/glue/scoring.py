"""A classifier's logits on GLUE rows, and the task's metric of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dare_eval.glue.data import Row
from dare_eval.glue.tasks import Task

__all__ = ["Evaluation", "majority_scores"]

METRIC_FILE = Path(__file__).with_name("glue_metric.py")


class Evaluation:
    """Rows of one task, tokenised once and sorted by length, so that little is padded.

    Args:
        task: whose metric is computed.
        rows: to score on.
        tokenizer: of the model.
        max_length: in tokens; longer texts are cut.
        batch_size: rows at a time.
    """

    def __init__(
        self,
        task: Task,
        rows: Sequence[Row],
        tokenizer: Any,
        *,
        max_length: int = 128,
        batch_size: int = 64,
    ) -> None:
        self.task, self.count = task, len(rows)
        rows = sorted(rows, key=lambda row: sum(map(len, row.texts)))
        self.labels = torch.tensor([row.label for row in rows])
        self.batches = [
            tokenizer(
                *map(
                    list, zip(*(row.texts for row in rows[start : start + batch_size]), strict=True)
                ),
                padding=True,
                truncation=True,
                max_length=max_length,
                return_tensors="pt",
            )
            for start in range(0, len(rows), batch_size)
        ]

    def logits(self, model: torch.nn.Module) -> torch.Tensor:
        """What a classifier in eval mode answers, float32 (rows, labels) on the CPU."""
        device = next(model.parameters()).device
        with torch.inference_mode():
            found = [model(**batch.to(device)).logits for batch in self.batches]
        return torch.cat(found).to("cpu", torch.float32)

    def scores(self, logits: torch.Tensor) -> dict[str, float]:
        """The task's metrics of logits (rows, labels); `score` is the one that tables show."""
        predictions = logits[:, 0] if self.task.labels == 1 else logits.argmax(dim=1)
        return self._compute(predictions)

    def _compute(self, predictions: torch.Tensor) -> dict[str, float]:
        found: dict[str, float] = self._metric(
            predictions=predictions.numpy(), references=self.labels.numpy()
        )
        return {name: float(value) for name, value in found.items()}

    @cached_property
    def _metric(self) -> Callable[..., dict[str, float]]:
        import evaluate

        # In memory: two runs at once must not share a file.
        metric = evaluate.load(str(METRIC_FILE), self.task.name, keep_in_memory=True)
        compute: Callable[..., dict[str, float]] = metric.compute
        return compute


def majority_scores(evaluation: Evaluation, train: Sequence[Row]) -> dict[str, float]:
    """What always answering the training data's commonest label scores (STS-B: any constant)."""
    label = Counter(row.label for row in train).most_common(1)[0][0]
    return evaluation._compute(torch.full_like(evaluation.labels, label))
