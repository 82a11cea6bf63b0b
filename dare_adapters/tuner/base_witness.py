"""The base's own values, sampled from a model that may have adapters of any method around them."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from dare_adapters.base_check import check_live_base
from dare_adapters.live import LiveParameter, is_patchable, locate, locate_all
from dare_adapters.matrix import MatrixView
from dare_adapters.model_guards import without_dare_adapters
from dare_adapters.tuner.names import Owner, base_model, own_tensors
from dare_adapters.witness import encode_sampled, sample_positions

if TYPE_CHECKING:
    from dare_adapters.config import AdapterConfig

__all__ = ["check_base_of", "witness_of_base"]


@torch.no_grad()
def witness_of_base(model: nn.Module, left_out: Collection[str] = ()) -> dict[str, str]:
    """Sampled values of the base's parameters; of none that has adapters merged into it.

    Args:
        model: a base, or one with adapters on it.
        left_out: checkpoint names of parameters that are not the base's, as of new task heads.
    """
    model = base_model(model)
    owners = own_tensors(model)
    merged = _merged(model)
    found: dict[str, str] = {}
    seen: set[int] = set()
    places = locate_all(model, {name: owner.tensor for name, owner in owners.items()})
    with without_dare_adapters(model):  # those of `load_dare_adapter`
        for name, place in sorted(places.items()):
            owner = owners[place.owner]
            view = _own_view(place, owner, merged)
            if name in left_out or view is None or (id(owner.tensor) in seen and place.whole):
                continue
            seen.add(id(owner.tensor))
            numel = view.rows * view.columns
            index = view.on_device(sample_positions(name, numel))
            found[name] = encode_sampled(numel, view.take(0, view.rows, index).cpu())
    return found


@torch.no_grad()
def check_base_of(model: nn.Module, adapter: AdapterConfig, label: str) -> None:
    """Refuse an adapter that was made over another base than a model's.

    Parameters that are elsewhere, packed, sharded, or have adapters merged into them are not
    compared.

    Args:
        model: the base, or one with adapters on it.
        adapter: that is about to be put on it.
        label: what to call it.

    Raises:
        BaseMismatchError: which parameters differ, and how far.
    """
    model = base_model(model)
    owners = own_tensors(model)
    merged = _merged(model)
    tensors = {name: owner.tensor for name, owner in owners.items()}
    places = locate(model, adapter.witness, tensors)

    def view_of(name: str) -> MatrixView | None:
        place = places[name]
        return None if place is None else _own_view(place, owners[place.owner], merged)

    with without_dare_adapters(model):
        check_live_base(
            adapter.witness,
            view_of,
            label=label,
            base=adapter.base_model_name_or_path,
            revision=adapter.revision,
        )


def _own_view(place: LiveParameter, owner: Owner, merged: set[int]) -> MatrixView | None:
    tensor = owner.tensor
    if not is_patchable(tensor) or id(owner.module) in merged or not tensor.numel():
        return None
    return place.view_on(tensor)


def _merged(model: nn.Module) -> set[int]:
    """The modules whose weights are not the base's just now, by `id`."""
    return {
        id(layer.get_base_layer())
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer) and getattr(layer, "merged_adapters", None)
    }
