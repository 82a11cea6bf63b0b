"""An adapter as this process serves it: every change packed, sliced to what the rank holds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch

from dare_adapters.delta import Delta, NewParameter
from dare_adapters.errors import DareError
from dare_adapters.kernels import PackedDelta
from dare_adapters.source import DeltaSource
from dare_vllm.at_load.spare_rows import SPARE_ROWS
from dare_vllm.mixture import LOAD_FORMAT
from dare_vllm.per_request.model_sites import ModelSites, NoPlaceError, Place
from dare_vllm.per_request.refusal import listed
from dare_vllm.per_request.shards import held_spare_rows
from dare_vllm.per_request.sites import ADDED_BIAS, ADDED_WEIGHT, Change, Site

__all__ = ["PackedAdapter", "Term", "bytes_of", "fill_slot", "pack_adapter"]


@dataclass(frozen=True)
class PackedAdapter:
    """What one adapter changes on this rank.

    Attributes:
        label: what messages call it.
        changes: (place, what changes there).
        nbytes: of all changes, those in two places counted once.
        added_rows: how many tokens it has that the base does not.
    """

    label: str
    changes: Sequence[tuple[Place, PackedDelta | torch.Tensor]]
    nbytes: int
    added_rows: int = 0


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
    added: dict[str, int] = {}  # vocabulary rows that the base does not have, by parameter
    for name, places in planned:
        delta = source[name]
        reason = _unserved(delta, places, sites.spare_rows)
        if reason is not None:
            problems.add(reason, name)
        if problems.found:
            continue  # nothing is packed in vain
        assert isinstance(delta, Delta)
        packed, size = _pack(delta, places)
        changes += packed
        nbytes += size
        if delta.added_rows is not None:
            more, size = _pack_added(delta.added_rows, places)
            changes += more
            nbytes += size
            added[name] = len(delta.added_rows)
        tick()
    count = max(added.values(), default=0)
    if count:
        _check_whole_tokens(planned, added, count, sites, problems)
    if problems.found:
        raise UnservedError(problems.text())
    return PackedAdapter(source.label, changes, nbytes, count)


def _is_called(places: Sequence[Place]) -> bool:
    """Whether the model calls every layer of a parameter.

    Of layers that share its tensor one of each kind is enough: an embedding, and a head.
    """
    parts: dict[object, list[bool]] = {}
    for place in places:
        parts.setdefault((place.part, place.shard, type(place.site)), []).append(place.site.ran)
    return all(any(ran) for ran in parts.values())


def _unserved(delta: Delta | NewParameter, places: Sequence[Place], spare_rows: int) -> str | None:
    if isinstance(delta, NewParameter):
        return "new parameters, such as task heads, cannot differ by request"
    added = 0 if delta.added_rows is None else len(delta.added_rows)
    if added > spare_rows:
        room = f"{spare_rows} to spare" if spare_rows else "none to spare"
        return (
            f"its vocabulary has {added} rows more than the base's, and the engine has {room}: "
            f"start it with --load-format {LOAD_FORMAT} --model-loader-extra-config "
            f"'{json.dumps({SPARE_ROWS: added})}'"
        )
    for place in places:
        if tuple(delta.shape) != place.shard.shape:
            return (
                f"changes a shape of {list(delta.shape)}, the model's is {list(place.shard.shape)}"
            )
        if added and getattr(place.site, "added", None) is None:
            return f"has {added} rows more than the base's, and is no vocabulary"
    return None


def _check_whole_tokens(
    planned: Sequence[tuple[str, list[Place]]],
    added: dict[str, int],
    count: int,
    sites: ModelSites,
    problems: _Problems,
) -> None:
    """Tokens need an embedding and a logit, of this rank's embedding and head as many as there."""
    given = {
        place.site.name: added.get(name, 0)
        for name, places in planned
        for place in places
        if place.part == "weight"
    }
    lacking = [site.name for site in sites.vocabularies() if given.get(site.name, 0) != count]
    lacking += [name for name, rows in added.items() if rows != count]
    for name in dict.fromkeys(lacking):
        problems.add(
            f"it does not get the {count} vocabulary rows that another part of the adapter has "
            "beyond the base's; a token needs both an embedding and a logit",
            name,
        )


def _pack_added(
    added: torch.Tensor, places: Sequence[Place]
) -> tuple[list[tuple[Place, torch.Tensor]], int]:
    """The rows that this rank holds, for each of their places; they share their memory."""
    found: list[tuple[Place, torch.Tensor]] = []
    held: dict[tuple[int, int], torch.Tensor] = {}
    for place in places:
        first, last, start = held_spare_rows(place.layer)
        rows = held.setdefault((first, last), added[first:last].clone())
        part = ADDED_BIAS if place.part == "bias" else ADDED_WEIGHT
        shard = replace(place.shard, rows=(first, last), start=start)
        found.append((replace(place, part=part, shard=shard), rows))
    return found, sum(rows.nbytes for rows in held.values())


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
    if sites.mask is not None:
        sites.mask.fill(slot, max(term.adapter.added_rows for term in terms))


def bytes_of(adapters: Iterable[PackedAdapter]) -> int:
    """Bytes of adapters, those that occur twice counted once."""
    return sum({id(one): one.nbytes for one in adapters}.values())
