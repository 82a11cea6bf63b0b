"""`dare-eval glue merge`: fine-tunes of several tasks in one encoder (Yu et al. 2024, section 4.3).

Each task keeps its own head. Options of a method are chosen on rows of each task's training data
that `dare-eval glue train` kept out, by the mean of the scores, each as a part of the single
model's; dev rows are read for nothing but the final scores. (MergeLM's own search chooses on the
rows that it reports.)
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from dare_adapters.combine import get_method
from dare_adapters.statistics import diagonal_fisher, gram_matrices
from dare_adapters.statistics.data import Batches
from dare_eval.glue.bench import training_of
from dare_eval.glue.data import Row, hold_out, limited, read_rows
from dare_eval.glue.encoder import GlueEncoder
from dare_eval.glue.scoring import Evaluation
from dare_eval.glue.tasks import Task
from dare_eval.glue.train import TrainingSettings, load_tokenizer
from dare_eval.identity import model_identity
from dare_eval.records import Cell, Record, Records

__all__ = ["METHODS", "OTHER_METHODS", "MergeAxes", "MergeBench", "mean_share", "run_merge"]

EXPERIMENT, CHOICE = "glue-merge", "glue-merge-choice"

METHODS: dict[str, list[dict[str, Any]]] = {
    "average": [{}],
    "task_arithmetic": [{"lambda_": scale} for scale in (0.3, 0.5, 0.7, 1.0)],
    "fisher": [{"normalize": True}, {"normalize": False}],
    "regmean": [{"reduce_non_diagonal": share} for share in (0.7, 0.9, 1.0)],
    "ties": [
        {"density": density, "trim_scope": "model", "lambda_": scale}
        for density in (0.2, 0.3)
        for scale in (0.5, 1.0)
    ],
}
"""The options that each of the paper's methods chooses among."""

OTHER_METHODS: dict[str, list[dict[str, Any]]] = {
    "breadcrumbs": [
        {"density": density, "lambda_": scale} for density in (0.15, 0.9) for scale in (0.5, 1.0)
    ],
    "breadcrumbs_ties": [
        {"density": density, "lambda_": scale} for density in (0.15, 0.9) for scale in (0.5, 1.0)
    ],
    "magnitude_prune": [{"density": 0.3, "lambda_": scale} for scale in (0.3, 0.5, 1.0)],
    "della": [{"density": 0.3, "lambda_": scale} for scale in (0.3, 0.5, 1.0)],
    "della_linear": [{"density": 0.3, "lambda_": scale} for scale in (0.3, 0.5, 1.0)],
    "sce": [
        {"select_topk": share, "lambda_": scale}
        for share, scale in ((0.3, 1.0), (1.0, 0.5), (1.0, 0.7), (1.0, 1.0))
    ],
    "slerp": [{}],
    "nuslerp": [{"on_deltas": True}, {"on_deltas": False}],
    "karcher": [{}],
    "model_stock": [{"filter_wise": False}, {"filter_wise": True}],
    "widen": [{"score_calibration_value": value} for value in (0.5, 1.0)],
}
"""Those of methods that came after it."""

RANDOM = ("della", "della_linear")  # without DARE before them


@dataclass(frozen=True)
class MergeAxes:
    """What is merged, and how.

    Attributes:
        methods: combination types, each with the options to choose among.
        sizes: how many tasks are merged: 2 is every pair, None all at once.
        dare: whether each method runs without DARE, with it, or both.
        drop_rates: of DARE; chosen together with the options.
        seeds: of masks; the first is the one that options are chosen with.
        selection_rows: held-out training rows of each task that options are chosen on.
        statistics_rows: training rows of each task for Fisher information and Gram matrices.
    """

    methods: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=lambda: METHODS)
    sizes: Sequence[int | None] = (2, None)
    dare: Sequence[bool] = (False, True)
    drop_rates: Sequence[float] = (0.5, 0.9)
    seeds: Sequence[int] = (0, 1, 2)
    selection_rows: int = 256
    statistics_rows: int = 256

    def candidates(self, method: str, dare: bool) -> list[dict[str, Any]]:
        """Options, with DARE also its drop rate."""
        options = [dict(given) for given in self.methods[method]]
        if not dare:
            return options
        return [
            {**given, "prune": "dare", "drop_rate": rate}
            for rate in self.drop_rates
            for given in options
        ]

    def groups(self, tasks: Sequence[str]) -> list[tuple[str, ...]]:
        """The sets of tasks to merge."""
        sizes = dict.fromkeys(len(tasks) if size is None else size for size in self.sizes)
        return [group for size in sizes if size > 1 for group in combinations(tasks, size)]


class MergeBench:
    """One live base encoder, every task's delta and head, and its rows; loaded when needed.

    Args:
        base: directory or hub id.
        finetuned: of two tasks or more.
        data_dir: as `read_rows` takes it.
        eval_rows: dev rows of each task at most.
        max_length: in tokens.
        device: where to compute; default: a GPU if there is one.

    Attributes:
        held_out: training rows that each fine-tune did not see; 0: it may have seen them all.
    """

    def __init__(
        self,
        base: str,
        finetuned: Mapping[Task, str],
        *,
        data_dir: Path | None,
        eval_rows: int | None = None,
        max_length: int = 128,
        device: str | None = None,
    ) -> None:
        self.device = device
        self.base, self.tasks = base, {task.name: task for task in finetuned}
        self.finetuned = {task.name: path for task, path in finetuned.items()}
        self.eval_rows, self.max_length, self._data_dir = eval_rows, max_length, data_dir
        self.identity = {name: model_identity(path) for name, path in self.finetuned.items()}
        self.of_base = model_identity(base)
        self.held_out = {n: training_of(p).get("held_out", 0) for n, p in self.finetuned.items()}
        self._statistics: dict[tuple[str, str, int], dict[str, torch.Tensor]] = {}
        self._evaluations: dict[tuple[str, int | None], Evaluation] = {}

    @cached_property
    def encoder(self) -> GlueEncoder:
        """The base's encoder under all heads."""
        finetuned = {self.tasks[name]: path for name, path in self.finetuned.items()}
        return GlueEncoder(self.base, finetuned, self.device)

    def score(self, task: str, selection_rows: int | None = None) -> float:
        """A task's score with the encoder as it is now: on dev rows, or on so many held-out ones.

        Args:
            task: its name.
            selection_rows: of the training data; None: dev.
        """
        evaluation = self._evaluation(task, selection_rows)
        return evaluation.scores(evaluation.logits(self.encoder.model(task)))["score"]

    def merged(
        self, group: Sequence[str], method: str, options: Mapping[str, Any], rows: int, seed: int
    ) -> Any:
        """The encoder with these tasks merged, as a context."""
        kind = get_method(method).statistics
        given = dict(options)
        if kind is not None:
            given["statistics"] = [self.statistics(kind, task, rows) for task in group]
        return self.encoder.merged(group, method, seed=seed, **given)

    def statistics(self, kind: str, task: str, rows: int) -> dict[str, torch.Tensor]:
        """A fine-tune's Fisher information or Gram matrices, on rows that it was trained on."""
        key = (kind, task, rows)
        if key not in self._statistics:
            _, trained_on = self._training_rows(task)
            own = self.encoder.deltas[task]
            batches = Batches(
                [_columns(row) for row in limited(trained_on, rows)],
                load_tokenizer(self.finetuned[task]),
                text_column="text",
                second_text_column="second" if len(self.tasks[task].columns) > 1 else None,
                label_column="label",
                with_labels=True,
                examples=rows,
                max_length=self.max_length,
            )
            compute: Any = {"fisher": diagonal_fisher, "gram": gram_matrices}[kind]
            with self.encoder.wearing(own):
                found = compute(self.encoder.classifiers[task], batches, names=list(own))
            self._statistics[key] = found
        return self._statistics[key]

    def _evaluation(self, task: str, selection_rows: int | None) -> Evaluation:
        key = (task, selection_rows)
        if key not in self._evaluations:
            if selection_rows is None:
                rows = limited(read_rows(self.tasks[task], "dev", self._data_dir), self.eval_rows)
            else:
                rows = self._training_rows(task)[0][:selection_rows]
            self._evaluations[key] = Evaluation(
                self.tasks[task],
                rows,
                load_tokenizer(self.finetuned[task]),
                max_length=self.max_length,
            )
        return self._evaluations[key]

    def _training_rows(self, task: str) -> tuple[list[Row], list[Row]]:
        """Held-out rows, and the others. Of a fine-tune that kept none out, any will do."""
        held_out = self.held_out[task] or TrainingSettings().held_out
        return hold_out(read_rows(self.tasks[task], "train", self._data_dir), held_out)


def run_merge(bench: MergeBench, records: Records, axes: MergeAxes) -> None:
    """Choose each method's options on training rows, then score what was chosen on dev rows."""
    singles = records.run_all(_single_cells(bench, axes), "single models")
    of_single = {
        record.config["task"]: record.result["selection_score"]
        for record in singles
        if record.config["method"] == "finetuned"
    }
    choices = records.run_all(_choice_cells(bench, axes, of_single), "choose options")
    records.run_all(_merge_cells(bench, axes, choices), "merge")


def _single_cells(bench: MergeBench, axes: MergeAxes) -> Iterator[Cell]:
    for task in bench.tasks:
        for method in ("finetuned", "base_encoder"):
            config = {
                **_config(bench, EXPERIMENT, [task], method),
                "task": task,
                "selection_rows": axes.selection_rows,
            }
            yield config, _single(bench, task, method, axes.selection_rows)


def _single(
    bench: MergeBench, task: str, method: str, selection_rows: int
) -> Callable[[], Mapping[str, Any]]:
    def scores() -> dict[str, Any]:
        return {
            "score": bench.score(task),
            "metric": bench.tasks[task].metric,
            "selection_score": bench.score(task, selection_rows),
        }

    def run() -> Mapping[str, Any]:
        if method == "base_encoder":
            return scores()
        with bench.encoder.wearing(bench.encoder.deltas[task]):
            return scores()

    return run


def _choice_cells(
    bench: MergeBench, axes: MergeAxes, singles: Mapping[str, float]
) -> Iterator[Cell]:
    for group in axes.groups(list(bench.tasks)):
        for method in axes.methods:
            for dare in axes.dare:
                candidates = axes.candidates(method, dare)
                config = {
                    **_config(bench, CHOICE, group, method),
                    "dare": dare,
                    "candidates": candidates,
                    "selection_rows": axes.selection_rows,
                    "statistics_rows": axes.statistics_rows,
                    "seed": axes.seeds[0],
                }
                del config["eval_rows"]  # the choice knows nothing of dev rows
                yield config, _choice(bench, axes, group, method, candidates, singles)


def _choice(
    bench: MergeBench,
    axes: MergeAxes,
    group: Sequence[str],
    method: str,
    candidates: Sequence[Mapping[str, Any]],
    singles: Mapping[str, float],
) -> Callable[[], Mapping[str, Any]]:
    def run() -> Mapping[str, Any]:
        if len(candidates) == 1:
            return {"chosen": candidates[0], "shares": []}
        shares = []
        for options in candidates:
            with bench.merged(group, method, options, axes.statistics_rows, axes.seeds[0]):
                scores = {task: bench.score(task, axes.selection_rows) for task in group}
            shares.append(mean_share(scores, singles))
        return {"chosen": candidates[shares.index(max(shares))], "shares": shares}

    return run


def _merge_cells(bench: MergeBench, axes: MergeAxes, choices: Sequence[Record]) -> Iterator[Cell]:
    for choice in choices:
        group, method = choice.config["tasks"], choice.config["method"]
        options = choice.result["chosen"]
        random = choice.config["dare"] or method in RANDOM
        for seed in axes.seeds if random else [None]:
            config = {
                **_config(bench, EXPERIMENT, group, method),
                "dare": choice.config["dare"],
                "options": options,
                "statistics_rows": axes.statistics_rows,
                "seed": seed,
            }
            yield config, _merge(bench, axes, group, method, options, seed)


def _merge(
    bench: MergeBench,
    axes: MergeAxes,
    group: Sequence[str],
    method: str,
    options: Mapping[str, Any],
    seed: int | None,
) -> Callable[[], Mapping[str, Any]]:
    def run() -> Mapping[str, Any]:
        with bench.merged(group, method, options, axes.statistics_rows, seed or 0):
            scores = {task: bench.score(task) for task in group}
        return {"score": statistics.mean(scores.values()), "metric": "mean score", "scores": scores}

    return run


def mean_share(scores: Mapping[str, float], singles: Mapping[str, float]) -> float:
    """Mean of the tasks' scores, each as a part of its single model's.

    A single model that scores 0 or less is no unit: there the scores themselves are taken.
    """
    return statistics.mean(
        score / singles[task] if singles[task] > 0 else score for task, score in scores.items()
    )


def _config(
    bench: MergeBench, experiment: str, group: Sequence[str], method: str
) -> dict[str, Any]:
    return {
        "experiment": experiment,
        "tasks": list(group),
        "method": method,
        "base": bench.of_base,
        "finetuned": {task: bench.identity[task] for task in group},
        "held_out": {task: bench.held_out[task] for task in group},
        "eval_rows": bench.eval_rows,
        "max_length": bench.max_length,
    }


def _columns(row: Row) -> dict[str, Any]:
    second = {"second": row.texts[1]} if len(row.texts) > 1 else {}
    return {"text": row.texts[0], **second, "label": row.label}
