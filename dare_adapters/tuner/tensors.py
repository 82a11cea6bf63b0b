"""One tensor of each adapter, under the adapter's name: a ParameterDict that takes buffers too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["AdapterTensors"]


class AdapterTensors(nn.ParameterDict):
    """Parameters of adapters that train, buffers of those that are stored packed.

    What is assigned under a name stays of the kind that it was. A buffer stays of its dtype as
    well, whatever the model around it is cast to: it holds codes, and scales that belong to them.
    """

    def __setitem__(self, key: str, value: Any) -> None:
        old = self._parameters.get(key)
        if key in self._buffers and not isinstance(value, nn.Parameter):
            before = self._buffers[key]
            self._buffers[key] = value if before is None else value.to(before.dtype)
            return
        if old is not None and not isinstance(value, nn.Parameter):
            value = nn.Parameter(value.detach(), requires_grad=old.requires_grad)
        self._keys[key] = None
        if isinstance(value, nn.Parameter):
            self.register_parameter(key, value)
        else:
            self.register_buffer(key, value)

    def __getitem__(self, key: str) -> Any:
        return getattr(self, key)  # FSDP keeps it as a plain attribute

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        kept = dict(self._buffers)
        self._buffers.clear()
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._buffers.update(kept)
        for key, buffer in kept.items():
            if buffer is not None and not buffer.is_meta:
                # Bytes are moved by what moves floats, and cast by nothing.
                moved = fn(buffer.reshape(-1).view(torch.uint8))
                self._buffers[key] = moved.view(buffer.dtype).view(buffer.shape)
        return self
