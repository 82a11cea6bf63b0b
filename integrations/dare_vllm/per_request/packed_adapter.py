"""An adapter as this process serves it: every change packed, sliced to what the rank holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from dare_adapters.delta import Delta, NewParameter
from dare_adapters.errors import DareError
from dare_adapters.kernels import PackedDelta
from dare_adapters.source import DeltaSource
from dare_vllm.per_request.model_sites import ModelSites, NoPlaceError, Place
from dare_vllm.per_request.refusal import listed
from dare_vllm.per_request.sites import Change, Site

__all__ = ["PackedAdapter", "Term", "bytes_of", "fill_slot", "pack_adapter"]


@dataclass(frozen=True)
class PackedAdapter:
    """What one adapter changes on this rank.

    Attributes:
        label: what messages call it.
        changes: (place, what changes there).
        nbytes: of all changes, those in two places counted once.
    """

    label: str
    changes: Sequence[tuple[Place, PackedDelta | torch.Tensor]]
    nbytes: int


@dataclass(frozen=True)
class Term:
    """An adapter and the factor that it is added with: a mix has several."""

    adapter: PackedAdapter
    weight: float = 1.0


@dataclass
class _Problems:
    """Parameters that cannot be served, by reason."""

    found: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        self.found.setdefault(reason, []).append(name)

    def text(self) -> str:
        return "; ".join(f"{listed(names)}: {reason}" for reason, names in self.found.items())


class UnservedError(DareError):
    """Parts of an adapter have no place in a served model; the message names them."""


def pack_adapter(
    source: DeltaSource, sites: ModelSites, tick: Callable[[], object] = lambda: None
) -> PackedAdapter:
    """Pack a source for a model, or say all that stands in the way.

    Args:
        source: of deltas by checkpoint name.
        sites: of the model.
        tick: called after each parameter.

    Raises:
        UnservedError: parameters that cannot be changed per request, by name, with reasons.
    """
    problems = _Problems()
    planned: list[tuple[str, list[Place]]] = []
    started = any(site.ran for site in sites.sites())
    for name in source:
        if source.is_new(name):
            problems.add("new parameters, such as task heads, cannot differ by request", name)
            continue
        try:
            if sites.tied_to_other(name, source):
                continue  # one tensor in the model; the embedding's delta is taken, as on loading
            places = sites.places(name)
        except NoPlaceError as error:
            problems.add(str(error), name)
            continue
        if started and places and not _is_called(places):
            problems.add("the model does not call that layer where a change could be added", name)
        planned.append((name, places))
    changes: list[tuple[Place, PackedDelta | torch.Tensor]] = []
    nbytes = 0
    for name, places in planned:
        delta = source[name]
        reason = _unserved(delta, places)
        if reason is not None:
            problems.add(reason, name)
        if problems.found:
            continue  # nothing is packed in vain
        assert isinstance(delta, Delta)
        packed, size = _pack(delta, places)
        changes += packed
        nbytes += size
        tick()
    if problems.found:
        raise UnservedError(problems.text())
    return PackedAdapter(source.label, changes, nbytes)


def _is_called(places: Sequence[Place]) -> bool:
    """Whether the model calls every layer of a parameter, or one of those that share its tensor."""
    parts: dict[object, list[bool]] = {}
    for place in places:
        parts.setdefault((place.part, place.shard), []).append(place.site.ran)
    return all(any(ran) for ran in parts.values())


def _unserved(delta: Delta | NewParameter, places: Sequence[Place]) -> str | None:
    if isinstance(delta, NewParameter):
        return "new parameters, such as task heads, cannot differ by request"
    if delta.added_rows is not None and len(delta.added_rows):
        return (
            f"its vocabulary has {len(delta.added_rows)} rows more than the base's; all requests "
            "share the base's vocabulary"
        )
    for place in places:
        if tuple(delta.shape) != place.shard.shape:
            return (
                f"changes a shape of {list(delta.shape)}, the model's is {list(place.shard.shape)}"
            )
    return None


def _pack(
    delta: Delta, places: Sequence[Place]
) -> tuple[list[tuple[Place, PackedDelta | torch.Tensor]], int]:
    """A delta for each of its places; equal slices share their memory."""
    made: dict[tuple[tuple[int, int], tuple[int, int]], PackedDelta | torch.Tensor] = {}
    whole: PackedDelta | None = None
    found: list[tuple[Place, PackedDelta | torch.Tensor]] = []
    for place in places:
        key = place.shard.rows, place.shard.columns
        if key not in made and len(delta.shape) == 1:
            made[key] = delta.dense()[slice(*key[0])].clone()
        elif key not in made:
            whole = PackedDelta.from_delta(delta) if whole is None else whole
            made[key] = _sliced(whole, *key)
        found.append((place, made[key]))
    return found, sum(one.nbytes for one in made.values())


def _sliced(whole: PackedDelta, rows: tuple[int, int], columns: tuple[int, int]) -> PackedDelta:
    part = whole if rows == (0, whole.rows) else whole.slice_rows(*rows)
    return part if columns == (0, whole.columns) else part.slice_columns(*columns)


def fill_slot(slot: int, terms: Sequence[Term], sites: ModelSites) -> None:
    """Let rows of a slot have the sum of some adapters."""
    sites.clear(slot)
    device = sites.rows.device
    gathered: dict[tuple[int, str, int], tuple[Site, list[Change]]] = {}
    for term in terms:
        for place, delta in term.adapter.changes:
            key = id(place.site), place.part, place.shard.start
            _, changes = gathered.setdefault(key, (place.site, []))
            same = isinstance(delta, torch.Tensor) or delta.device == device
            changes.append(Change(delta if same else delta.to(device), term.weight))
    for (_, part, start), (site, changes) in gathered.items():
        site.fill(slot, part, start, changes)


def bytes_of(adapters: Iterable[PackedAdapter]) -> int:
    """Bytes of adapters, those that occur twice counted once."""
    return sum({id(one): one.nbytes for one in adapters}.values())
