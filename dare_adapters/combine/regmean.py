"""RegMean: the linear map whose outputs are nearest to every model's, on that model's own inputs.

Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models", ICLR 2023.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from dare_adapters.combine.arguments import number, shares
from dare_adapters.combine.registry import parameter_method
from dare_adapters.combine.vectors import average
from dare_adapters.delta import STEP_ENTRIES
from dare_adapters.errors import CombinationError

__all__ = ["regmean"]


@parameter_method("regmean", statistics="gram")
def regmean(
    parameters: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    reduce_non_diagonal: float = 1.0,
    ridge: float | None = None,
    statistics: Sequence[torch.Tensor | None],
) -> torch.Tensor:
    """W = (Σ wᵢ Gᵢ)⁻¹ Σ wᵢ Gᵢ Wᵢ, the minimum of Σ wᵢ ‖Xᵢ W − Xᵢ Wᵢ‖² / nᵢ.

    W is (inputs, outputs); a linear layer's weight is its transpose. Gᵢ = XᵢᵀXᵢ / nᵢ is the Gram
    matrix of the layer's inputs, with what is off its diagonal times `reduce_non_diagonal`.

    A sum of Gram matrices is often singular: some inputs never move, or move together. So the
    deviation from the average A = Σ wᵢ Wᵢ / Σ wᵢ is solved for, in float64,

        (S + ridge · diag S) (W − A) = Σ wᵢ Gᵢ (Wᵢ − A),    S = Σ wᵢ Gᵢ

    which is the same where `ridge` is 0 and S is regular, and else leaves at A what the data says
    nothing about. A parameter for which an adapter has no statistics is A.

    Args:
        parameters: any number.
        weights: one for each, at least 0; only their ratios matter.
        reduce_non_diagonal: 0 … 1; 1 is MergeLM's default, the paper finds 0.9 better.
        ridge: share of each diagonal entry that is added to it, at least 0; None: 2√inputs times
            the precision of the matrices' data type, which is what their rounding adds.
        statistics: Gᵢ or None. (inputs, inputs): of a weight (outputs, inputs), or, if it fits
            that alone, (inputs, outputs). (1, inputs, inputs): of a weight (inputs, outputs), as
            GPT-2's Conv1D; square ones need it.

    Raises:
        CombinationError: an option or a weight is out of range; a matrix does not fit the weight
            or is no Gram matrix.
    """
    reduce_non_diagonal = number(reduce_non_diagonal, "reduce_non_diagonal", 0, 1)
    if ridge is not None:
        ridge = number(ridge, "ridge", 0)
    parts = shares(weights, "regmean")
    if len(parameters) == 1:
        return parameters[0]
    mean = average(parameters, parts)
    grams = [gram for gram in statistics if gram is not None]
    if len(grams) < len(parameters):
        return mean
    input_first = _input_first(grams, mean)
    grams = [gram.reshape(gram.shape[-2:]) for gram in grams]
    if ridge is None:
        coarsest = max(torch.finfo(gram.dtype).eps for gram in grams)
        ridge = 2 * math.sqrt(len(grams[0])) * coarsest

    inputs = len(grams[0])
    total = torch.zeros(inputs, inputs, dtype=torch.float64)
    target = torch.zeros(inputs, mean.numel() // max(inputs, 1), dtype=torch.float64)
    for parameter, gram, part in zip(parameters, grams, parts, strict=True):
        apart = parameter.to(torch.float64) - mean
        apart = apart if input_first else apart.T
        for top, rows in _rows(gram, reduce_non_diagonal):
            rows.mul_(part)
            total[top : top + len(rows)] += rows
            target[top : top + len(rows)].addmm_(rows, apart)
    change = _solve(total, target, ridge)
    return mean.add_(change if input_first else change.T)


def _rows(gram: torch.Tensor, reduce_non_diagonal: float) -> Iterator[tuple[int, torch.Tensor]]:
    """Ranges of rows in float64, what is off the diagonal reduced."""
    step = max(1, STEP_ENTRIES // max(1, len(gram)))
    for top in range(0, len(gram), step):
        rows = gram[top : top + step].to(torch.float64, copy=True)
        diagonal = rows.diagonal(top).clone()
        rows.mul_(reduce_non_diagonal).diagonal(top).copy_(diagonal)
        yield top, rows


def _solve(total: torch.Tensor, target: torch.Tensor, ridge: float) -> torch.Tensor:
    diagonal = total.diagonal()
    diagonal.mul_(1 + ridge)
    diagonal.masked_fill_(diagonal == 0, 1.0)  # an input that never moves; its target is zero
    factor, failed = torch.linalg.cholesky_ex(total)
    if bool(failed) or not bool(factor.diagonal().isfinite().all()):
        raise CombinationError(
            f"the sum of the Gram matrices is singular with ridge {ridge:g}; set a larger ridge "
            "(1e-4), or reduce_non_diagonal below 1"
        )
    return torch.cholesky_solve(target, factor)


def _input_first(grams: Sequence[torch.Tensor], weight: torch.Tensor) -> bool:
    """Whether the inputs are the weight's first dimension, from the Gram matrices' shapes."""
    shapes = {tuple(gram.shape) for gram in grams}
    shape = next(iter(shapes))
    if len(shapes) == 1 and weight.dim() == 2 and shape[-2:] == shape[-1:] * 2:
        if len(shape) == 2 and shape[-1] in weight.shape:
            return shape[-1] != weight.shape[1]
        if len(shape) == 3 and shape[0] == 1 and shape[-1] == weight.shape[0]:
            return True
    listed = ", ".join(str(list(shape)) for shape in sorted(shapes))
    raise CombinationError(
        f"Gram matrices {listed} do not fit a weight {list(weight.shape)}: expected "
        "(inputs, inputs) from every adapter, or (1, inputs, inputs) where the weight is "
        "(inputs, outputs)"
    )
