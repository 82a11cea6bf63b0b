"""A file's tensors to a model's layers, in transformers' own loader.

`model.load_adapter` and `from_pretrained` of an adapter's directory do not ask the tuner which
tensor goes where: they rename the file's keys by rules that PEFT makes of those for the base. Such
rules cannot say where a part of fused experts is, nor how packed codes become floats that train.
So for adapters of this method PEFT's rules are exchanged for these, which look it up.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

from dare_adapters.tuner.config import DareConfig
from dare_adapters.tuner.loading import HeldTensor, decoded, held_tensors, stored_keys

__all__ = ["instead_of"]


def instead_of(plain: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """PEFT's maker of renaming rules, but for adapters of this method."""

    @functools.wraps(plain)
    def build(weight_conversions: Any, adapter_name: str, peft_config: Any = None) -> list[Any]:
        if not isinstance(peft_config, DareConfig):
            return plain(weight_conversions, adapter_name, peft_config=peft_config)
        places = _Places(peft_config, adapter_name)
        return [_Renaming(places), _Decoding(places)]

    return build


class _Places:
    """Where the tensors of an adapter are held, once it is injected."""

    def __init__(self, config: DareConfig, adapter: str) -> None:
        self._config, self._adapter = config, adapter

    def __deepcopy__(self, memo: dict[int, object]) -> _Places:
        return self

    @functools.cached_property
    def live(self) -> dict[str, str]:
        """Key in the file -> key in the model, of tensors that are held as they are stored."""
        found: dict[str, str] = {}
        for tensor in self._held:
            if not tensor.stored.decodes:
                found[tensor.file_key] = tensor.live_key
        return found

    @functools.cached_property
    def decoded(self) -> dict[str, tuple[str, HeldTensor]]:
        """Key in the file -> part and the values that it is decoded to."""
        return {
            key: (part, tensor)
            for tensor in self._held
            if tensor.stored.decodes and tensor.part == "values"
            for part, key in stored_keys(tensor.stored.placement).items()
        }

    @functools.cached_property
    def _held(self) -> list[HeldTensor]:
        model = self._config.injected_into
        return [] if model is None else list(held_tensors(model, self._adapter))


class _Renaming(WeightRenaming):  # type: ignore[misc]
    """Keys of tensors that are held as they are stored."""

    __slots__ = ("_places",)

    def __init__(self, places: _Places) -> None:
        super().__init__("dare_adapters", "dare_adapters")  # no key is renamed by pattern
        self._places = places

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        return self._places.live.get(source_key, source_key), None


class _Decoding(WeightConverter):  # type: ignore[misc]
    """Packed codes, scales and support to the floats that train in their place."""

    __slots__ = ("_places",)

    def __init__(self, places: _Places) -> None:
        parts = ["values", "scales", "support", "rows"]
        super().__init__(parts, "dare_adapters", [_Unchanged()])
        self._places = places

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        found = self._places.decoded.get(source_key)
        return (source_key, None) if found is None else (found[1].live_key, found[0])

    def convert(self, layer_name: str, **kwargs: Any) -> dict[str, torch.Tensor]:
        collected = {part: found[0] for part, found in self.materialize_tensors().items()}
        values = next(one for _, one in self._places.decoded.values() if one.live_key == layer_name)
        parts = values.stored.as_stored(collected)
        made = decoded(values.stored, parts, "the adapter")
        held = {
            tensor.part: tensor for tensor in self._places._held if (tensor.stored is values.stored)
        }
        return {tensor.live_key: made[part] for part, tensor in held.items()}


class _Unchanged(ConversionOps):  # type: ignore[misc]
    """transformers wants a converter to have one; `convert` is another."""

    def convert(self, input_dict: Any, *args: Any, **kwargs: Any) -> Any:
        return input_dict
