"""A weight that is computed when something is computed with it.

Models look at `layer.weight` for its dtype or device far more often than they multiply with it,
and PyTorch's own attention and fast paths multiply with it without calling the layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map

__all__ = ["LazyWeight", "lazy_weight"]

_PLAIN: frozenset[Any] = frozenset(
    getattr(torch.Tensor, name).__get__
    for name in (
        "dtype", "device", "shape", "ndim", "is_meta", "is_cuda", "is_cpu", "is_sparse", "layout",
        "is_quantized", "is_leaf", "itemsize", "nbytes", "is_nested", "is_mkldnn",
    )
) | {
    torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.stride,
    torch.Tensor.element_size, torch.Tensor.is_floating_point, torch.Tensor.is_complex,
    torch.Tensor.data_ptr, torch.Tensor.is_contiguous, torch.Tensor.get_device,
    torch.Tensor.__len__, torch.Tensor.ndimension, torch.Tensor.nelement,
    torch.Tensor.untyped_storage, torch.Tensor.is_inference,
}  # fmt: skip


class LazyWeight(torch.Tensor):
    """The base's weight to whoever asks what it is, the adapters' to whoever computes with it."""

    _compute: Callable[[], torch.Tensor]

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _PLAIN:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        args, kwargs = tree_map(_computed, (args, kwargs))
        return function(*args, **kwargs)


def lazy_weight(base: torch.Tensor, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The base's weight, for which `compute()` stands in whatever is computed with it."""
    if torch.compiler.is_compiling():
        return compute()
    made: LazyWeight = base.detach().as_subclass(LazyWeight)
    made._compute = compute
    return made


def _computed(value: Any) -> Any:
    return value._compute() if isinstance(value, LazyWeight) else value
