"""Layers of other methods on the same module: their merges and ours come and go in any order.

A merge of LoRA adds to every entry and is undone by subtracting; ours remembers entries and puts
them back, which is right only where the others are merged as they were when it remembered. Where
they are not, they are brought back to that for the moment. What is left then is, bit for bit, what
there would be if the adapter had never been merged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from dare_adapters.tuner.exchange import tensor_of

__all__ = ["MergedBeside", "merged_beside", "restore_beside"]

MergedBeside = list[tuple[Any, tuple[str, ...]]]
"""Layers of other methods with the adapters that are merged in each."""

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def merged_beside(layer: nn.Module, outermost: nn.Module | None) -> MergedBeside:
    """The layers of other methods around the module that a layer changes.

    Args:
        layer: of this method; others may be inside it.
        outermost: what is now in the module's place, which others may be; None: the layer.
    """
    found: MergedBeside = []
    inner: Any = layer if outermost is None else outermost
    while isinstance(inner, nn.Module):
        if inner is not layer and isinstance(inner, BaseTunerLayer):
            found.append((inner, tuple(inner.merged_adapters)))
        inner = inner._modules.get("base_layer")
    return found


def restore_beside(
    owner: nn.Module,
    locals_: Iterable[str],
    restore: Callable[[], None],
    then: MergedBeside,
    now: MergedBeside,
) -> None:
    """Put remembered entries back, whatever was merged beside them since.

    Args:
        owner: the module.
        locals_: names of its parameters that have such entries.
        restore: puts them back.
        then: what was merged when they were remembered.
        now: what there is around the module now.
    """
    known = [id(layer) for layer, _ in then]
    # What has come since had nothing merged; what has gone since still knows how to come back.
    before = [*then, *((layer, ()) for layer, _ in now if id(layer) not in known)]
    after: MergedBeside = [(layer, tuple(layer.merged_adapters)) for layer, _ in before]
    if before == after:
        restore()
        return
    names = list(locals_)
    as_it_is = {name: tensor_of(owner, name).detach().clone() for name in names}
    try:
        _merge_exactly(before)
        remembered = {name: tensor_of(owner, name).detach().clone() for name in names}
    except BaseException:
        for name, value in as_it_is.items():
            tensor_of(owner, name).detach().copy_(value)
        raise
    restore()
    ours = {name: _differs(remembered[name], tensor_of(owner, name)) for name in names}
    _merge_exactly(after)
    for name, changed in ours.items():  # all other entries have been spared the way there and back
        made = tensor_of(owner, name).detach()
        if changed is not None and made.shape == as_it_is[name].shape:
            made.copy_(torch.where(changed, made, as_it_is[name]))


def _merge_exactly(wanted: MergedBeside) -> None:
    """Merge in each layer what is wanted, and nothing else."""
    for layer, _ in wanted:
        if layer.merged_adapters:
            layer.unmerge()
    for layer, names in wanted:
        if names:
            layer.merge(adapter_names=list(names))


def _differs(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor | None:
    """Which entries have other bits; None where the shapes differ."""
    if one.shape != other.shape:
        return None
    bits = _BITS[one.element_size()]
    return one.contiguous().view(bits) != other.detach().contiguous().view(bits)
