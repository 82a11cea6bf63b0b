"""Products of many deltas at once: each token with the delta of its own slot.

    y[t, n] += w[s] * Σ_k x[t, k] * Δ_s[n, k],  s = token_slot[t]

as Punica (Chen et al., MLSys 2024) states it for LoRA. One function, and beneath it two operators
of which torch.compile and CUDA graphs see nothing but tensors: one in place, for inference, and one
that returns the products, through which gradients flow to x. Deltas are constants to both.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from dare_adapters.kernels.backends import choose_backend
from dare_adapters.kernels.layout import WORDS, Layout, layout_from_words
from dare_adapters.kernels.packed_delta import PackedDelta

__all__ = ["sparse_delta_linear"]


def sparse_delta_linear(
    x: torch.Tensor,
    deltas: Sequence[PackedDelta | None],
    token_slot: torch.Tensor,
    y: torch.Tensor,
    *,
    transposed: bool = False,
    weights: torch.Tensor | Sequence[float] | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Add to each token, in place, the product of its slot's delta.

    Semantics: y[t, n] += w[s] * Σ_k x[t, k] * Δ_s[n, k] with s = token_slot[t], or Δ_s[k, n] where
    transposed. Summed in float32, rounded once to the dtype of y.

    Args:
        x: (T, K), any float dtype.
        deltas: one for each slot, seen as matrices (N, K), all of one shape though perhaps packed
            in different ways; None for a slot that changes nothing.
        token_slot: integers (T,), the slot of each token. A number that is no slot, such as -1,
            adds nothing: finding it out would mean to wait for an accelerator.
        y: (T, N), any float dtype; rows may lie apart, as in a slice of a wider tensor.
        transposed: the deltas are (K, N): weights of GPT-2's Conv1D are (in, out).
        weights: w (slots,), float32; default 1. A tensor of which no gradient is asked.
        backend: a name of :func:`backend_names`; "auto" takes the fastest that can be used.

    Returns:
        y.

    Raises:
        ValueError: shapes or devices do not fit, or there is no such back end.
    """
    if not _check(x, deltas, token_slot, y, transposed):
        return y
    if weights is not None and not isinstance(weights, torch.Tensor):
        weights = torch.tensor(weights, dtype=torch.float32, device=y.device)
    if weights is not None and tuple(weights.shape) != (len(deltas),):
        raise ValueError(f"weights are {tuple(weights.shape)} for {len(deltas)} deltas")
    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad):
        tensors, words = _flattened(deltas)
        made = _delta_product(x, tensors, words, token_slot, weights, transposed, backend)
        return y.add_(made)
    if torch.compiler.is_compiling():
        tensors, words = _flattened(deltas)
        _add_delta_product(x, tensors, words, token_slot, weights, y, transposed, backend)
        return y
    _run(x, deltas, token_slot, weights, y, transposed, backend)
    return y


@torch.library.custom_op("dare_adapters::add_delta_product", mutates_args=("y",))
def _add_delta_product(
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    words: Sequence[int],
    token_slot: torch.Tensor,
    weights: torch.Tensor | None,
    y: torch.Tensor,
    transposed: bool,
    backend: str,
) -> None:
    """:func:`sparse_delta_linear` of flattened deltas."""
    _run(x, _unflattened(tensors, words), token_slot, weights, y, transposed, backend)


@_add_delta_product.register_fake
def _(*arguments: Any) -> None:
    return None


@torch.library.custom_op("dare_adapters::delta_product", mutates_args=())
def _delta_product(
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    words: Sequence[int],
    token_slot: torch.Tensor,
    weights: torch.Tensor | None,
    transposed: bool,
    backend: str,
) -> torch.Tensor:
    """What is added to y, float32 (T, N)."""
    deltas = _unflattened(tensors, words)
    made = x.new_zeros(x.shape[0], _width(words, transposed), dtype=torch.float32)
    _run(x, deltas, token_slot, weights, made, transposed, backend)
    return made


@_delta_product.register_fake
def _(
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    words: Sequence[int],
    token_slot: torch.Tensor,
    weights: torch.Tensor | None,
    transposed: bool,
    backend: str,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], _width(words, transposed), dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, tensors, words, token_slot, weights, transposed, backend = inputs
    ctx.save_for_backward(token_slot, weights, *tensors)
    ctx.words, ctx.transposed, ctx.backend, ctx.dtype = words, transposed, backend, x.dtype


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    token_slot, weights, *tensors = ctx.saved_tensors
    made = _delta_product(
        gradient, tensors, ctx.words, token_slot, weights, not ctx.transposed, ctx.backend
    )
    return made.to(ctx.dtype), [None] * len(tensors), None, None, None, None, None


_delta_product.register_autograd(_backward, setup_context=_keep)


def _run(
    x: torch.Tensor,
    deltas: Sequence[PackedDelta | None],
    token_slot: torch.Tensor,
    weights: torch.Tensor | None,
    y: torch.Tensor,
    transposed: bool,
    backend: str,
) -> None:
    kind = "cpu" if y.is_cpu else y.device.type
    if torch.is_autocast_enabled(kind):  # which would multiply in half precision
        with torch.autocast(kind, enabled=False):
            return _run(x, deltas, token_slot, weights, y, transposed, backend)
    recorded = x.requires_grad or y.requires_grad
    recorded = recorded or (weights is not None and weights.requires_grad)
    if recorded and torch.is_grad_enabled():
        with torch.no_grad():
            return _run(x, deltas, token_slot, weights, y, transposed, backend)
    chosen = choose_backend(backend, x, y)
    chosen.add_product(x, deltas, token_slot, y, transposed=transposed, weights=weights)


def _flattened(deltas: Sequence[PackedDelta | None]) -> tuple[list[torch.Tensor], list[int]]:
    """Deltas as tensors and numbers, which are all that an operator can take."""
    tensors: list[torch.Tensor] = []
    words: list[int] = []
    for delta in deltas:
        if delta is None:
            words += [0] * WORDS
        else:
            tensors += delta.tensors().values()
            words += delta.layout.words()
    return tensors, words


def _unflattened(tensors: Sequence[torch.Tensor], words: Sequence[int]) -> list[PackedDelta | None]:
    deltas: list[PackedDelta | None] = []
    place = 0
    for layout in _layouts(tuple(words)):
        if layout is None:
            deltas.append(None)
            continue
        names = list(layout.declare())
        deltas.append(
            PackedDelta(layout, dict(zip(names, tensors[place : place + len(names)], strict=True)))
        )
        place += len(names)
    return deltas


@lru_cache(maxsize=256)
def _layouts(words: tuple[int, ...]) -> list[Layout | None]:
    return [layout_from_words(words[at : at + WORDS]) for at in range(0, len(words), WORDS)]


def _width(words: Sequence[int], transposed: bool) -> int:
    """N."""
    kind_at = next(at for at in range(0, len(words), WORDS) if words[at])
    return words[kind_at + (2 if transposed else 1)]


def _check(
    x: torch.Tensor,
    deltas: Sequence[PackedDelta | None],
    token_slot: torch.Tensor,
    y: torch.Tensor,
    transposed: bool,
) -> bool:
    """Refuse what does not fit; whether there is any delta."""
    given, asked = x.shape, y.shape
    if len(given) != 2 or len(asked) != 2 or token_slot.dim() != 1:
        raise ValueError(
            f"x {tuple(given)} and y {tuple(asked)} must be matrices, and token_slot "
            f"{tuple(token_slot.shape)} a vector; flatten batch and sequence to tokens"
        )
    if not given[0] == asked[0] == token_slot.shape[0]:
        raise ValueError(
            f"{given[0]} rows of x, {asked[0]} of y and {token_slot.shape[0]} token slots"
        )
    if not (x.is_floating_point() and y.is_floating_point()):
        raise ValueError(f"x and y must be floats, not {x.dtype} and {y.dtype}")
    wanted = (given[1], asked[1]) if transposed else (asked[1], given[1])
    device, any_delta = x.device, False
    together = device == y.device == token_slot.device
    for slot, delta in enumerate(deltas):
        if delta is None:
            continue
        any_delta = True
        if (delta.rows, delta.columns) != wanted:
            raise ValueError(
                f"the delta of slot {slot} is a matrix {(delta.rows, delta.columns)}; x "
                f"{tuple(given)} and y {tuple(asked)} need {wanted}"
            )
        if not (together and delta.device == device):
            raise ValueError(
                f"the delta of slot {slot} is on {delta.device}, x on {x.device}, y on {y.device}, "
                f"token_slot on {token_slot.device}"
            )
    return any_delta
