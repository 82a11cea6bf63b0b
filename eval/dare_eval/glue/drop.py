"""`dare-eval glue drop`: a task's metric against the drop rate (Yu et al. 2024, figures 3 to 5)."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dare_adapters
from dare_adapters.mask import block_size
from dare_eval.glue.bench import TaskBench
from dare_eval.glue.pruned import METHODS, Pruned
from dare_eval.records import Cell, Records

__all__ = ["METHODS", "DropAxes", "run_drop"]

EXPERIMENT = "glue-drop"


@dataclass(frozen=True)
class DropAxes:
    """What is varied.

    Attributes:
        methods: of METHODS; the first three are `dare_adapters.extract`'s.
        drop_rates: p, each in [0, 1).
        masks: "auto", "blocked", "bernoulli"; rates that "blocked" cannot have are left out of it.
        bits: of survivors; 32 rounds nothing, fewer are stored and read as an adapter. Masked
            weights are never rounded.
        seeds: of masks; magnitude has none.
        keep_vectors: leave parameters of one dimension whole, as adapters do by default; the paper
            drops from every parameter but the head's.
    """

    methods: Sequence[str] = METHODS
    drop_rates: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
    masks: Sequence[str] = ("auto",)
    bits: Sequence[int] = (32,)
    seeds: Sequence[int] = (0, 1, 2)
    keep_vectors: bool = False

    def points(self) -> Iterator[dict[str, Any]]:
        """Every combination that means something."""
        for method in self.methods:
            random = method != "magnitude"
            for rate in self.drop_rates:
                for mask in self.masks if random else [None]:
                    if mask == "blocked" and block_size(rate) is None:
                        continue
                    for bits in [32] if method == "masked_weights" else self.bits:
                        for seed in self.seeds if random else [None]:
                            yield {
                                "method": method,
                                "drop_rate": rate,
                                "mask": mask,
                                "bits": bits,
                                "seed": seed,
                                "vectors": "whole" if self.keep_vectors else "dropped",
                            }


def run_drop(benches: Iterable[TaskBench], records: Records, axes: DropAxes) -> None:
    """Every cell that has no record yet; of each task also the fine-tune and the base encoder."""
    for bench in benches:
        cells: list[Cell] = []
        for point in ({"method": "finetuned"}, {"method": "base_encoder"}, *axes.points()):
            config = {"experiment": EXPERIMENT, **bench.config, **point}
            cells.append((config, _cell(bench, point)))
        records.run_all(cells, f"drop {bench.task.title}")


def _cell(bench: TaskBench, point: Mapping[str, Any]) -> Callable[[], Mapping[str, Any]]:
    def run() -> Mapping[str, Any]:
        method = point["method"]
        if method in ("finetuned", "base_encoder"):
            return bench.measure(bench.delta if method == "finetuned" else None)
        whole = point["vectors"] == "whole"
        if point["bits"] == 32:
            return bench.measure(
                Pruned(
                    bench.delta,
                    method,
                    point["drop_rate"],
                    seed=point["seed"] or 0,
                    mask=point["mask"] or "auto",
                    keep_vectors=whole,
                )
            )
        with tempfile.TemporaryDirectory() as scratch:
            adapter = dare_adapters.extract(
                bench.base,
                bench.finetuned,
                Path(scratch) / "adapter",
                method=method,
                drop_rate=point["drop_rate"],
                # A rate by pattern is for every parameter, also those that are else kept whole.
                drop_rates=None if whole else {"*": point["drop_rate"]},
                mask=point["mask"] or "auto",
                bits=point["bits"],
                seed=point["seed"],
                on_large_delta="ignore",
                progress=False,
            )
            return bench.measure(bench.encoder.inside(adapter))

    return run
