"""Several sources and a method, as one source: nothing is computed before it is read."""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import combinations
from typing import Any

import torch

from dare_adapters.combine.registry import Method, get_method
from dare_adapters.combine.select import Threshold, largest
from dare_adapters.combine.sparsify import RandomMasks, densities, drop_at_random, keep_largest
from dare_adapters.delta import Delta, NewParameter, NoChange, join_added_rows
from dare_adapters.errors import ArchitectureMismatchError, BaseMismatchError, CombinationError
from dare_adapters.prune import METHODS as PRUNE_METHODS
from dare_adapters.source import BaseReader, DeltaSource, Renamed

__all__ = ["BaseReader", "Combination", "Statistics"]

Statistics = Mapping[str, torch.Tensor]
"""Fisher or Gram tensors by checkpoint name."""

MASKS = ("auto", "blocked", "bernoulli")


class Combination(DeltaSource):
    """The deltas of several sources, made one by a method.

    New parameters (task heads) are not deltas and cannot be combined: each comes from the first
    source that has it; added vocabulary rows likewise, row by row. A source that does not change
    a parameter takes part with a delta of zero.

    Args:
        sources: over one base.
        weights: one for each.
        combination_type: a registered method.
        options: its options.
        seed: of its random choices; they depend on each source's content, not on its place.
        mask: "auto", "blocked" or "bernoulli": how it drops at random.
        prune: "dare", "drop_only" or "magnitude", done to every delta before the method.
        drop_rate: of that.
        base: the base's parameters, for methods that need them; may be given later.
        statistics: one mapping for each source, for methods that need them.

    Raises:
        CombinationError: an unknown method or option, or a value out of range.
        BaseMismatchError: the sources were made for different bases.
    """

    def __init__(
        self,
        sources: Sequence[DeltaSource],
        weights: Sequence[float],
        combination_type: str = "linear",
        options: Mapping[str, Any] | None = None,
        *,
        seed: int = 0,
        mask: str = "auto",
        prune: str | None = None,
        drop_rate: float | None = None,
        base: BaseReader | None = None,
        statistics: Sequence[Statistics] | None = None,
        check_base: bool = True,
    ) -> None:
        if len(weights) != len(sources):
            raise CombinationError(f"{len(weights)} weights for {len(sources)} adapters")
        self.sources, self.weights = tuple(sources), tuple(float(w) for w in weights)
        for weight in self.weights:
            if not math.isfinite(weight):
                raise CombinationError(f"a weight is {weight!r}; it must be a finite number")
        self.method: Method = get_method(combination_type)
        self.options = dict(options or {})
        self.method.check(self.options, len(sources))
        if mask not in MASKS:
            raise CombinationError(f"mask is {mask!r}; there are {', '.join(MASKS)}")
        _check_prune(prune, drop_rate)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise CombinationError(f"seed is {seed!r}; it must be a whole number")
        self.seed, self.mask, self.prune, self.drop_rate = seed, mask, prune, drop_rate
        self.base, self.statistics = base, statistics
        if self.method.statistics and statistics is None:
            raise CombinationError(
                f"{combination_type} needs the {self.method.statistics} statistics of every "
                "adapter; make them with `dare-adapters stats`"
            )
        if statistics is not None and len(statistics) != len(sources):
            raise CombinationError(f"{len(statistics)} statistics for {len(sources)} adapters")
        self._names = dict.fromkeys(sorted(set().union(*(s.keys() for s in sources))))
        self._lock = threading.Lock()
        first = self.sources[0]
        self.label = f"{combination_type}({', '.join(source.label for source in sources)})"
        self.base_model_name_or_path, self.revision = first.base_model_name_or_path, first.revision
        self.base_architectures = first.base_architectures
        self.base_parameter_count = max(source.base_parameter_count for source in sources)
        self.witness = {n: w for source in reversed(sources) for n, w in source.witness.items()}
        if check_base:
            _check_same_base(self.sources)

    def __deepcopy__(self, memo: dict[int, object]) -> Combination:
        return self  # nothing changes it

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None, "base": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> Delta | NewParameter:
        return self.parameter(name, self.base)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def is_new(self, name: str) -> bool:
        return next((s.is_new(name) for s in self.sources if name in s), False)

    def stored_bits(self, name: str) -> int:
        return max(source.stored_bits(name) for source in self.sources if name in source)

    def added_row_count(self, name: str) -> int:
        return max(source.added_row_count(name) for source in self.sources if name in source)

    @property
    def identity(self) -> str:
        description = {**self.describe(), "adapters": self._parts()}
        return hashlib.sha256(
            json.dumps(description, sort_keys=True, default=str).encode()
        ).hexdigest()

    def _parts(self) -> list[tuple[str, float]]:
        return [(s.identity, weight) for s, weight in zip(self.sources, self.weights, strict=True)]

    def describe(self) -> dict[str, Any]:
        """The recipe as plain JSON."""
        return {
            "combination_type": self.method.name,
            "options": self.options,
            "seed": self.seed,
            "mask": self.mask,
            "prune": self.prune,
            "drop_rate": self.drop_rate,
            "adapters": [
                {"source": source.label, "weight": weight, "sha256": source.identity}
                for source, weight in zip(self.sources, self.weights, strict=True)
            ],
        }

    def parameter(self, name: str, base: BaseReader | None) -> Delta | NewParameter:
        """The combined delta of one parameter, over a base that is given now.

        Raises:
            KeyError: no source has it.
            ArchitectureMismatchError: the sources have it in different shapes.
            CombinationError: the method needs a base and there is none.
        """
        found = [_of(source, name, base) for source in self.sources]
        given = [delta for delta in found if delta is not None]
        if not given:
            raise KeyError(name)
        if isinstance(given[0], NewParameter):
            return given[0]
        deltas: list[Delta] = []
        shape = given[0].shape
        first = self.sources[found.index(given[0])]
        for source, delta in zip(self.sources, found, strict=True):
            if delta is None or isinstance(delta, NewParameter):
                deltas.append(NoChange(shape))
            elif delta.shape != shape:
                raise ArchitectureMismatchError(
                    f"{source.label} changes {name} as {list(delta.shape)}, "
                    f"{first.label} as {list(shape)}; they are of different bases"
                )
            else:
                deltas.append(delta)
        combined = self._combine(name, deltas, base)
        combined_rows = join_added_rows(delta.added_rows for delta in deltas)
        if combined_rows is not None and combined.added_rows is None:
            combined.added_rows = combined_rows
        return combined

    def _combine(self, name: str, deltas: list[Delta], base: BaseReader | None) -> Delta:
        given: dict[str, Any] = {"name": name} if "name" in self.method.given else {}
        masks = RandomMasks(name, self._seeds, self.mask)
        deltas = [self._pruned(name, number, delta) for number, delta in enumerate(deltas)]
        if not self.method.on_parameters:
            if "masks" in self.method.given:
                given["masks"] = masks
            if "cutoffs" in self.method.given and self.options.get("trim_scope") == "model":
                number = self._common.index(name)
                given["cutoffs"] = [of_model[number] for of_model in self._cutoffs(base)]
            combined = self.method.function(deltas, self.weights, **self.options, **given)
            assert isinstance(combined, Delta)
            return combined
        if base is None:
            raise CombinationError(
                f"{self.method.name} works on whole parameters and needs the base: pass base="
            )
        if self.method.statistics is not None:
            assert self.statistics is not None
            given["statistics"] = [
                statistics.get(_own_name(source, name))
                for source, statistics in zip(self.sources, self.statistics, strict=True)
            ]
            if "norms" in self.method.given and self.options.get("normalize"):
                given["norms"] = self._norms
        return _WholeParameter(self, name, deltas, base, given)

    def _pruned(self, name: str, number: int, delta: Delta) -> Delta:
        """What `prune` leaves of the delta of source `number`."""
        if self.prune is None or self.drop_rate is None:
            return delta
        if self.prune == "magnitude":
            return keep_largest(delta, round(1 - self.drop_rate, 12))  # 1 - 0.9 is below 0.1
        masks, rescale = RandomMasks(name, self._prune_seeds, self.mask), self.prune == "dare"
        return drop_at_random(delta, 1 - self.drop_rate, masks, number, rescale=rescale)

    @cached_property
    def _prune_seeds(self) -> list[int]:
        """Not those of the method's own drops, which would keep all that is left or nothing."""
        return [source.mask_seed(self.seed ^ 1 << 63) for source in self.sources]

    @cached_property
    def _seeds(self) -> list[int]:
        return [source.mask_seed(self.seed) for source in self.sources]

    @cached_property
    def _common(self) -> list[str]:
        return [name for name in self._names if not self.is_new(name)]

    @cached_property
    def _norms(self) -> list[float]:
        assert self.statistics is not None
        return [
            math.sqrt(sum(float(own[name].double().square().sum()) for name in own))
            for own in self.statistics
        ]

    def _cutoffs(self, base: BaseReader | None) -> list[list[Threshold]]:
        """For each source the thresholds that keep its largest entries of the whole model."""
        with self._lock:
            if not hasattr(self, "_found_cutoffs"):
                default = self.method.options.get("density")
                shares = densities(self.options.get("density", default), len(self.sources))
                self._found_cutoffs = [
                    self._cutoffs_of(number, share, base) for number, share in enumerate(shares)
                ]
            return self._found_cutoffs

    def _cutoffs_of(self, number: int, share: float, base: BaseReader | None) -> list[Threshold]:
        source, deltas = self.sources[number], []
        for name in self._common:
            delta = _of(source, name, base)
            if not isinstance(delta, Delta):
                delta = NoChange(self._shape(name))
            deltas.append(self._pruned(name, number, delta))
        total = sum(math.prod(delta.shape) for delta in deltas)
        return largest(deltas, int(share * max(total, source.base_parameter_count)))

    def _shape(self, name: str) -> tuple[int, ...]:
        return next(source[name].shape for source in self.sources if name in source)


class _WholeParameter(Delta):
    """The delta of a method on whole parameters, computed when it is first read."""

    def __init__(
        self,
        combination: Combination,
        name: str,
        deltas: list[Delta],
        base: BaseReader,
        given: dict[str, Any],
    ) -> None:
        super().__init__(deltas[0].shape)
        self._combination, self._name, self._deltas = combination, name, deltas
        self._base, self._given = base, given
        self._lock = threading.Lock()
        self._values: torch.Tensor | None = None

    @property
    def entries_per_row(self) -> int:
        return self.columns

    def read(self, start: int, stop: int) -> tuple[None, torch.Tensor]:
        with self._lock:
            if self._values is None:
                self._values = self._compute()
            return None, self._values[start * self.columns : stop * self.columns].clone()

    def release(self) -> None:
        with self._lock:
            self._values = None

    def _compute(self) -> torch.Tensor:
        base = self._base(self._name).to(torch.float32)
        if tuple(base.shape) != self.shape:
            raise ArchitectureMismatchError(
                f"{self._name} of the base has the shape {list(base.shape)}, the adapters change "
                f"one of {list(self.shape)}"
            )
        merged = self.merged(base)
        return merged.sub(base).reshape(-1)  # merged may share the base's memory

    def merged(self, base: torch.Tensor) -> torch.Tensor:
        """The merged parameter, float32 of the parameter's shape; its own memory."""
        method = self._combination.method
        given = {**self._given, "base": base} if "base" in method.given else self._given
        parameters = [delta.dense().add_(base) for delta in self._deltas]
        options = self._combination.options
        merged = method.function(parameters, self._combination.weights, **options, **given)
        if not isinstance(merged, torch.Tensor) or merged.shape != base.shape:
            raise CombinationError(
                f"{method.name} made {getattr(merged, 'shape', type(merged))} of {self._name}, "
                f"which has the shape {list(base.shape)}"
            )
        merged = merged.to(torch.float32)
        return merged.clone() if merged is base else merged


def _of(source: DeltaSource, name: str, base: BaseReader | None) -> Delta | NewParameter | None:
    if name not in source:
        return None
    return source[name] if base is None else source.parameter(name, base)


def _own_name(source: DeltaSource, name: str) -> str:
    return source.names.get(name, name) if isinstance(source, Renamed) else name


def _check_prune(prune: str | None, drop_rate: float | None) -> None:
    if (prune is None) != (drop_rate is None):
        raise CombinationError("prune and drop_rate belong together: give both or neither")
    if prune is None or drop_rate is None:
        return
    if prune not in PRUNE_METHODS:
        raise CombinationError(f"prune is {prune!r}; there are {', '.join(PRUNE_METHODS)}")
    known = isinstance(drop_rate, (int, float)) and not isinstance(drop_rate, bool)
    if not known or not 0 <= drop_rate < 1:
        raise CombinationError(f"drop_rate is {drop_rate!r}; it must be at least 0 and below 1")


def _check_same_base(sources: Sequence[DeltaSource]) -> None:
    """Compare what sources remember of their bases.

    Raises:
        BaseMismatchError: naming two sources and the parameters that differ.
    """
    for first, other in combinations(sources, 2):
        shared = first.witness.keys() & other.witness.keys()
        wrong = sorted(name for name in shared if first.witness[name] != other.witness[name])
        renamed = isinstance(first, Renamed) or isinstance(other, Renamed)
        apart = first.witness and other.witness and not shared and not renamed
        if wrong or apart:
            listed = ", ".join(wrong[:6]) if wrong else "no parameter in common"
            raise BaseMismatchError(
                f"{first.label} and {other.label} were made over different bases "
                f"({first.base_model_name_or_path!r} and {other.base_model_name_or_path!r}): "
                f"{len(wrong)} of {len(shared)} sampled parameters differ ({listed})"
            )
