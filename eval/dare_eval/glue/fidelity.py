"""`dare-eval glue fidelity`: what an adapter of a size keeps of the fine-tune's answers.

Adapters over drop rates and bits, beside two other ways to spend the same bytes. At 16 bits an
adapter is plain DARE, its survivors in half precision.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import dare_adapters
from dare_eval.glue.bench import TaskBench
from dare_eval.glue.compressed import Factors, LowRank, SignAndScale, factorise, rank_of_size
from dare_eval.records import Cell, Records

__all__ = ["DEFAULT_POINTS", "FidelityAxes", "run_fidelity"]

EXPERIMENT = "glue-fidelity"

DEFAULT_POINTS = {
    16: (0.75, 0.9, 0.96875, 0.984375),
    4: (0.5, 0.75, 0.875, 0.9375, 0.975, 0.992),
    2: (0.5, 0.75, 0.875, 0.95, 0.984375),
    1: (0.0, 0.5, 0.75, 0.9, 0.96875),
}
"""Drop rates by bits."""


@dataclass(frozen=True)
class FidelityAxes:
    """What is compared.

    Attributes:
        points: drop rates by bits.
        seeds: of masks.
        lora_bits: sizes of the low-rank extractions, in bits for each matrix entry; none: leave
            them out.
        sign_and_scale: whether BitDelta's rule takes part.
    """

    points: Mapping[int, Sequence[float]]
    seeds: Sequence[int] = (0, 1, 2)
    lora_bits: Sequence[float] = (1.0, 0.5, 0.25, 0.1)
    sign_and_scale: bool = True


def run_fidelity(benches: Iterable[TaskBench], records: Records, axes: FidelityAxes) -> None:
    """Every cell that has no record yet."""
    for bench in benches:
        study = _Study(bench, max(axes.lora_bits, default=0.0))
        cells: list[Cell] = [
            ({"experiment": EXPERIMENT, **bench.config, **point}, run)
            for point, run in study.points(axes)
        ]
        records.run_all(cells, f"fidelity {bench.task.title}")


class _Study:
    """The cells of one task."""

    def __init__(self, bench: TaskBench, largest_lora: float) -> None:
        self.bench, self._largest = bench, largest_lora

    def points(self, axes: FidelityAxes) -> Iterator[Cell]:
        """What is measured, and how."""
        yield {"method": "finetuned"}, self.finetuned
        yield {"method": "base_encoder"}, self.base_encoder
        for bits, rates in axes.points.items():
            for rate in rates:
                for seed in axes.seeds if rate else [None]:
                    point = {"method": "dare", "bits": bits, "drop_rate": rate, "seed": seed}
                    yield point, self.adapter(bits, rate, seed)
        if axes.sign_and_scale:
            yield {"method": "bitdelta"}, self.sign_and_scale
        for size in axes.lora_bits:
            yield {"method": "lora", "size": size}, self.low_rank(size)

    @cached_property
    def _factors(self) -> Factors:
        return factorise(self.bench.delta, rank_of_size(self.bench.delta, self._largest))

    def finetuned(self) -> Mapping[str, Any]:
        return self.bench.measure(self.bench.delta)

    def base_encoder(self) -> Mapping[str, Any]:
        return self.bench.measure(None)

    def adapter(
        self, bits: int, drop_rate: float, seed: int | None
    ) -> Callable[[], Mapping[str, Any]]:
        """A DARE adapter as `extract` makes it."""

        def run() -> Mapping[str, Any]:
            with tempfile.TemporaryDirectory() as scratch:
                adapter = dare_adapters.extract(
                    self.bench.base,
                    self.bench.finetuned,
                    Path(scratch) / "adapter",
                    drop_rate=drop_rate,
                    bits=bits,
                    seed=seed,
                    on_large_delta="ignore",
                    progress=False,
                )
                size = dare_adapters.inspect_adapter(adapter).bits_per_pruned_parameter
                found = self.bench.measure(self.bench.encoder.inside(adapter))
                return {**found, "bits_per_parameter": size, "adapter_bytes": adapter.nbytes}

        return run

    def sign_and_scale(self) -> Mapping[str, Any]:
        source = SignAndScale(self.bench.delta)
        found = self.bench.measure(source)
        return {**found, "bits_per_parameter": source.bits_per_parameter}

    def low_rank(self, size: float) -> Callable[[], Mapping[str, Any]]:
        """The rank whose factors have about this size."""

        def run() -> Mapping[str, Any]:
            rank = rank_of_size(self.bench.delta, size)
            source = LowRank(self.bench.delta, self._factors, rank)
            found = self.bench.measure(source)
            return {**found, "bits_per_parameter": source.bits_per_parameter, "rank": rank}

        return run
