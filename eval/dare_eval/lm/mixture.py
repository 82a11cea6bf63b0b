"""Which adapters a decoder wears, and how they are made one: the same words for both backends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dare_adapters.adapter import resolve_adapter
from dare_adapters.combine.registry import get_method
from dare_adapters.errors import CombinationError

__all__ = ["Mixture"]

# Options of every combination type. A harness model's own seed is another thing, so that of masks
# has a name of its own.
_OF_ALL = {"mask": "mask", "mask_seed": "seed", "prune": "prune", "drop_rate": "drop_rate"}


@dataclass(frozen=True)
class Mixture:
    """Adapters over a base; none: the base alone.

    Attributes:
        adapters: directories or hub ids of DARE adapters, mixes or LoRA adapters.
        weights: one for each.
        combination_type: `dare_adapters.method_names()`.
        options: of the combination type, and `seed`, `mask`, `prune`, `drop_rate`.
    """

    adapters: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    combination_type: str = "linear"
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_arguments(
        cls,
        adapter: str | Sequence[str] | None,
        weights: str | float | Sequence[float] | None,
        combination_type: str,
        others: dict[str, Any],
    ) -> Mixture:
        """From a harness model's arguments; takes its own out of `others`.

        Args:
            adapter: one, several joined by "+", or a sequence.
            weights: one for each, joined by "+" or in a sequence; default: 1.
            combination_type: see the class.
            others: arguments among which may be options.

        Raises:
            CombinationError: as many weights as adapters are not given, or an unknown method.
        """
        adapters = _split(adapter)
        given = [1.0] * len(adapters) if weights is None else [float(w) for w in _split(weights)]
        if len(given) != len(adapters):
            raise CombinationError(f"{len(adapters)} adapters have {len(given)} weights")
        own = {name: name for name in get_method(combination_type).options}
        options = {
            own_name: others.pop(name)
            for name, own_name in (_OF_ALL | own).items()
            if name in others
        }
        return cls(tuple(adapters), tuple(given), combination_type, options)

    def tokenizer(self) -> str | None:
        """The first adapter that brings one; None: the base's serves."""
        for adapter in self.adapters:
            folder = resolve_adapter(adapter)
            if (folder / "tokenizer_config.json").is_file():
                return str(folder)
        return None

    def to_config(self) -> dict[str, Any]:
        """Plain JSON, as `dare_vllm` reads it."""
        return {
            "adapters": [
                {"path": path, "weight": weight}
                for path, weight in zip(self.adapters, self.weights, strict=True)
            ],
            "combination_type": self.combination_type,
            **self.options,
        }


def _split(value: str | float | Sequence[Any] | None) -> list[Any]:
    if value is None or value == "":
        return []
    if isinstance(value, str):
        return [value] if Path(value).exists() else value.split("+")
    return list(value) if isinstance(value, Sequence) else [value]
