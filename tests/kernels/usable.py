"""Which back ends can be used on a device here."""

from __future__ import annotations

import torch

from dare_adapters.kernels import backend_names
from dare_adapters.kernels.backends import choose_backend


def usable_backends(device: str = "cpu") -> list[str]:
    """Their names; "auto" among them."""
    example = torch.zeros(1, 1, device=device)
    found = []
    for name in backend_names():
        try:
            choose_backend(name, example, example)
        except ValueError:
            continue
        found.append(name)
    return found
