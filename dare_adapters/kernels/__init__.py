"""y += x Δᵀ straight from packed deltas: for adapters that are chosen by row or by request."""

from dare_adapters.kernels import (  # noqa: F401 (back ends)
    compiled_product,
    portable,
    reference,
    triton_product,
)
from dare_adapters.kernels.backends import backend_names, register_backend
from dare_adapters.kernels.packed_delta import PackedDelta
from dare_adapters.kernels.sparse_delta_linear import sparse_delta_linear

__all__ = ["PackedDelta", "backend_names", "register_backend", "sparse_delta_linear"]
