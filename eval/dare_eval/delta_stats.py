"""`dare-eval delta-stats`: how far fine-tunes moved, and whether DARE applies to them.

Yu et al. 2024, section 4.5 and figure 9: DARE holds while changes stay within about 0.005 and
fails where they reach about 0.03, as after continued pre-training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from dare_adapters.checkpoint import open_checkpoint
from dare_adapters.difference import PAPER_FAILS, PAPER_SAFE, Difference
from dare_adapters.pairing import pair_parameters
from dare_eval.identity import model_identity
from dare_eval.records import Cell, Records

__all__ = ["QUANTILES", "delta_statistics", "run_delta_stats"]

EXPERIMENT = "delta-stats"
QUANTILES = (0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
SAMPLE = 1 << 24
"""Entries that quantiles are computed from; a larger model gives every n-th."""


def run_delta_stats(base: str, finetuned: Sequence[str], records: Records) -> None:
    """A record for each fine-tune that has none yet."""
    of_base = model_identity(base)
    cells: list[Cell] = []
    for model in finetuned:
        config = {
            "experiment": EXPERIMENT,
            "method": "difference",
            "base": of_base,
            "finetuned": model_identity(model),
        }
        cells.append((config, partial(delta_statistics, base, model)))
    records.run_all(cells, "delta statistics")


def delta_statistics(base: str, finetuned: str, sample: int = SAMPLE) -> dict[str, Any]:
    """Of all float parameters that both have.

    Returns:
        `entries`; `changed`, the share that differs; `quantiles` of delta and `magnitudes` of
        |delta| at QUANTILES; `within`, the share of |delta| up to the paper's safe and failing
        bounds; `rms`; `verdict`; all of the sampled entries.

    Raises:
        CheckpointError: a checkpoint cannot be read.
        CheckpointMismatchError: the two do not describe the same parameters.
    """
    one, other = open_checkpoint(base), open_checkpoint(finetuned)
    difference = Difference(one, other, pair_parameters(one, other))
    total = sum(one.info[name].numel for name in difference)
    step = max(1, math.ceil(total / sample))
    found, passed = [], 0
    for name in tqdm(difference, desc="delta", leave=False):
        delta = difference[name]
        for start, stop in delta.row_ranges():
            values = delta.rows_between(start, stop)
            # Every step-th entry of the whole model, wherever parameters begin.
            found.append(values[-passed % step :: step].clone())
            passed += len(values)
        delta.release()
    values = torch.cat(found) if found else torch.zeros(1)
    return {
        **summary(values.numpy(), total),
        "verdict": verdict(difference.sample().concern),
    }


def summary(values: np.ndarray, entries: int) -> dict[str, Any]:
    """The numbers of a record, of some entries of a delta of `entries`."""
    size = np.abs(values)
    return {
        "entries": entries,
        "sampled": len(values),
        "changed": float(np.mean(values != 0)),
        "quantiles": [float(q) for q in np.quantile(values, QUANTILES)],
        "magnitudes": [float(q) for q in np.quantile(size, QUANTILES)],
        "within": {
            str(bound): float(np.mean(size <= bound)) for bound in (PAPER_SAFE, PAPER_FAILS)
        },
        "rms": float(np.sqrt(np.mean(np.square(values, dtype=np.float64)))),
    }


def verdict(concern: str | None) -> str:
    """In a word, what `extract` would warn of."""
    if concern is None:
        return "applies"
    return "fails" if "known to fail" in concern else "doubtful"
