"""WIDEN: weights taken apart into magnitudes and directions, merged by how far each moved.

Yu et al., "Extend Model Merging from Fine-Tuned to Pre-Trained Large Language Models via Weight
Disentanglement", arXiv 2408.03092; as in MergeLLM's code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from dare_adapters.combine.arguments import number, unweighted
from dare_adapters.combine.registry import parameter_method
from dare_adapters.delta import STEP_ENTRIES
from dare_adapters.mask import matrix_shape

__all__ = ["EMBEDDINGS", "widen"]

EMBEDDINGS = (
    "embed_tokens.weight",
    "embed_positions.weight",
    "embed_in.weight",
    "tok_embeddings.weight",
    "word_embeddings.weight",
    "position_embeddings.weight",
    "token_type_embeddings.weight",
    "shared.weight",
    "wte.weight",
    "wpe.weight",
)
"""Ends of names of parameters that hold a vector in each row."""


@parameter_method("widen")
def widen(
    parameters: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    above_average_value_ratio: float = 1.0,
    score_calibration_value: float = 1.0,
    by_row: Sequence[str] = EMBEDDINGS,
    name: str = "",
    base: torch.Tensor,
) -> torch.Tensor:
    """base + Σ sᵢ δᵢ, with a score sᵢ for each column, or for each row of an embedding.

    sᵢ = ½ (score of the change of the column's norm + score of 1 − cosine with the base's). To
    score, each model ranks its columns, 0/n … (n−1)/n from the one that changed least; the scores
    are the softmax over the models of a column's ranks, but `score_calibration_value` where a
    rank is above `above_average_value_ratio` times the model's mean rank. Vectors (norms, biases)
    have a score for each entry, of |δᵢ| itself in place of the ranks.

    Where base or fine-tune is zero in a column, its cosine is taken as 0, or 1 if both are.
    Parameters of more than two dimensions are seen as the matrix they are stored as.

    Args:
        parameters: any number.
        weights: each 1.
        above_average_value_ratio: at least 0; below 1 more columns are calibrated, above 1 fewer.
        score_calibration_value: the score of what changed much, any number.
        by_row: ends of the names of parameters that hold a vector in each row: embeddings, and
            weights stored (inputs, outputs), such as GPT-2's Conv1D.
        name: of the parameter.

    Raises:
        CombinationError: a weight is not 1, or an option is out of range.
    """
    unweighted(weights, "widen")
    ratio = number(above_average_value_ratio, "above_average_value_ratio", 0)
    calibration = number(score_calibration_value, "score_calibration_value")
    if len(parameters) == 1 and calibration == 1:
        return parameters[0]
    rowwise = base.dim() > 1 and bool(name) and name.endswith(tuple(by_row))
    shape = matrix_shape(tuple(base.shape))
    matrices, start = [parameter.reshape(shape) for parameter in parameters], base.reshape(shape)
    if base.dim() < 2:
        changes = torch.stack([(matrix - start).abs()[0] for matrix in matrices])
        scores = _scores(changes.to(torch.float64), ratio, calibration)
    else:
        found = [_changes(matrix, start, rowwise) for matrix in matrices]
        magnitudes, directions = (torch.stack(parts) for parts in zip(*found, strict=True))
        count = magnitudes.shape[1]
        scores = _scores(_places(magnitudes), ratio, calibration, count)
        scores = scores.add_(_scores(_places(directions), ratio, calibration, count)).mul_(0.5)
    merged = torch.empty(shape)
    for rows in _row_ranges(shape):
        total = start[rows].to(torch.float64)
        for matrix, score in zip(matrices, scores, strict=True):
            delta = matrix[rows].to(torch.float64) - start[rows]
            total += delta.mul_(score[rows, None] if rowwise else score)
        merged[rows] = total
    return merged.view(base.shape)


def _changes(
    matrix: torch.Tensor, start: torch.Tensor, rowwise: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """By how much norms and directions of columns (or rows) differ, float64 (n,) each."""
    count = matrix.shape[0 if rowwise else 1]
    own, old, both = torch.zeros(3, count, dtype=torch.float64)
    for rows in _row_ranges((matrix.shape[0], matrix.shape[1])):
        new, base = matrix[rows].to(torch.float64), start[rows].to(torch.float64)
        where, dim = (rows, 1) if rowwise else (slice(None), 0)
        own[where] += new.square().sum(dim=dim)
        old[where] += base.square().sum(dim=dim)
        both[where] += new.mul_(base).sum(dim=dim)
    lengths = (own * old).sqrt()
    cosine = torch.where(lengths > 0, both / lengths, torch.where(own == old, 1.0, 0.0))
    return (own.sqrt() - old.sqrt()).abs(), 1 - cosine


def _places(changes: torch.Tensor) -> torch.Tensor:
    """Place 0 … n−1 of each entry (k, n) in its row's ascending order; equals as they come."""
    order = changes.argsort(dim=1, stable=True)
    places = torch.arange(changes.shape[1], dtype=torch.float64).expand(changes.shape)
    return torch.zeros_like(changes).scatter_(1, order, places)


def _scores(
    changes: torch.Tensor, ratio: float, calibration: float, divisor: int = 1
) -> torch.Tensor:
    """Of changes float64 (k, n): softmax of changes / divisor, calibrated; float64 (k, n).

    The comparison is of whole places, so that the middle one of an odd number is the mean, not
    above it. MergeLLM compares after dividing, in float32, where that depends on rounding.
    """
    scores = (changes / divisor).softmax(dim=0)
    scores[changes > changes.mean(dim=1, keepdim=True) * ratio] = calibration
    return scores


def _row_ranges(shape: tuple[int, int]) -> Iterator[slice]:
    step = max(1, STEP_ENTRIES // max(1, shape[1]))
    for top in range(0, shape[0], step):
        yield slice(top, top + step)
