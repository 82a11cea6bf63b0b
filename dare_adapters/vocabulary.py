"""A live vocabulary that grows by an adapter's added rows, and shrinks back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from dare_adapters.live import find_module, find_tensor

__all__ = ["Resized", "grow_rows", "shrink_rows"]

_SIZES = ("num_embeddings", "out_features")


@dataclass
class Resized:
    """What :func:`shrink_rows` needs.

    Attributes:
        owner: the parameter's name.
        rows: how many it had.
        first: of the rows that the adapter brings.
        overwritten: values of those rows where the model had them already.
        attributes: (module name, attribute, value) that told that number.
        vocab_size: whether configs told it too.
    """

    owner: str
    rows: int
    first: int
    overwritten: torch.Tensor
    attributes: list[tuple[str, str, int]]
    vocab_size: bool


def grow_rows(model: nn.Module, owner: str, first: int, added: torch.Tensor) -> Resized:
    """Put rows `first` … into a parameter, and enlarge it, for every module that shares it.

    The parameter object stays, so that ties and references to it hold.
    """
    parameter = find_tensor(model, owner)
    rows, last = len(parameter), first + len(added)
    # Detached, not `.data`: autograd must see that the values changed.
    values = parameter.detach()
    resized = Resized(owner, rows, first, values[first:last].clone(), [], False)
    added = added.to(parameter.device, parameter.dtype)
    # What may run out of memory comes before the first change.
    grown = torch.cat([values[:first], added]) if last > rows else None
    if grown is None:
        values[first:last] = added
    else:
        parameter.data = grown
        _tell_modules(model, parameter, rows, last, resized)
        if rows in (_vocab_size(model), _vocab_size(model, "text_config")):
            resized.vocab_size = True
            _tell_configs(model, rows, last)
    return resized


def shrink_rows(model: nn.Module, resized: Resized) -> None:
    """Undo :func:`grow_rows`."""
    parameter = find_tensor(model, resized.owner)
    grown = len(parameter)
    if grown > resized.rows:
        parameter.data = parameter.data[: resized.rows].clone()
    old = resized.overwritten
    parameter.detach()[resized.first : resized.first + len(old)] = old
    for module, attribute, value in resized.attributes:
        setattr(find_module(model, module), attribute, value)
    if resized.vocab_size:
        _tell_configs(model, grown, resized.rows)


def _tell_modules(
    model: nn.Module, parameter: torch.Tensor, old: int, new: int, resized: Resized
) -> None:
    for name, module in model.named_modules():
        if any(own is parameter for own in module.parameters(recurse=False)):
            for attribute in _SIZES:
                if getattr(module, attribute, None) == old:
                    resized.attributes.append((name, attribute, old))
                    setattr(module, attribute, new)


def _vocab_size(model: nn.Module, part: str | None = None) -> int | None:
    config = getattr(model, "config", None)
    return getattr(getattr(config, part, None) if part else config, "vocab_size", None)


def _tell_configs(model: nn.Module, old: int, new: int) -> None:
    """`vocab_size` of the config, its text part, and of modules that keep a copy for their loss."""
    config = getattr(model, "config", None)
    holders = [config, getattr(config, "text_config", None), *model.modules()]
    for holder in holders:
        if holder is not None and getattr(holder, "vocab_size", None) == old:
            holder.vocab_size = new
