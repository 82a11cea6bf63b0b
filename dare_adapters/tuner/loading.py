"""A file's tensors to a model's layers: by PEFT, and by transformers' own loader."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from dare_adapters.config import KEY_PREFIX, ParameterEntry, tensor_key
from dare_adapters.errors import AdapterFormatError
from dare_adapters.live import BEFORE_ADAPTERS
from dare_adapters.mask import matrix_shape
from dare_adapters.sparse_delta import SparseDelta
from dare_adapters.tuner.state import DareState
from dare_adapters.tuner.stored import Placement, StoredParameter

if TYPE_CHECKING:
    from dare_adapters.tuner.config import DareConfig

__all__ = [
    "HeldTensor",
    "decoded",
    "held_tensors",
    "live_state_dict",
    "remember_conversions",
    "stored_keys",
]


class HeldTensor:
    """A tensor of an adapter on a layer.

    Attributes:
        layer: which holds it.
        stored: the parameter it belongs to.
        part: "values", "scales", …
        file_key: its key in the adapter's file.
        live_key: its key in the model's state dict.
    """

    def __init__(self, layer: DareState, stored: StoredParameter, part: str, live_key: str) -> None:
        self.layer, self.stored, self.part, self.live_key = layer, stored, part, live_key
        self.file_key = tensor_key(stored.placement.name, part)


def held_tensors(model: nn.Module, adapter: str) -> Iterator[HeldTensor]:
    """All tensors of an adapter of a model."""
    for name, layer in model.named_modules():
        if isinstance(layer, DareState):
            # The state dict of a model in FSDP does not show it.
            prefix = name.removeprefix("_fsdp_wrapped_module.").replace("_fsdp_wrapped_module.", "")
            for stored, part, container in layer.tensor_names(adapter):
                path = f"{prefix}.{container}" if prefix else container
                yield HeldTensor(layer, stored, part, f"{path}.{adapter}")


def live_state_dict(
    model: nn.Module, config: DareConfig, adapter: str, state_dict: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """A file's tensors under the keys of the model, packed ones decoded where they are to train.

    Raises:
        AdapterFormatError: a tensor is missing, of another shape than the config says, or holds
            what no adapter may hold.
    """
    found = dict(state_dict)
    prefixed = any(key.startswith(KEY_PREFIX) for key in state_dict)
    held = list(held_tensors(model, adapter))
    for stored, group in _by_parameter(held):
        keys = stored_keys(stored.placement)
        if not prefixed:
            keys = {part: key.removeprefix(KEY_PREFIX) for part, key in keys.items()}
        taken = {part: found.pop(key) for part, key in keys.items() if key in found}
        if not taken:
            continue
        if taken.keys() == stored.parts.keys():
            stored.check(taken)
        else:
            taken = decoded(stored, taken, f"adapter {adapter!r}")
        stored.forget()
        stored.loaded = True
        for tensor in group:
            found[tensor.live_key] = taken[tensor.part]
    unplaced: dict[str, torch.Tensor] = {}
    for name, entry in config.entries.items():  # what the model has no place for is kept
        for key in entry.tensors(name):
            read = key if prefixed else key.removeprefix(KEY_PREFIX)
            if read in found:
                unplaced[key] = found.pop(read)
    config.keep_unplaced(unplaced)
    return found


def _by_parameter(held: list[HeldTensor]) -> Iterator[tuple[StoredParameter, list[HeldTensor]]]:
    groups: dict[int, list[HeldTensor]] = {}
    for tensor in held:
        groups.setdefault(id(tensor.stored), []).append(tensor)
    for group in groups.values():
        yield group[0].stored, group


def stored_keys(placement: Placement) -> dict[str, str]:
    """Part -> key, of all that the file may hold for a parameter."""
    parts = ("values", "scales", "support", "delta", "rows", "value")
    return {part: tensor_key(placement.name, part) for part in parts}


def decoded(
    stored: StoredParameter, taken: dict[str, torch.Tensor], adapter: str
) -> dict[str, torch.Tensor]:
    """Packed survivors as the floats that are to train.

    Raises:
        AdapterFormatError: they are not the adapter's whose config the layer was made by.
    """
    placement = stored.placement
    packed = StoredParameter(replace(placement, trainable=False))
    if taken.keys() != packed.parts.keys() or stored.loaded:
        listed, expected = ", ".join(sorted(taken)), ", ".join(sorted(stored.parts))
        raise AdapterFormatError(
            f"the file has {listed} for {placement.name}, {adapter} takes {expected}. Training "
            "resumes from values as they are: train with bits=None, and set "
            'model.peft_config["default"].bits before the last save'
        )
    packed.check(taken)
    delta = packed.delta(taken)
    assert isinstance(delta, SparseDelta)
    floats = decode_values(delta, placement.entry)
    return {**{part: taken[part] for part in stored.parts if part in taken}, "values": floats}


def decode_values(delta: SparseDelta, entry: ParameterEntry) -> torch.Tensor:
    """Survivors as float32 values of bits=32: (R, K) of a blocked mask, (n,) of another."""
    rows, _ = matrix_shape(entry.shape)
    found = []
    for start, stop in delta.row_ranges():
        slots, matrix = delta.survivors(start, stop)
        found.append(matrix if entry.mask == "blocked" else slots.compact(matrix))
    values = torch.cat(found)
    return values.view(rows, -1) if entry.mask == "blocked" else values


def _as_stored(placement: Placement) -> Placement:
    return replace(placement, trainable=False)


def remember_conversions(model: nn.Module) -> None:
    """Keep how the base was loaded: transformers overwrites it with how an adapter was."""
    found = model.__dict__.get("_weight_conversions")
    theirs = any("base_model.model." in str(one) for one in found or ())
    if BEFORE_ADAPTERS not in model.__dict__ and hasattr(model, "base_model_prefix"):
        model.__dict__[BEFORE_ADAPTERS] = None if theirs else found
