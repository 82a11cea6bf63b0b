"""The eight GLUE tasks of the paper (Wang et al. 2018; Yu et al. 2024, section 4.1)."""

from __future__ import annotations

from dataclasses import dataclass

import typer

__all__ = ["HUB_DATASET", "TASKS", "Task", "chosen_tasks"]

HUB_DATASET = "nyu-mll/glue"


@dataclass(frozen=True)
class Task:
    """What sets one task apart.

    Attributes:
        name: GLUE's, also the hub data set's config.
        title: as papers write it.
        columns: of texts on the hub; files say sentence1 and sentence2.
        labels: how many classes; 1 is a regression.
        metric: what its score is called.
        learning_rate: MergeLM's for RoBERTa-base.
        dev: the file of its development rows, without the ending, and the hub's split.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    labels: int
    metric: str
    learning_rate: float = 1e-5
    dev: tuple[str, str] = ("dev", "validation")


_PAIR = ("sentence1", "sentence2")
_MNLI_DEV = ("dev_matched", "validation_matched")

TASKS = {
    task.name: task
    for task in (
        Task("cola", "CoLA", ("sentence",), 2, "Matthews correlation"),
        Task("sst2", "SST-2", ("sentence",), 2, "accuracy"),
        Task("mrpc", "MRPC", _PAIR, 2, "mean of accuracy and F1", 5e-5),
        Task("stsb", "STS-B", _PAIR, 1, "mean of Pearson and Spearman correlation"),
        Task("qqp", "QQP", ("question1", "question2"), 2, "mean of accuracy and F1"),
        Task("mnli", "MNLI", ("premise", "hypothesis"), 3, "accuracy", dev=_MNLI_DEV),
        Task("qnli", "QNLI", ("question", "sentence"), 2, "accuracy"),
        Task("rte", "RTE", _PAIR, 2, "accuracy"),
    )
}


def chosen_tasks(names: str) -> list[Task]:
    """Tasks from their names with commas between, or "all"; in the order of TASKS.

    Raises:
        typer.BadParameter: a name is no task, or comes twice.
    """
    chosen = list(TASKS) if names == "all" else [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in TASKS:
            raise typer.BadParameter(f"{name!r} is no task; there are {', '.join(TASKS)}")
    if len(set(chosen)) < len(chosen):
        raise typer.BadParameter(f"a task comes twice in {names!r}")
    return [task for task in TASKS.values() if task.name in chosen]
