"""What a model's tensor names and config say of its layers, its vocabulary and its heads.

No architecture is listed anywhere: a stack of layers is names that differ in a counting number.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dare_adapters.checkpoint import Checkpoint, ParameterInfo
from dare_adapters.live import LEGACY_SUFFIXES

__all__ = ["Inventory", "Stack", "View", "is_first", "layer_count_key", "numbers_of_layers"]

_NUMBERED = re.compile(r"((?:[^.]+\.)*?)(\d+)\.(.+)")
_FIRST = re.compile(r"embed|embd|(^|\.)(wte|wpe|emb|shared|project_in)(\.|$)")
_NOT_FIRST = re.compile(r"embed_out|unembed")
_VOCABULARY = re.compile(r"embed|(^|[._])(wte|emb|shared|lm_head|word|head|output)([._]|$)")
_NO_VOCABULARY = re.compile(r"position|token_type|(^|\.)wpe(\.|$)|norm", re.IGNORECASE)
# Tables that old releases of transformers saved; no release reads them.
_OBSOLETE = re.compile(r"(rotary_emb\.inv_freq|\.attn\.masked_bias)$")
_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")


@dataclass(frozen=True)
class Inventory:
    """What is known of a model without reading a tensor; a Checkpoint serves as well.

    Attributes:
        info: shape and dtype of every tensor, by checkpoint name.
        config: its config.json.
    """

    info: Mapping[str, ParameterInfo]
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Stack:
    """Layers that are numbered from 0.

    Attributes:
        prefix: of their tensors' names, as "model.layers.".
        count: how many.
    """

    prefix: str
    count: int


class View:
    """A model's tensors under the names that the output will have.

    Args:
        model: the model.
        donor: whose names they are; None: its own.

    Attributes:
        info: name -> shape and dtype.
        own_name: name -> the model's own.
    """

    def __init__(self, model: Inventory | Checkpoint, donor: View | None = None) -> None:
        self.config: Mapping[str, Any] = model.config
        tensors = {name: info for name, info in model.info.items() if not _is_obsolete(name, info)}
        names = _renamed(tensors, donor.info) if donor else {name: name for name in tensors}
        self.own_name: dict[str, str] = names
        self.info: dict[str, ParameterInfo] = {name: tensors[own] for name, own in names.items()}

    @cached_property
    def stacks(self) -> tuple[Stack, ...]:
        """Its stacks of layers, the one with the most tensors first."""
        tensors: dict[str, int] = defaultdict(int)
        layers: dict[str, set[int]] = defaultdict(set)
        for name in self.info:
            if found := _NUMBERED.fullmatch(name):
                tensors[found[1]] += 1
                layers[found[1]].add(int(found[2]))
        counting = {
            prefix: len(numbers)
            for prefix, numbers in layers.items()
            if max(numbers) == len(numbers) - 1
        }
        told = numbers_of_layers(self.config)
        stacks: list[Stack] = []
        for prefix in sorted(counting, key=lambda prefix: -tensors[prefix]):
            count = counting[prefix]
            if not stacks and count not in told:
                # Layers beyond those of the config predict further tokens; they are no part.
                known = layer_count(self.config)
                stacks.append(Stack(prefix, min(count, known) if known else count))
            elif not stacks or count in told:
                stacks.append(Stack(prefix, count))
        return tuple(stacks)

    def layer(self, name: str) -> tuple[Stack, int, str] | None:
        """Stack, number and rest of the name of a tensor that is in a layer."""
        found = _NUMBERED.fullmatch(name)
        if found is None:
            return None
        number = int(found[2])
        for stack in self.stacks:
            if stack.prefix == found[1] and number < stack.count:
                return stack, number, found[3]
        return None

    def is_vocabulary(self, name: str) -> bool:
        """Whether a tensor outside the layers has a row, or an entry, for each token."""
        shape = self.info[name].shape
        size = self._setting("vocab_size")
        if not 1 <= len(shape) <= 2 or _NO_VOCABULARY.search(name):
            return False
        named = bool(_VOCABULARY.search(name))
        if not isinstance(size, int):
            return named and len(shape) == 2
        if len(shape) == 1:
            return shape[0] == size and name.endswith("bias") and shape[0] not in self._widths
        # Rows are often padded beyond the tokens; then only the name tells.
        return (shape[0] == size and (named or size not in self._widths)) or (
            named and shape[0] > size
        )

    @cached_property
    def embedding(self) -> str | None:
        """The input embedding of tokens."""
        found = [
            name
            for name in self.info
            if is_first(name) and len(self.info[name].shape) == 2 and self.is_vocabulary(name)
        ]
        return found[0] if len(found) == 1 else None

    @property
    def tied(self) -> bool | None:
        """Whether its output head is its embedding, or None where the config does not say."""
        value = self._setting("tie_word_embeddings")
        return value if isinstance(value, bool) else None

    @property
    def architectures(self) -> object:
        """Class names of the config."""
        return self.config.get("architectures")

    def _setting(self, key: str) -> object:
        inner = self.config.get("text_config")
        return self.config.get(key, inner.get(key) if isinstance(inner, Mapping) else None)

    @cached_property
    def _widths(self) -> set[int]:
        """Sizes of vectors inside the layers."""
        return {
            size
            for name, info in self.info.items()
            if self.layer(name) is not None
            for size in info.shape
        }


def is_first(name: str) -> bool:
    """Whether a tensor outside the layers is before them (an embedding) and not behind them."""
    return bool(_FIRST.search(name)) and not _NOT_FIRST.search(name)


def layer_count_key(config: Mapping[str, Any], count: int) -> str | None:
    """The config's key, with dots, that says that there are so many layers."""
    for prefix, part in _parts(config):
        for key in _COUNTS:
            if _whole(part.get(key)) == count:
                return f"{prefix}{key}"
    return None


def layer_count(config: Mapping[str, Any]) -> int | None:
    """How many layers the config says there are."""
    for _, part in _parts(config):
        for key in _COUNTS:
            if found := _whole(part.get(key)):
                return found
    return None


def numbers_of_layers(config: Mapping[str, Any]) -> set[int]:
    """Every number of layers that a config or a part of it names, as for encoder and decoder."""
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    return {
        number
        for part in parts
        for key, value in part.items()
        if ("layer" in key or key == "depth") and (number := _whole(value))
    }


def _parts(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield "", config
    if isinstance(inner := config.get("text_config"), Mapping):
        yield "text_config.", inner


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _is_obsolete(name: str, info: ParameterInfo) -> bool:
    causal_mask = name.endswith(".attn.bias") and len(info.shape) == 4
    return causal_mask or bool(_OBSOLETE.search(name))


def _renamed(
    tensors: Mapping[str, ParameterInfo], wanted: Mapping[str, ParameterInfo]
) -> dict[str, str]:
    """Wanted name -> own name, of every tensor.

    An encoder's names start with "bert." or not, by the class that saved it, and LayerNorms had
    gamma and beta once.
    """
    prefixes = [""]
    prefixes += sorted({f"{name.split('.')[0]}." for name in wanted if "." in name})
    prefixes += sorted({f"-{name.split('.')[0]}." for name in tensors if "." in name})

    def name_under(prefix: str, own: str) -> str:
        stripped = own.removeprefix(prefix[1:]) if prefix.startswith("-") else prefix + own
        for candidate in (own, stripped):
            for old, new in (("", ""), *LEGACY_SUFFIXES.items(), *_NEW_TO_OLD):
                if old and not (candidate.endswith(old) and "LayerNorm" in candidate):
                    continue
                renamed = candidate.removesuffix(old) + new
                if renamed in wanted:
                    return renamed
        return stripped

    def found(prefix: str) -> int:
        return sum(name_under(prefix, own) in wanted for own in tensors)

    best = "" if found("") == len(tensors) else max(prefixes, key=found)
    return {name_under(best, own): own for own in tensors}


_NEW_TO_OLD = tuple((new, old) for old, new in LEGACY_SUFFIXES.items())
