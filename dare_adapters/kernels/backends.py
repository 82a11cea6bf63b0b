"""The back ends of :func:`sparse_delta_linear`, of which one is chosen by name or by what fits.

A new one is a file that registers a function, imported in `kernels/__init__.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from dare_adapters.kernels.packed_delta import PackedDelta

__all__ = ["AddProduct", "Backend", "backend_names", "choose_backend", "register_backend"]

AUTO = "auto"


class AddProduct(Protocol):
    """Adds to each token of y, in place, the product of its slot's delta: what a back end is.

    It runs without gradients, without autocast, and on arguments that were checked. It sums in
    float32, rounds once to the dtype of `y`, leaves tokens of no slot as they are, bit for bit, and
    asks an accelerator for no number.

    Args:
        x: (T, K), floats.
        deltas: one for each slot; None adds nothing.
        token_slot: integers (T,); a number that is no slot adds nothing.
        y: (T, N), floats; perhaps a slice of a wider tensor.
        transposed: whether the deltas are (K, N) and not (N, K).
        weights: float32 (slots,), or None: all 1.
    """

    def __call__(
        self,
        x: torch.Tensor,
        deltas: Sequence[PackedDelta | None],
        token_slot: torch.Tensor,
        y: torch.Tensor,
        *,
        transposed: bool,
        weights: torch.Tensor | None,
    ) -> None: ...


@dataclass(frozen=True)
class Backend:
    """A back end.

    Attributes:
        serves: whether it can be used, told by x and y.
        rank: of those that can, "auto" takes the one of the highest rank; None: only by name.
    """

    name: str
    add_product: AddProduct
    serves: Callable[[torch.Tensor, torch.Tensor], bool]
    rank: int | None


_backends: dict[str, Backend] = {}
_ranked: list[Backend] = []  # of those that "auto" may take, the best first


def register_backend(
    name: str,
    *,
    serves: Callable[[torch.Tensor, torch.Tensor], bool] = lambda x, y: True,
    rank: int | None = None,
) -> Callable[[AddProduct], AddProduct]:
    """Make a function a back end; see :class:`Backend`."""

    def register(add_product: AddProduct) -> AddProduct:
        _backends[name] = Backend(name, add_product, serves, rank)
        ranked = [one for one in _backends.values() if one.rank is not None]
        _ranked[:] = sorted(ranked, key=lambda one: one.rank or 0, reverse=True)
        return add_product

    return register


def backend_names() -> list[str]:
    """The names that `backend` may have."""
    return [AUTO, *_backends]


def choose_backend(name: str, x: torch.Tensor, y: torch.Tensor) -> Backend:
    """The back end of a name.

    Raises:
        ValueError: there is no such back end, or it cannot be used here.
    """
    if name == AUTO:
        for one in _ranked:
            if one.serves(x, y):
                return one
    if name not in _backends:
        raise ValueError(f"no back end {name!r}; there are {', '.join(backend_names())}")
    if not _backends[name].serves(x, y):
        raise ValueError(
            f"back end {name!r} cannot be used on {x.device} with {x.dtype} and {y.dtype}; "
            f"take 'auto'"
        )
    return _backends[name]
