"""Other tensors in the place of a module's parameters, for as long as its forward runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["exchange", "exchanged", "tensor_of"]


def tensor_of(module: nn.Module, name: str) -> torch.Tensor:
    """A module's parameter or buffer, or one of a list of parameters that it has."""
    held, _, local = name.rpartition(".")
    found = getattr(module.get_submodule(held), local)
    assert isinstance(found, torch.Tensor)
    return found


def exchange(module: nn.Module, values: Mapping[str, Any]) -> dict[str, Any]:
    """Put tensors in the place of a module's own; what was there, to be put back in the same way.

    Not for several threads at once.
    """
    before: dict[str, Any] = {}
    for name, value in values.items():
        held, _, local = name.rpartition(".")
        holder = module.get_submodule(held)
        store: dict[str, Any] = holder.__dict__  # where FSDP has a parameter during a forward
        if local not in store:
            named: Any = holder._parameters if local in holder._parameters else holder._buffers
            store = named
        before[name], store[local] = store[local], value
    return before


@contextmanager
def exchanged(module: nn.Module, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """:func:`exchange` inside the block."""
    before = exchange(module, values)
    try:
        yield
    finally:
        exchange(module, before)
