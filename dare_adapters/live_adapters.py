"""The adapters of one live model: which are loaded, which are active, and how they come and go."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from dare_adapters.base_check import check_live_base
from dare_adapters.combine.combination import Combination
from dare_adapters.delta import Delta, NewParameter, WeightedDelta, join_added_rows
from dare_adapters.errors import (
    AdapterExistsError,
    AdapterNotFoundError,
    ArchitectureMismatchError,
    UnsupportedParameterError,
    UnusedParametersWarning,
)
from dare_adapters.live import LiveParameter, is_patchable, locate
from dare_adapters.lock import WeightsLock
from dare_adapters.lora import LoraAdapter
from dare_adapters.matrix import MatrixView
from dare_adapters.patch import Change, Patch, check
from dare_adapters.source import BaseReader, DeltaSource, Renamed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["LiveAdapters", "LoadedAdapter"]

_LISTED = 6


@dataclass(frozen=True)
class LoadedAdapter:
    """What one name stands for: sources and their weights, added up.

    Attributes:
        components: the sources with their weights.
        places: for each of them, checkpoint name -> place in the model.
    """

    components: tuple[tuple[DeltaSource, float], ...]
    places: tuple[dict[str, LiveParameter], ...]


@dataclass
class LiveAdapters:
    """State of one model. It does not hold the model, so that the model can be copied with it."""

    loaded: dict[str, LoadedAdapter] = field(default_factory=dict)
    active: dict[str, float] = field(default_factory=dict)
    patch: Patch = field(default_factory=Patch)
    lock: WeightsLock = field(default_factory=WeightsLock)

    def load(
        self,
        model: PreTrainedModel,
        name: str,
        components: Sequence[tuple[DeltaSource, float]],
        *,
        check_base: bool,
        strict: bool,
    ) -> None:
        """Take adapters in under a name, after every check that can be made without a change.

        Raises:
            AdapterExistsError, ArchitectureMismatchError, BaseMismatchError,
            UnsupportedParameterError: as `load_dare_adapter` says.
        """
        with self.lock.writing():
            if name in self.loaded:
                raise AdapterExistsError(
                    f"an adapter {name!r} is loaded already ({self._names()}); choose another "
                    "adapter_name, or delete_dare_adapter it first"
                )
            with self.suspended(model):
                places = tuple(_place(model, adapter, strict) for adapter, _ in components)
                loaded = LoadedAdapter(tuple(components), places)
                for change in self._changes(model, [(loaded, 1.0)]):
                    check(model, change)
                if check_base:
                    for (adapter, _), place in zip(components, places, strict=True):
                        _check_base(model, adapter, place)
            self.loaded[name] = loaded

    def combine(
        self,
        model: PreTrainedModel,
        sources: Sequence[DeltaSource],
        weights: Sequence[float],
        combination_type: str,
        strict: bool,
        **how: Any,
    ) -> Combination:
        """Sources as one, under the names that the first which changes a weight has for it.

        Raises:
            CombinationError: as `Combination` says.
        """
        with self.lock.writing(), self.suspended(model):
            names: dict[tuple[int, int, tuple[int, ...]], str] = {}
            renamed: list[DeltaSource] = []
            for source in sources:
                found: dict[str, str] = {}
                places = _place(model, source, strict)
                for name in _changes_first(source, places):
                    region = places[name].region(model)
                    found.setdefault(names.setdefault(region, name), name)
                same = found == {name: name for name in source}
                renamed.append(source if same else Renamed(source, found))
            return Combination(renamed, weights, combination_type, **how)

    def source(self, model: PreTrainedModel, name: str) -> DeltaSource:
        """All of a loaded adapter as one source."""
        components = self.get(name).components
        if len(components) == 1 and components[0][1] == 1.0:
            return components[0][0]
        sources, weights = zip(*components, strict=True)
        return self.combine(model, sources, weights, "linear", False, check_base=False)

    def base_reader(self, model: PreTrainedModel, name: str) -> BaseReader:
        """The live weights under the checkpoint names of a loaded adapter."""
        places: dict[str, LiveParameter] = {}
        for own in self.get(name).places:
            places.update(own)
        return _base_reader(model, places)

    def activate(self, model: PreTrainedModel, weights: Mapping[str, float]) -> None:
        """Make exactly these adapters active: all or, if anything fails, none changed.

        Raises:
            AdapterNotFoundError: a name is not loaded.
        """
        with self.lock.writing():
            for name in weights:
                self.get(name)
            before = dict(self.active)
            self.patch.restore(model)
            self.active = {}
            try:
                self._apply(model, weights)
            except BaseException:
                self._apply(model, before)
                raise

    def delete(self, model: PreTrainedModel, name: str) -> None:
        """Unload an adapter; where it was active the others stay active."""
        with self.lock.writing():
            self.get(name)
            if name in self.active:
                rest = {other: w for other, w in self.active.items() if other != name}
                self.activate(model, rest)
            del self.loaded[name]

    def get(self, name: str) -> LoadedAdapter:
        """A loaded adapter.

        Raises:
            AdapterNotFoundError: there is none of that name; the message lists those there are.
        """
        if name not in self.loaded:
            raise AdapterNotFoundError(f"no adapter {name!r} is loaded; there is {self._names()}")
        return self.loaded[name]

    @contextmanager
    def suspended(self, model: PreTrainedModel) -> Iterator[None]:
        """The base's own weights inside the block; the active adapters again after it."""
        with self.lock.writing():
            weights, self.active = dict(self.active), {}
            self.patch.restore(model)
            try:
                yield
            finally:
                self._apply(model, weights)

    def keep(self) -> list[str]:
        """Make the active adapters part of the base for good, and forget all that are loaded."""
        with self.lock.writing():
            kept = list(self.active)
            self.patch.forget()
            self.active, self.loaded = {}, {}
            return kept

    def _apply(self, model: PreTrainedModel, weights: Mapping[str, float]) -> None:
        chosen = [(self.loaded[name], weight) for name, weight in weights.items()]
        self.patch.apply(model, self._changes(model, chosen))
        self.active = dict(weights)

    def _names(self) -> str:
        return ", ".join(repr(name) for name in self.loaded) or "none"

    @staticmethod
    def _changes(
        model: PreTrainedModel, chosen: Sequence[tuple[LoadedAdapter, float]]
    ) -> list[Change]:
        """What the chosen adapters do to each place, tied weights counted once.

        New parameters are not deltas and cannot be added up: they come from the first adapter
        that has them, added vocabulary rows likewise row by row.
        """
        changes: dict[tuple[int, int, tuple[int, ...]], Change] = {}
        for loaded, weight in chosen:
            for (source, own_weight), places in zip(loaded.components, loaded.places, strict=True):
                seen = set()
                base = _base_reader(model, places)
                for name in _changes_first(source, places):
                    target = places[name]
                    region = target.region(model)
                    if region in seen:
                        _refuse_two_changes(source, name, target)
                        continue
                    seen.add(region)
                    change = changes.setdefault(region, Change(name, target))
                    delta = source.parameter(name, base)
                    _contribute(change, delta, weight * own_weight)
        return list(changes.values())


def _changes_first(source: DeltaSource, names: Iterable[str]) -> list[str]:
    """Changes before new values: a new head that the model ties must not replace its embedding."""
    return sorted(names, key=source.is_new)


def _base_reader(model: PreTrainedModel, places: Mapping[str, LiveParameter]) -> BaseReader:
    """The live parameters under checkpoint names, for when they are the base's."""

    def read(name: str) -> torch.Tensor:
        view = places[name].view(model)
        return view.take(0, view.rows, None).cpu().view(places[name].shape)

    return read


def _refuse_two_changes(source: DeltaSource, name: str, target: LiveParameter) -> None:
    """A checkpoint stores a tied weight once or twice alike; a LoRA may change it in two ways.

    Raises:
        UnsupportedParameterError: it does.
    """
    if isinstance(source, LoraAdapter):
        raise UnsupportedParameterError(
            f"{source.label} changes {name}, which is tied to another weight that it changes too "
            f"({target.owner}): one tensor cannot hold both. Load the base with "
            "tie_word_embeddings=False"
        )


def _contribute(change: Change, delta: Delta | NewParameter, weight: float) -> None:
    if isinstance(delta, NewParameter):
        if change.value is None and not change.deltas:
            change.value = delta.value
        return
    if change.value is not None:
        return
    change.deltas.append(WeightedDelta(delta, weight))
    change.added_rows = join_added_rows([change.added_rows, delta.added_rows])


def _place(model: PreTrainedModel, source: DeltaSource, strict: bool) -> dict[str, LiveParameter]:
    """Where each parameter of an adapter is in the model.

    Raises:
        ArchitectureMismatchError: the model lacks parameters that the adapter changes.
    """
    found = locate(model, source)
    places = {name: place for name, place in found.items() if place is not None}
    _warn_of_tied_values(model, source, places)
    lacking = [name for name, place in found.items() if place is None]
    if not lacking:
        return places
    made_for = ", ".join(source.base_architectures) or "an unnamed architecture"
    changed = [name for name in lacking if not source.is_new(name)]
    if changed and all(source.is_new(name) for name in places):
        raise ArchitectureMismatchError(
            f"{source.label} changes {made_for}; {type(model).__name__} has none of its "
            f"{len(changed)} parameters ({_listed(changed)})"
        )
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    prefixed = prefix != "." and any(name.startswith(prefix) for name in source)
    needed = [n for n in changed if not prefixed or n.startswith(prefix)]
    if needed and strict:
        raise ArchitectureMismatchError(
            f"{source.label} changes {len(needed)} parameters of {made_for} that "
            f"{type(model).__name__} does not have: {_listed(needed)}; load the base with the "
            "class it was fine-tuned with, or pass strict=False to leave them out"
        )
    warnings.warn(
        f"{type(model).__name__} has no place for {len(lacking)} parameters of {source.label}, "
        f"which were left out: {_listed(lacking)}",
        UnusedParametersWarning,
        stacklevel=5,
    )
    return places


def _warn_of_tied_values(
    model: PreTrainedModel, source: DeltaSource, places: Mapping[str, LiveParameter]
) -> None:
    """Tell of values that have no weight of their own here, as of a head that the model ties."""
    taken = {place.region(model): n for n, place in places.items() if not source.is_new(n)}
    tied = {n: place.region(model) for n, place in places.items() if source.is_new(n)}
    left_out = [f"{name} (tied to {taken[r]})" for name, r in tied.items() if r in taken]
    if left_out:
        warnings.warn(
            f"{type(model).__name__} has no weights of their own for {_listed(left_out)}, which "
            f"{source.label} brings; if the fine-tune unties them, load the base with "
            "tie_word_embeddings=False",
            UnusedParametersWarning,
            stacklevel=6,
        )


def _check_base(
    model: PreTrainedModel, source: DeltaSource, places: Mapping[str, LiveParameter]
) -> None:
    """Compare the live weights with the adapter's witness of its base.

    Raises:
        BaseMismatchError: which parameters differ, and how far.
    """
    # Mostly all are placed already; looking up the rest walks the whole model once more.
    rest = [name for name in source.witness if name not in places]
    located = {**(locate(model, rest) if rest else {}), **places}

    def view_of(name: str) -> MatrixView | None:
        place = located[name]
        if place is None or not is_patchable(place.tensor(model)):
            return None  # offloaded or packed
        return place.view(model)

    check_live_base(
        source.witness,
        view_of,
        label=source.label,
        base=source.base_model_name_or_path,
        revision=source.revision,
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
