"""Other tensors in the place of a module's parameters, for as long as its forward runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["exchange", "exchanged"]


def exchange(module: nn.Module, values: Mapping[str, Any]) -> dict[str, Any]:
    """Put tensors in the place of a module's own; what was there, to be put back in the same way.

    Not for several threads at once.
    """
    before: dict[str, Any] = {}
    for name, value in values.items():
        store: dict[str, Any] = module.__dict__  # where FSDP has a parameter during a forward
        if name not in store:
            named: Any = module._parameters if name in module._parameters else module._buffers
            store = named
        before[name], store[name] = store[name], value
    return before


@contextmanager
def exchanged(module: nn.Module, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """:func:`exchange` inside the block."""
    before = exchange(module, values)
    try:
        yield
    finally:
        exchange(module, before)
