"""GLUE's metrics as a script that `evaluate` loads from this file, without the hub.

    evaluate.load("…/glue_metric.py", "mrpc").compute(predictions=[…], references=[…])

Beside the numbers that the hub's script gives, `score` is the task's one number: what MergeLM
reports for it (Yu et al. 2024, section 4.1).
"""

from __future__ import annotations

import warnings
from typing import Any

import datasets
import evaluate
import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

_CITATION = "@inproceedings{wang2018glue, title={GLUE}, author={Wang, Alex and others}}"
_DESCRIPTION = "GLUE's metrics; score is Matthews' correlation (cola), the mean of Pearson's and \
Spearman's (stsb), the mean of accuracy and F1 (mrpc, qqp), accuracy otherwise."


class GlueMetric(evaluate.Metric):  # type: ignore[misc]
    """The metric of one task, which `config_name` names."""

    def _info(self) -> evaluate.MetricInfo:
        kind = "float32" if self.config_name == "stsb" else "int64"
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description="predictions and references: classes (stsb: scores)",
            features=datasets.Features(
                {"predictions": datasets.Value(kind), "references": datasets.Value(kind)}
            ),
            format="numpy",
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        if self.config_name == "cola":
            with warnings.catch_warnings():  # of one label alone, whose correlation is 0
                warnings.simplefilter("ignore", UserWarning)
                value = float(matthews_corrcoef(references, predictions))
            return {"matthews_correlation": value, "score": value}
        if self.config_name == "stsb":
            return _correlations(predictions, references)
        accuracy = float(accuracy_score(references, predictions))
        if self.config_name not in ("mrpc", "qqp"):
            return {"accuracy": accuracy, "score": accuracy}
        f1 = float(f1_score(references, predictions, zero_division=0))
        return {"accuracy": accuracy, "f1": f1, "score": (accuracy + f1) / 2}


def _correlations(predictions: Any, references: Any) -> dict[str, float]:
    """Of constant predictions, which correlate with nothing, 0."""
    if np.ptp(predictions) == 0 or np.ptp(references) == 0:
        return {"pearson": 0.0, "spearmanr": 0.0, "score": 0.0}
    pearson = float(pearsonr(predictions, references)[0])
    spearman = float(spearmanr(predictions, references)[0])
    return {"pearson": pearson, "spearmanr": spearman, "score": (pearson + spearman) / 2}
