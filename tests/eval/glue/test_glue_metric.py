"""The metric script, through `evaluate` and offline, against the formulas written out."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import dare_eval.glue
from dare_eval.glue.tasks import TASKS

FILE = Path(dare_eval.glue.__file__).with_name("glue_metric.py")
LABELS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40)


@cache
def metric(task: str) -> Any:
    return evaluate.load(str(FILE), task, keep_in_memory=True)


def scores(task: str, predictions: list[Any], references: list[Any]) -> dict[str, float]:
    return dict(metric(task).compute(predictions=predictions, references=references))


def counts(pairs: list[tuple[int, int]]) -> tuple[int, int, int, int]:
    """True positives, false positives, false negatives, true negatives of (predicted, right)."""
    return tuple(pairs.count(kind) for kind in ((1, 1), (1, 0), (0, 1), (0, 0)))  # type: ignore[return-value]


@settings(max_examples=15, deadline=None)
@given(LABELS)
def test_accuracy_and_f1_are_their_formulas(pairs: list[tuple[int, int]]):
    hit, extra, missed, rest = counts(pairs)
    accuracy = (hit + rest) / len(pairs)
    f1 = 2 * hit / (2 * hit + extra + missed) if hit else 0.0
    columns = [list(column) for column in zip(*pairs, strict=True)]
    assert scores("sst2", *columns) == pytest.approx({"accuracy": accuracy, "score": accuracy})
    for task in ("mrpc", "qqp"):
        expected = {"accuracy": accuracy, "f1": f1, "score": (accuracy + f1) / 2}
        assert scores(task, *columns) == pytest.approx(expected)


@settings(max_examples=15, deadline=None)
@given(LABELS)
def test_matthews_correlation_is_its_formula_and_0_where_that_has_none(
    pairs: list[tuple[int, int]],
):
    hit, extra, missed, rest = counts(pairs)
    under = (hit + extra) * (hit + missed) * (rest + extra) * (rest + missed)
    expected = (hit * rest - extra * missed) / math.sqrt(under) if under else 0.0
    columns = [list(column) for column in zip(*pairs, strict=True)]
    assert scores("cola", *columns)["score"] == pytest.approx(expected)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(0, 5)), min_size=3, max_size=20))
def test_stsb_is_the_mean_of_pearson_and_of_pearson_of_ranks(pairs: list[tuple[int, int]]):
    one, other = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
    assume(np.ptp(one) > 0)
    assume(np.ptp(other) > 0)

    def ranks(values: np.ndarray) -> np.ndarray:  # of equal values the mean rank
        return np.array([(values < v).sum() + (values == v).sum() / 2 for v in values])

    pearson = float(np.corrcoef(one, other)[0, 1])
    spearman = float(np.corrcoef(ranks(one), ranks(other))[0, 1])
    found = scores("stsb", one.tolist(), other.tolist())
    assert found["pearson"] == pytest.approx(pearson, abs=1e-5)
    assert found["spearmanr"] == pytest.approx(spearman, abs=1e-5)
    assert found["score"] == pytest.approx((pearson + spearman) / 2, abs=1e-5)


def test_constant_predictions_correlate_with_nothing():
    assert scores("stsb", [1.0, 1.0, 1.0], [0.0, 2.5, 5.0])["score"] == 0.0


@pytest.mark.parametrize("task", [*TASKS])
def test_right_answers_score_1_in_every_task(task: str):
    right = [0, 1, 2, 1] if task == "mnli" else [0, 1, 0, 1]
    assert scores(task, right, right)["score"] == pytest.approx(1.0)
