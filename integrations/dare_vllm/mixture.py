"""Which adapters, how much of each, and how they are made one: plain JSON that is checked once.

{"adapters": ["math-dare", {"path": "chat-dare", "weight": 0.5}],
 "combination_type": "dare_ties", "density": 0.5}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dare_adapters.combine.api import combination_of
from dare_adapters.combine.combination import Combination
from dare_adapters.combine.registry import get_method
from dare_adapters.errors import CombinationError
from dare_adapters.open_source import open_source

__all__ = ["LOAD_FORMAT", "Mixture", "MixturePart", "loaded_mixture"]

LOAD_FORMAT = "dare"

# Fields of a mixture beside its adapters and the options of its combination type.
_HOW = {"seed": int, "mask": str, "prune": str, "drop_rate": float}
_PART_FIELDS = ("path", "weight", "revision")


@dataclass(frozen=True)
class MixturePart:
    """One adapter of a mixture.

    Attributes:
        path: a directory or hub id of a DARE adapter, a mix or a LoRA adapter.
        weight: factor of its delta.
        revision: for hub ids.
    """

    path: str
    weight: float = 1.0
    revision: str | None = None


@dataclass(frozen=True)
class Mixture:
    """What the weights of an engine are, beside the base.

    Attributes:
        parts: the adapters; none: the base alone.
        combination_type: the method that makes one of them.
        how: `seed`, `mask`, `prune`, `drop_rate` and the method's options, those that were given.
        check_base: compare the base with the adapters' witness.
    """

    parts: tuple[MixturePart, ...] = ()
    combination_type: str = "linear"
    how: Mapping[str, Any] = field(default_factory=dict)
    check_base: bool = True

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Mixture:
        """From the fields of a mixture, every one of them checked.

        Raises:
            CombinationError: a field is unknown, of another type or out of range.
        """
        mixture, rest = cls.split(config)
        if rest:
            raise CombinationError(
                f"a mixture has no field {', '.join(map(repr, rest))}; its fields are "
                f"{', '.join(mixture._fields())}"
            )
        return mixture

    @classmethod
    def split(cls, config: Mapping[str, Any]) -> tuple[Mixture, dict[str, Any]]:
        """A mixture, and the fields that are none of its own.

        Raises:
            CombinationError: a field is of another type or out of range.
        """
        rest = dict(config)
        listed = rest.pop("adapters", [])
        if not isinstance(listed, (list, tuple)):
            raise CombinationError(f"adapters is {listed!r:.80}; it must be a list")
        parts = tuple(_part(number, item) for number, item in enumerate(listed))
        name = rest.pop("combination_type", "linear")
        if not isinstance(name, str):
            raise CombinationError(f"combination_type is {name!r:.80}; it must be a name")
        check_base = rest.pop("check_base", True)
        if not isinstance(check_base, bool):
            raise CombinationError(f"check_base is {check_base!r:.80}; it must be true or false")
        mixture = cls(parts, name, {}, check_base)
        how = {key: rest.pop(key) for key in mixture._fields() if key in rest}
        for key, kind in _HOW.items():
            _check_type(key, how.get(key), kind)
        mixture = cls(parts, name, how, check_base)
        if parts:
            options = {key: value for key, value in how.items() if key not in _HOW}
            get_method(name).check(options, len(parts))
        return mixture, rest

    def to_config(self) -> dict[str, Any]:
        """Plain JSON that :meth:`from_config` reads."""
        return {
            "adapters": [
                {"path": part.path, "weight": part.weight, "revision": part.revision}
                for part in self.parts
            ],
            "combination_type": self.combination_type,
            "check_base": self.check_base,
            **self.how,
        }

    def open(self) -> Combination | None:
        """The adapters as one source of deltas; None: there are none.

        Raises:
            AdapterNotFoundError, AdapterFormatError, BaseMismatchError, CombinationError: as
            `open_source` and `combination_of` say.
        """
        if not self.parts:
            return None
        return combination_of(
            [open_source(part.path, part.revision) for part in self.parts],
            [part.weight for part in self.parts],
            combination_type=self.combination_type,
            **self.how,
        )

    def _fields(self) -> list[str]:
        """Names of what may be set, beside adapters, combination type and check_base."""
        return [*_HOW, *get_method(self.combination_type).options]


def loaded_mixture(load_config: Any) -> Mixture:
    """The mixture that vLLM's load config names: what was loaded, or swapped in since."""
    if load_config.load_format != LOAD_FORMAT:
        return Mixture()
    return Mixture.split(load_config.model_loader_extra_config or {})[0]


def _part(number: int, item: Any) -> MixturePart:
    where = f"adapters[{number}]"
    if isinstance(item, str):
        item = {"path": item}
    if not isinstance(item, Mapping) or set(item) - set(_PART_FIELDS):
        raise CombinationError(
            f"{where} is {item!r:.120}; it must be a path, or an object of "
            f"{', '.join(_PART_FIELDS)}"
        )
    path, revision, weight = item.get("path"), item.get("revision"), item.get("weight", 1.0)
    if not isinstance(path, str) or not path:
        raise CombinationError(f"{where} has no path: the directory or hub id of an adapter")
    if revision is not None and not isinstance(revision, str):
        raise CombinationError(f"{where}.revision is {revision!r:.80}; it must be a name")
    numeric = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not numeric or not math.isfinite(weight):
        raise CombinationError(f"{where}.weight is {weight!r:.80}; it must be a finite number")
    return MixturePart(path, float(weight), revision)


def _check_type(key: str, value: Any, kind: type) -> None:
    accepted = (int, float) if kind is float else (kind,)
    if value is None or (isinstance(value, accepted) and not isinstance(value, bool)):
        return
    raise CombinationError(f"{key} is {value!r:.80}; it must be a {kind.__name__}")
