"""Which tensors an adapter has on which module of a model: settled before anything is changed."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from dare_adapters.config import ParameterEntry
from dare_adapters.errors import (
    ArchitectureMismatchError,
    UnsupportedParameterError,
    UnusedParametersWarning,
)
from dare_adapters.live import LiveParameter, locate, locate_all
from dare_adapters.mask import BernoulliSupport, matrix_shape
from dare_adapters.tensor_file import DTYPE_NAMES
from dare_adapters.tuner.config import DareConfig
from dare_adapters.tuner.names import Owner, base_model, own_tensors
from dare_adapters.tuner.packed_base import matrix_window, packed_shape
from dare_adapters.tuner.stored import Placement

__all__ = ["Plan", "plan_adapter"]

# Of fewer expected survivors a mask might keep none that matters: such parameters train whole.
_FEWEST_SURVIVORS = 16
# Rows that an adapter may add to a vocabulary, of its own: nothing is allocated for a false number.
_MOST_ADDED_ROWS = 1 << 20
_LISTED = 6


@dataclass
class Plan:
    """What is to be done to a model.

    Attributes:
        placements: path of a module -> what is placed on it.
        tied: path of a module -> for parameters that it shares with another: their names there,
            the other's path and the name there.
        unplaced: parameters of the adapter that the model has no place for.
        excluded: names of modules that were asked for and excluded.
    """

    placements: dict[str, list[Placement]] = field(default_factory=dict)
    tied: dict[str, dict[str, tuple[str, str]]] = field(default_factory=dict)
    unplaced: list[str] = field(default_factory=list)
    excluded: set[str] = field(default_factory=set)

    @property
    def paths(self) -> set[str]:
        """Of all modules that are touched."""
        return self.placements.keys() | self.tied.keys()


def plan_adapter(model: nn.Module, config: DareConfig) -> Plan:
    """Find the place of each parameter of an adapter, or choose which are to train.

    Raises:
        ArchitectureMismatchError: a described adapter changes parameters that the model lacks, or
            of other shapes.
        UnsupportedParameterError: a parameter cannot be changed.
        NoMatchingPeftModuleError: a recipe's modules are not in the model.
    """
    owners = own_tensors(model)
    model = base_model(model)
    plan = Plan()
    chosen: list[tuple[str, LiveParameter, ParameterEntry]] = []
    if config.described is not None:
        chosen += _described(model, config, owners, plan)
    if config.described is None or not config.inference_mode:
        taken = {place.owner for _, place, _ in chosen}
        chosen += _recipe(model, config, owners, plan, taken)
    first: dict[int, str] = {}
    for name, found, entry in chosen:
        owner = owners[found.owner]
        shape = packed_shape(owner.module, owner.local, owner.tensor)
        place = found if shape is None else matrix_window(found, shape)
        if first.setdefault(id(owner.tensor), place.owner) != place.owner:
            continue  # tied to one that is placed already
        _check(name, place, entry, owner)
        _put(plan, owner, name, place, entry, config)
    _tie(plan, owners, first)
    return plan


def _described(
    model: nn.Module, config: DareConfig, owners: Mapping[str, Owner], plan: Plan
) -> Iterator[tuple[str, LiveParameter, ParameterEntry]]:
    entries = config.entries
    tensors = {name: owner.tensor for name, owner in owners.items()}
    found = locate(model, entries, tensors)
    changed = [name for name, entry in entries.items() if entry.kind != "new"]
    lacking = [name for name in entries if found[name] is None]
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    prefixed = prefix != "." and any(name.startswith(prefix) for name in entries)
    needed = [
        name for name in lacking if name in changed and (not prefixed or name.startswith(prefix))
    ]
    made_for = ", ".join(config.base_architectures) or "an unnamed architecture"
    if needed:
        raise ArchitectureMismatchError(
            f"the adapter changes {len(needed)} parameters of {made_for} that "
            f"{type(model).__name__} does not have: {_listed(needed)}; load the base with the "
            "class it was fine-tuned with"
        )
    if lacking:
        warnings.warn(
            f"{type(model).__name__} has no place for {len(lacking)} parameters of the adapter, "
            f"which were left out: {_listed(lacking)}",
            UnusedParametersWarning,
            stacklevel=2,
        )
        plan.unplaced += lacking
    # Changes before new values: a new head that the model ties must not replace its embedding.
    for name in sorted(entries, key=lambda name: entries[name].kind == "new"):
        place = found[name]
        if place is not None:
            yield name, place, entries[name]


def _recipe(
    model: nn.Module,
    config: DareConfig,
    owners: Mapping[str, Owner],
    plan: Plan,
    taken: set[str],
) -> Iterator[tuple[str, LiveParameter, ParameterEntry]]:
    """The parameters that are to train, with their names in a checkpoint."""
    trains = {name: owner for name, owner in owners.items() if _trains(owner)}
    whole = [] if config.modules_to_save is None else list(config.modules_to_save)
    named: dict[str, list[tuple[str, LiveParameter]]] = {}
    tensors = {name: owner.tensor for name, owner in owners.items()}
    for name, place in locate_all(model, tensors).items():
        named.setdefault(place.owner, []).append((name, place))
    asked = config
    if config.target_modules is None:  # every module, with PEFT's exclusions
        asked = copy.copy(config)
        asked.target_modules, asked.modules_to_save = ".*", None
    matched = False
    for own, owner in trains.items():
        if own in taken:
            continue
        above = list(_ancestors(owner.module_name))
        new = any(_ends_with(path, part) for path in above for part in whole)
        if not new:
            if config.described is not None:
                continue
            wanted = _wanted(asked, above)
            matched |= wanted is not None
            if isinstance(wanted, _ExcludedModule):
                plan.excluded.update(above)
            vector = owner.tensor.dim() < 2
            if not wanted or (vector and not config.train_vectors):
                continue
        dtype, packed = owner.tensor.dtype, packed_shape(owner.module, owner.local, owner.tensor)
        for name, place in named.get(own) or [(own, _whole(own, owner.tensor))]:
            shape = packed or place.shape
            kind = torch.float32 if packed else dtype
            yield name, place, _recipe_entry(name, shape, kind, config, new)
    if not matched and config.described is None and config.target_modules is not None:
        raise NoMatchingPeftModuleError(
            f"Target modules {config.target_modules} not found in the base model. Please check "
            "the target modules and try again."
        )


def _trains(owner: Owner) -> bool:
    tensor = owner.tensor
    if packed_shape(owner.module, owner.local, tensor) is not None:
        return True
    plain = isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
    return plain and tensor.element_size() >= 2 and tensor.numel() > 0


def _wanted(asked: DareConfig, above: list[str]) -> bool | _ExcludedModule | None:
    """Whether a parameter trains, by the names of the modules around it; None: nobody asked."""
    wanted = None
    for path in above:
        found = check_target_module_exists(asked, path)
        if isinstance(found, _ExcludedModule):
            return found
        if found:
            wanted = True
    return wanted


def _ends_with(path: str, part: str) -> bool:
    return path == part or path.endswith(f".{part}")


def _ancestors(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


def _recipe_entry(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, config: DareConfig, new: bool
) -> ParameterEntry:
    stored = DTYPE_NAMES[dtype if dtype.itemsize == 2 else torch.float32]
    if new:
        return ParameterEntry("new", shape, dtype=DTYPE_NAMES[dtype])
    rows, columns = matrix_shape(shape)
    rule = config.rule
    expected = rows * columns * (1 - rule.drop_rate)
    if len(shape) < 2 or expected < _FEWEST_SURVIVORS:
        return ParameterEntry("dense", shape, dtype=stored)
    bits = 16 if dtype.itemsize == 2 else 32
    entry = ParameterEntry("sparse", shape, drop_rate=rule.drop_rate, bits=bits, dtype=stored)
    if rule.block is not None:
        entry.mask, entry.block = "blocked", rule.block
        return entry
    assert config.seed is not None
    support = BernoulliSupport(config.seed, name, rows, columns, rule.drop_rate)
    entry.mask, entry.slots = "bernoulli", support.slot_count
    entry.value_units = entry.slots
    return entry


def _whole(name: str, tensor: torch.Tensor) -> LiveParameter:
    strides = torch.empty(tensor.shape, device="meta").stride()
    return LiveParameter(name, tuple(tensor.shape), 0, tuple(strides))


def _check(name: str, place: LiveParameter, entry: ParameterEntry, owner: Owner) -> None:
    """Refuse what the model's parameter cannot take, before anything is allocated for it.

    Raises:
        ArchitectureMismatchError: it has another shape.
        UnsupportedParameterError: rows are added to what has no rows to grow.
    """
    shape, found = entry.shape, place.shape
    if entry.kind == "new" or not entry.added_rows:
        longer = len(shape) > 0 and shape[1:] == found[1:] and shape[0] < found[0]
        if shape != found and not (entry.kind != "new" and longer and place.whole):
            raise ArchitectureMismatchError(
                f"{place.owner} has the shape {list(found)}, the adapter's {name} "
                f"{list(shape)}; load the base with the class and the sizes it was fine-tuned with"
            )
        return
    if shape[1:] != found[1:] or not place.whole or shape[0] > found[0]:
        raise ArchitectureMismatchError(
            f"{place.owner} has the shape {list(found)}, the adapter's {name} adds rows to one of "
            f"{list(shape)}; it was made for another architecture"
        )
    if entry.added_rows > _MOST_ADDED_ROWS:
        raise UnsupportedParameterError(
            f"{name}: the adapter adds {entry.added_rows} rows, more than {_MOST_ADDED_ROWS}"
        )


def _put(
    plan: Plan,
    owner: Owner,
    name: str,
    place: LiveParameter,
    entry: ParameterEntry,
    config: DareConfig,
) -> None:
    there = plan.placements.setdefault(owner.path, [])
    stem = "dare_" + name.rpartition(".")[2]
    if any(other.stem == stem for other in there):
        stem = "dare_" + name.replace(".", "__")
    # Of an adapter in few bits that is not to train nothing does: all of it stays as it is stored.
    packed = any(e.bits is not None and e.bits < 16 for e in config.entries.values())
    trainable = not (packed and config.inference_mode)
    window = replace(place, owner=owner.local)
    assert config.seed is not None
    wide = config.described is not None and not config.inference_mode
    there.append(Placement(name, owner.local, window, entry, stem, trainable, wide, config.seed))


def _tie(plan: Plan, owners: Mapping[str, Owner], placed: Mapping[int, str]) -> None:
    """Note every other module that uses a placed parameter as its own."""
    for name, owner in owners.items():
        first = placed.get(id(owner.tensor))
        if first is None or first == name or owners[first].path == owner.path:
            continue
        other = owners[first]
        if other.module is owner.module:
            continue  # one module under two names
        tied = plan.tied.setdefault(owner.path, {})
        tied[owner.local] = (other.path, other.local)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
