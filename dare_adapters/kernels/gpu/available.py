"""Whether kernels can run, told without importing Triton where there is no use for it."""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.util import find_spec

import torch

__all__ = ["can_compile", "can_interpret", "device_of"]

# Tensor cores with bfloat16, which the kernels are written for.
OLDEST = (8, 0)


@lru_cache(maxsize=32)
def can_compile(device: torch.device) -> bool:
    """Whether kernels are compiled for a device."""
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    if os.environ.get("TRITON_INTERPRET") == "1":
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= OLDEST


@lru_cache(maxsize=1)
def can_interpret() -> bool:
    """Whether Triton's interpreter runs them: TRITON_INTERPRET=1 when Triton was imported."""
    if find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
        return False
    import triton
    import triton.language

    return not isinstance(triton.language.sum, triton.JITFunction)


def device_of(tensor: torch.Tensor) -> torch.cuda.device:
    """A context in which a tensor's GPU is the current one; nothing where it is on none."""
    return torch.cuda.device(tensor.get_device())
