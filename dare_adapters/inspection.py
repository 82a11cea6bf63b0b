"""What an adapter holds, for people: sizes by part, errors by group, a histogram of |delta|."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dare_adapters.adapter import Adapter
from dare_adapters.config import CONFIG_NAME, WEIGHTS_NAME, tensor_nbytes
from dare_adapters.errors import DareError

__all__ = ["Inspection", "inspect_adapter", "plot_histogram"]

# Decades from 1e-8 to 1, four bins each.
_EDGES = np.logspace(-8, 0, 33)
_SAMPLED_ENTRIES = 1 << 22


@dataclass(frozen=True)
class Inspection:
    """All that `dare-adapters inspect` shows.

    Attributes:
        summary: the config's fields of one value each.
        bytes_by_part: what the bytes of the directory are spent on.
        bits_per_pruned_parameter: bits of packed values, scales and stored supports for each entry
            of the parameters that were pruned.
        kinds: how many parameters are stored how.
        groups: sizes and errors of parameters that differ only in their layer's number.
        edges, counts: histogram of |delta| before rescaling, of a sample of the survivors; each
            bin holds its upper edge, zeros are in none.
    """

    summary: dict[str, Any]
    bytes_by_part: dict[str, int]
    bits_per_pruned_parameter: float
    kinds: dict[str, int]
    groups: dict[str, dict[str, float]]
    edges: list[float]
    counts: list[int]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)


def inspect_adapter(adapter: Adapter) -> Inspection:
    """Measure an adapter."""
    config = adapter.config
    parts: dict[str, int] = {}
    packed = 0
    for key, (dtype, shape) in config.tensors().items():
        part = key.rsplit("_", 1)[1]
        size = tensor_nbytes(dtype, shape)
        parts[part] = parts.get(part, 0) + size
        packed += size if part in ("values", "scales", "support") else 0
    # What a safetensors file says of its tensors, ahead of them.
    parts["header"] = (adapter.path / WEIGHTS_NAME).stat().st_size - sum(parts.values())
    parts["config"] = (adapter.path / CONFIG_NAME).stat().st_size
    parts["other files"] = sum(
        file.stat().st_size
        for file in adapter.path.iterdir()
        if file.is_file() and file.name not in (CONFIG_NAME, WEIGHTS_NAME)
    )
    kinds: dict[str, int] = {}
    for entry in config.parameters.values():
        kind = entry.kind if entry.kind != "sparse" else f"sparse, {entry.mask}, {entry.bits} bit"
        kinds[kind] = kinds.get(kind, 0) + 1
    return Inspection(
        summary=config.summary(),
        bytes_by_part=parts,
        bits_per_pruned_parameter=8 * packed / max(config.pruned_numel(), 1),
        kinds=kinds,
        groups=config.fidelity,
        edges=_EDGES.tolist(),
        counts=_histogram(adapter).tolist(),
    )


def _histogram(adapter: Adapter) -> np.ndarray:
    """|delta| over a bounded number of survivors, the same share of every parameter."""
    counts = np.zeros(len(_EDGES) + 1, dtype=np.int64)
    total = sum(math.prod(e.shape) for e in adapter.config.parameters.values() if e.kind != "new")
    share = min(1.0, 10 * _SAMPLED_ENTRIES / max(total, 1))
    for name, delta in adapter.deltas():
        entry = adapter.config.parameters[name]
        factor = 1.0
        if entry.kind == "sparse" and adapter.config.rescale and entry.drop_rate is not None:
            factor = 1 - entry.drop_rate
        rows = max(1, round(share * delta.rows))
        index, values = delta.read(0, rows)
        magnitude = np.abs(values.numpy()) * factor
        if index is not None:  # a position that comes twice, one right after the other, counts once
            magnitude = magnitude[np.diff(index.numpy(), prepend=-1) != 0]
        counts += np.bincount(np.searchsorted(_EDGES, magnitude), minlength=len(counts))
    return counts[1:-1]


def plot_histogram(inspection: Inspection, file: Path, title: str) -> None:
    """Write the histogram of |delta| as a picture (PNG, PDF or SVG, by the ending).

    Raises:
        DareError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise DareError("a plot needs matplotlib: pip install 'dare-adapters[plot]'") from error

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    edges = np.array(inspection.edges)
    axes.stairs(np.array(inspection.counts), edges, fill=True, color="#4477AA")
    axes.set_xscale("log")
    axes.axvline(0.005, color="#EE6677", linestyle="--", linewidth=1)
    axes.text(0.0052, axes.get_ylim()[1] * 0.9, "0.005", color="#EE6677")
    axes.set_xlabel("|fine-tune − base| of the entries that were kept")
    axes.set_ylabel("entries")
    axes.set_title(re.sub(r"^.*/", "", title.rstrip("/")), parse_math=False)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
