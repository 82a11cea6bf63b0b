"""Fine-tune minus base, as a source of deltas: whole, or only where it is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from dare_adapters import compiled, compiled_selection
from dare_adapters.checkpoint import Checkpoint
from dare_adapters.delta import Delta, NewParameter
from dare_adapters.errors import CheckpointError
from dare_adapters.finite import first_non_finite
from dare_adapters.mask import (
    BernoulliSupport,
    BlockedSupport,
    Slots,
    Support,
    parameter_key,
    philox_words,
)
from dare_adapters.pairing import Pairing
from dare_adapters.source import DeltaSource
from dare_adapters.witness import content_seed

__all__ = ["DeltaSample", "Difference", "Finetuned", "ParameterDifference"]

_RUNS, _RUN_LENGTH = 4, 1024
# Yu et al. 2024, section 4.5, speak of typical changes: the tail may be twice as far out.
PAPER_SAFE, PAPER_FAILS = 0.005, 0.03


class ParameterDifference(Delta):
    """One parameter of both checkpoints, flat and memory-mapped.

    Attributes:
        name: the base's name.
        base, finetuned: (rows * columns,), each in its own dtype; the rows both have.
        added_rows: what the fine-tune has beyond them, (m, …), or None.
        damaged: called where a sum of magnitudes is no number, which tells of damage in one of the
            two: it may raise an error that names it. None: nobody asked.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        base: torch.Tensor,
        finetuned: torch.Tensor,
        added_rows: torch.Tensor | None = None,
        release: Callable[[], None] | None = None,
        damaged: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(shape, added_rows)
        self.name, self.base, self.finetuned = name, base, finetuned
        self.damaged = damaged
        self._release = release

    def release(self) -> None:
        if self._release is not None:
            self._release()

    @property
    def entries_per_row(self) -> int:
        return self.columns

    def read(self, start: int, stop: int) -> tuple[None, torch.Tensor]:
        return None, self.rows_between(start, stop)

    def to(self, device: str | torch.device) -> ParameterDifference:
        """The same with the base's and the fine-tune's values on a device."""
        base, finetuned = self.base.to(device), self.finetuned.to(device)
        return ParameterDifference(self.name, self.shape, base, finetuned, self.added_rows)

    @property
    def compiled(self) -> bool:
        """Whether the compiled loops can read both."""
        both = (self.base, self.finetuned)
        return all(compiled.can_use(flat) and flat.is_contiguous() for flat in both)

    @property
    def _comparable(self) -> bool:
        return compiled_selection.can_compare(self.base, self.finetuned)

    def at(self, index: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The delta at positions relative to row `start`, float32, shape of `index`."""
        low, high = start * self.columns, stop * self.columns
        flat = index.reshape(-1)
        base = self.base[low:high].index_select(0, flat).to(torch.float32)
        finetuned = self.finetuned[low:high].index_select(0, flat).to(torch.float32)
        return finetuned.sub_(base).view(index.shape)

    def rows_between(self, start: int, stop: int) -> torch.Tensor:
        """The delta of whole rows, float32 (n * columns,)."""
        return self.entries_between(start * self.columns, stop * self.columns)

    def entries_between(self, low: int, high: int) -> torch.Tensor:
        """The delta at flat positions low … high - 1, float32 (high - low,)."""
        base, finetuned = self.base[low:high], self.finetuned[low:high]
        if self._comparable:
            return compiled_selection.difference(base, finetuned)
        return finetuned.to(torch.float32, copy=True).sub_(base.to(torch.float32))

    def read_support(
        self, support: Support, factor: float, start: int, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(support, BernoulliSupport) and self.compiled:
            return compiled.bernoulli_survivors(
                *support.where, self.base, self.finetuned, factor, start, stop
            )
        if not (isinstance(support, BlockedSupport) and support.repeatable and self.compiled):
            return super().read_support(support, factor, start, stop)
        index, valid, values = compiled.survivors(
            support.where, support.slots_per_row, self.base, self.finetuned, factor, start, stop
        )
        slots = Slots(index, valid if support.ragged else None)
        return index.view(-1), slots.repeat_before(values).view(-1)

    def read_above(
        self, value: float, last: float, start: int, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.compiled:
            return super().read_above(value, last, start, stop)
        equal = (stop - start) * self.columns if last == math.inf else max(int(last), -1)
        return compiled.above(*self._flat(start, stop), value, equal)

    def fill_above(
        self, out: torch.Tensor, value: float, last: float, start: int, stop: int
    ) -> None:
        if not self._comparable:
            super().fill_above(out, value, last, start, stop)
            return
        equal = (stop - start) * self.columns if last == math.inf else max(int(last), -1)
        compiled_selection.trimmed(*self._flat(start, stop), value, equal, out)

    def count_around(self, value: float, start: int, stop: int) -> tuple[int, int]:
        if not self._comparable:
            return super().count_around(value, start, stop)
        return compiled_selection.count(*self._flat(start, stop), value)

    def equal_to(self, value: float, wanted: int, start: int, stop: int) -> tuple[int, int | None]:
        if not self._comparable:
            return super().equal_to(value, wanted, start, stop)
        return compiled_selection.equal(*self._flat(start, stop), value, wanted)

    def between(self, low: float, high: float, start: int, stop: int) -> tuple[int, torch.Tensor]:
        if not self.compiled:
            return super().between(low, high, start, stop)
        return compiled.between(*self._flat(start, stop), low, high)

    def l1(self, start: int, stop: int) -> float:
        if self.compiled:
            total = compiled.abs_sum(*self._flat(start, stop))
        else:
            total = float(self.rows_between(start, stop).abs_().sum(dtype=torch.float64))
        self.check_sum(total)
        return total

    def check_sum(self, total: float) -> None:
        """Have looked for damage where a sum of magnitudes is no number."""
        if self.damaged is not None and not math.isfinite(total):
            self.damaged()

    def _flat(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = start * self.columns, stop * self.columns
        return self.base[low:high], self.finetuned[low:high]

    def check_finite(self, start: int, stop: int) -> None:
        """Refuse NaN and infinity in some rows of either checkpoint.

        Raises:
            CheckpointError: which parameter, which row and column, of which checkpoint.
        """
        low, high = start * self.columns, stop * self.columns
        for flat, side in ((self.base, "the base"), (self.finetuned, "the fine-tune")):
            place = first_non_finite(flat[low:high])
            if place is not None:
                row, column = divmod(low + place, self.columns)
                raise CheckpointError(
                    f"{self.name} of {side} holds {float(flat[low + place])} at row {row}, column "
                    f"{column}; such a checkpoint is damaged or diverged, no adapter was written"
                )

    def unchanged(self) -> bool:
        """Whether no entry differs."""
        if self.base.dtype == self.finetuned.dtype:
            return torch.equal(self.base, self.finetuned)
        step = max(1, (1 << 20) // max(self.columns, 1))
        return all(
            not self.rows_between(start, min(start + step, self.rows)).any()
            for start in range(0, self.rows, step)
        )


class Difference(Mapping[str, ParameterDifference]):
    """The deltas of all parameters that two checkpoints share, by base name."""

    def __init__(self, base: Checkpoint, finetuned: Checkpoint, pairing: Pairing) -> None:
        self.base, self.finetuned, self.pairing = base, finetuned, pairing
        self._names = [
            name
            for name in pairing.common
            if base.info[name].dtype.is_floating_point and base.info[name].numel
        ]

    def __getitem__(self, name: str) -> ParameterDifference:
        base, finetuned = self.base[name], self.finetuned[self.pairing.common[name]]
        added = None
        if name in self.pairing.grown:
            finetuned, added = finetuned[: len(base)], finetuned[len(base) :]
        flat = finetuned.reshape(-1)

        def release() -> None:
            self.base.release(name)
            self.finetuned.release(self.pairing.common[name])

        return ParameterDifference(name, tuple(base.shape), base.reshape(-1), flat, added, release)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def sample(self) -> DeltaSample:
        """Quantiles of |delta| from a few thousand entries of every parameter."""
        found = []
        for name in self:
            difference = self[name]
            size = difference.base.numel()
            words = philox_words(1, parameter_key(name), 0, _RUNS // 4)
            starts, length = [0], size
            if size > _RUNS * _RUN_LENGTH:
                starts, length = [w % (size - _RUN_LENGTH) for w in words.tolist()], _RUN_LENGTH
            found += [difference.entries_between(start, start + length) for start in starts]
        # NumPy's sort uses vectors; infinity and NaN come last.
        values = np.sort(torch.cat(found).abs_().numpy()) if found else np.zeros(0, np.float32)
        values = values[: np.searchsorted(values, np.inf)]
        if not len(values):
            return DeltaSample(0.0, 0.0, 0.0, 0.0)
        last = len(values) - 1
        half, nine, most = (float(values[int(q * last)]) for q in (0.5, 0.9, 0.99))
        return DeltaSample(half, nine, most, float(values[-1]))


class Finetuned(DeltaSource):
    """A full fine-tune as a source: its difference to the base, and what only it has.

    Args:
        difference: to the base.
    """

    def __init__(self, difference: Difference) -> None:
        base = difference.base
        self.difference = difference
        self.label = str(difference.finetuned.path)
        self.base_model_name_or_path = str(base.path)
        self.base_architectures = base.architectures
        self.base_parameter_count = sum(base.info[name].numel for name in difference)
        self.witness: dict[str, str] = {}
        self._new = difference.pairing.new

    def __getitem__(self, name: str) -> Delta | NewParameter:
        if name in self._new:
            return NewParameter(self.difference.finetuned[self._new[name]])
        return self.difference[name]

    def __iter__(self) -> Iterator[str]:
        yield from self.difference
        yield from self._new

    def __len__(self) -> int:
        return len(self.difference) + len(self._new)

    def is_new(self, name: str) -> bool:
        return name in self._new

    @cached_property
    def identity(self) -> str:
        finetuned, pairing = self.difference.finetuned, self.difference.pairing
        partners = {**pairing.common, **pairing.new}
        return str(
            content_seed(
                (name, finetuned.info[partner], finetuned[partner])
                for name, partner in sorted(partners.items())
            )
        )


@dataclass(frozen=True)
class DeltaSample:
    """Quantiles of |fine-tune - base|: the median, 90 %, 99 %, and the largest seen."""

    median: float
    q90: float
    q99: float
    largest: float

    @property
    def concern(self) -> str | None:
        """What to tell a user of a delta outside the paper's range, or None."""
        if self.q99 <= 2 * PAPER_SAFE:
            return None
        measured = (
            f"|delta| has median {self.median:.2g}, 90 % {self.q90:.2g}, 99 % {self.q99:.2g}, "
            f"largest seen {self.largest:.2g}"
        )
        if self.q90 > PAPER_FAILS:
            return (
                f"{measured}. DARE is known to fail where changes reach about {PAPER_FAILS} (Yu et "
                "al. 2024, section 4.5): is this the base it was fine-tuned from, and not one it "
                "was pre-trained further from? If so, use --drop-rate 0 --bits 4 or 1, which "
                "rounds every entry and drops none"
            )
        return (
            f"{measured}. DARE is known to hold while changes stay within about {PAPER_SAFE} (Yu "
            "et al. 2024, section 4.5): evaluate the adapter, and take a lower drop rate "
            "(--drop-rate 0.5) or --drop-rate 0 --bits 1 if it lost too much"
        )
