"""A layer's output with the base's weight, and deltas added from their packed form.

y = layer(x) + x Δᵀ for layers that multiply, y = layer(i) + Δ[i] for those that look up, where each
input may have a delta of its own. No delta becomes dense, nor a weight to which one adds rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from dare_adapters.errors import UnsupportedParameterError
from dare_adapters.kernels import PackedDelta, sparse_delta_linear
from dare_adapters.mask import matrix_shape
from dare_adapters.tuner.added_rows import GrownVocabulary
from dare_adapters.tuner.packed_base import packed_shape
from dare_adapters.tuner.stored import StoredParameter

if TYPE_CHECKING:
    from dare_adapters.tuner.layer import DareLayer

__all__ = ["better_adds", "can_add", "forward_adding", "forward_with_deltas", "must_add"]

# A copy of a smaller weight costs less than a call of a kernel.
_LARGE = 1 << 18
# Tokens that a product from the packed form is sooner done for than a copy of the weight (measured
# on two cores at 90 %, 4 bits and float32 values, 1024 to 4096 columns).
_FEW_TOKENS = 32
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def can_add(layer: DareLayer, adapters: Sequence[str], *, rows: bool = False) -> bool:
    """Whether what these adapters change can be added to the layer's output.

    Args:
        layer: to look at.
        adapters: of which it has changes.
        rows: rows that an adapter adds to a vocabulary, too; :func:`forward_with_deltas` can.
    """
    kind = _kind(layer.owner)
    if kind is None or any(local in layer.tied for local in layer.changed_by(adapters)):
        return kind is not None and _tied_whole(layer, adapters, rows)
    return all(
        _fits(layer.owner, kind, one, rows)
        for name in adapters
        for one in layer.dare_stored.get(name, ())
    )


def forward_with_deltas(
    layer: DareLayer,
    adapters: Sequence[str],
    slots: torch.Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """The layer's output, each input with the delta of its slot.

    Args:
        layer: one that :func:`can_add`, rows too.
        adapters: the adapter of each slot.
        slots: int64, of each entry of the input's first dimension; -1 for none.
        args, kwargs: of the forward.
    """
    x = args[0] if args else next(iter(kwargs.values()))
    vocabulary = GrownVocabulary.under(layer, adapters, x.device)
    if vocabulary is None:
        return _added(layer, adapters, slots, x, layer.base_layer(*args, **kwargs))
    if _kind(layer.owner) == "embedding":
        token_slot = _token_slots(slots, x)
        made = _added(layer, adapters, slots, x, layer.base_layer(vocabulary.of_base(x)))
        flat = made.reshape(-1, made.shape[-1])
        vocabulary.read(flat, x.reshape(-1), token_slot)
        return flat.view(made.shape)
    token_slot = _token_slots(slots, x[..., 0])
    made = _added(layer, adapters, slots, x, layer.base_layer(x))
    wide = vocabulary.answer(made.reshape(-1, made.shape[-1]), _matrix(x), token_slot)
    return wide.view(*made.shape[:-1], -1)


def _token_slots(slots: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The slot of each token of inputs that all have as many; int64 (tokens,)."""
    count = tokens.numel()
    return slots.repeat_interleave(count // max(len(slots), 1)).to(tokens.device)


def _added(
    layer: DareLayer,
    adapters: Sequence[str],
    slots: torch.Tensor,
    x: torch.Tensor,
    made: torch.Tensor,
) -> torch.Tensor:
    """A layer's output with each input's delta added, in place where that can be."""
    owner, kind = layer.owner, _kind(layer.owner)
    if torch.is_grad_enabled() and made.requires_grad:
        made = made.clone()
    if kind == "convolution":
        return _add_convolution(layer, owner, adapters, slots, x, made)
    token_slot = _token_slots(slots, x if kind == "embedding" else x[..., 0])
    flat = made.reshape(len(token_slot), made.shape[-1])
    for window, deltas in _weights(layer, adapters, made.device).items():
        start, rows = window
        if kind == "embedding":
            _add_rows(flat, x.reshape(-1), deltas, token_slot)
        elif kind == "transposed":
            sparse_delta_linear(_matrix(x), deltas, token_slot, flat, transposed=True)
        else:
            sparse_delta_linear(_matrix(x), deltas, token_slot, flat[:, start : start + rows])
    _add_biases(flat, layer, adapters, token_slot)
    return flat.view(made.shape)


def must_add(layer: DareLayer) -> bool:
    """Whether changes can only be added to the layer's output: its weight is packed."""
    weight = layer.owner._parameters.get("weight")
    return weight is not None and packed_shape(layer.owner, "weight", weight) is not None


def better_adds(layer: DareLayer, adapters: Sequence[str], args: tuple[Any, ...]) -> bool:
    """Whether it is cheaper to add these adapters' products than to add the adapters up first."""
    weight = layer.owner._parameters.get("weight")
    if torch.is_grad_enabled() or weight is None or weight.numel() < _LARGE or not args:
        return False
    kind, x = _kind(layer.owner), args[0]
    few = kind in ("linear", "transposed") and x.numel() // x.shape[-1] <= _FEW_TOKENS
    return (few or kind == "embedding") and can_add(layer, adapters)


def forward_adding(
    layer: DareLayer, adapters: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.Tensor:
    """The layer's output with its own weight, and what adapters add to it.

    Gradients flow to values that train.

    Raises:
        UnsupportedParameterError: an adapter brings a value of its own, or rows.
    """
    adapters = [name for name in adapters if layer.changed_by([name])]
    if not can_add(layer, adapters):
        raise UnsupportedParameterError(
            f"{type(layer.owner).__name__} has a packed weight, to which deltas can be added and "
            "nothing else: load the base in float32, bfloat16 or float16"
        )
    x = args[0] if args else next(iter(kwargs.values()))
    if not torch.is_grad_enabled():
        made: torch.Tensor = layer.base_layer(*args, **kwargs)
        for name in adapters:  # one after the other: each input has all of them
            slots = torch.zeros(len(x), dtype=torch.int64)
            made = _added(layer, [name], slots, x, made)
        return made
    made = layer.base_layer(*args, **kwargs)
    weight, bias = layer.trained_change(adapters, made.device)
    change = functional.linear(x.to(torch.float32), weight, bias)
    return made + change.to(made.dtype)


def _kind(owner: nn.Module) -> str | None:
    """How a layer uses its weight, where it does nothing else with it."""
    forward = type(owner).forward
    weight = owner._parameters.get("weight")
    if weight is not None and packed_shape(owner, "weight", weight) is not None:
        return "linear"
    if forward is nn.Linear.forward:
        return "linear"
    if forward is Conv1D.forward:
        return "transposed"
    if forward is nn.Embedding.forward:
        return None if getattr(owner, "max_norm", None) is not None else "embedding"
    if any(forward is one.forward for one in _CONVOLUTIONS):
        return "convolution"
    return None


def _fits(owner: nn.Module, kind: str, one: StoredParameter, rows: bool) -> bool:
    entry, window, local = one.held, one.placement.window, one.placement.local
    if entry.kind == "new" or (entry.added_rows and not (rows and _may_grow(owner, kind, one))):
        return False
    if local == "bias":
        return window.whole and entry.shape == window.shape
    if local != "weight":
        return False
    if kind == "linear":  # all columns of some rows: fused projections have a part for each
        weight = getattr(owner, local)
        packed = packed_shape(owner, local, weight)
        width = weight.shape[-1] if packed is None else packed[1]
        contiguous = window.positions is None and window.strides == (width, 1)
        return contiguous and len(entry.shape) == 2 and window.offset % width == 0
    if not window.whole or entry.shape != window.shape:
        return kind == "embedding" and window.whole
    return kind != "convolution" or matrix_shape(entry.shape)[0] == entry.shape[0]


def _may_grow(owner: nn.Module, kind: str | None, one: StoredParameter) -> bool:
    """Whether added rows are a vocabulary's, of a layer that has nothing else of its size."""
    alone = kind == "embedding" or (kind == "linear" and owner._parameters.get("bias") is None)
    weight = owner._parameters.get("weight")
    plain = weight is not None and packed_shape(owner, "weight", weight) is None
    return alone and plain and one.placement.local == "weight" and one.placement.window.whole


def _tied_whole(layer: DareLayer, adapters: Sequence[str], rows: bool) -> bool:
    """Whether the deltas of a tied weight are whole ones of a layer that can add them."""
    for local in layer.changed_by(adapters):
        if local not in layer.tied:
            return False
        other, there = layer.tied[local]
        kind = _kind(layer.owner)
        for name in adapters:
            for one in other.dare_stored.get(name, ()):
                if one.placement.local == there and not (
                    kind in ("linear", "embedding")
                    and one.placement.window.whole
                    and one.held.kind != "new"
                    and (not one.held.added_rows or (rows and _may_grow(layer.owner, kind, one)))
                ):
                    return False
    return True


def _weights(
    layer: DareLayer, adapters: Sequence[str], device: torch.device
) -> dict[tuple[int, int], list[PackedDelta | None]]:
    """(first row, rows) of the weight -> the delta of each slot there."""
    holder, local = layer.holder("weight")
    found: dict[tuple[int, int], list[PackedDelta | None]] = {}
    for slot, name in enumerate(adapters):
        for one in holder.dare_stored.get(name, ()):
            if one.placement.local != local:
                continue
            window, shape = one.placement.window, one.held.shape
            width = window.strides[0] if len(window.strides) == 2 else 1
            where = (window.offset // max(width, 1), shape[0])
            packed = holder.product(one, name, device)
            found.setdefault(where, [None] * len(adapters))[slot] = packed
    return found


def _matrix(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


def _add_rows(
    flat: torch.Tensor,
    index: torch.Tensor,
    deltas: Sequence[PackedDelta | None],
    token_slot: torch.Tensor,
) -> None:
    for slot, delta in enumerate(deltas):
        if delta is None:
            continue
        here = ((token_slot == slot) & (index < delta.rows)).nonzero().squeeze(1)
        if len(here):
            change = delta.rows_at(index[here])
            flat[here] = (flat[here].to(torch.float32) + change).to(flat.dtype)


def _add_biases(
    flat: torch.Tensor, layer: DareLayer, adapters: Sequence[str], token_slot: torch.Tensor
) -> None:
    table = _bias_table(layer, adapters, flat.device)
    if table is not None:
        flat.copy_((flat.to(torch.float32) + table[token_slot]).to(flat.dtype))


def _bias_table(
    layer: DareLayer, adapters: Sequence[str], device: torch.device
) -> torch.Tensor | None:
    """float32 (slots + 1, N); the last row, which -1 finds, is zero."""
    found: dict[int, torch.Tensor] = {}
    for slot, name in enumerate(adapters):
        for one in layer.dare_stored.get(name, ()):
            if one.placement.local == "bias":
                change = layer.parts(one, name)["delta"]
                found[slot] = change.detach().to(device, torch.float32)
    if not found:
        return None
    width = len(next(iter(found.values())))
    table = torch.zeros(len(adapters) + 1, width, device=device)
    for slot, change in found.items():
        table[slot] = change
    return table


def _add_convolution(
    layer: DareLayer,
    owner: Any,
    adapters: Sequence[str],
    slots: torch.Tensor,
    x: torch.Tensor,
    made: torch.Tensor,
) -> torch.Tensor:
    """x is unfolded: a position of the output is a token, of the entries that it sees."""
    spatial = made.shape[2:]
    positions = math.prod(spatial)
    token_slot = slots.repeat_interleave(positions).to(made.device)
    flat = made.movedim(1, -1).reshape(-1, made.shape[1])
    deltas = next(iter(_weights(layer, adapters, made.device).values()), None)
    if deltas is not None:
        seen = _unfolded(owner, x)  # (B, C, positions, entries)
        inputs, outputs = owner.in_channels // owner.groups, owner.out_channels // owner.groups
        for group in range(owner.groups):
            own = seen[:, group * inputs : (group + 1) * inputs]
            tokens = own.permute(0, 2, 1, 3).reshape(len(token_slot), -1)
            first, last = group * outputs, (group + 1) * outputs
            sliced = [None if one is None else one.slice_rows(first, last) for one in deltas]
            sparse_delta_linear(tokens, sliced, token_slot, flat[:, first:last])
    _add_biases(flat, layer, adapters, token_slot)
    return flat.view(len(made), *spatial, -1).movedim(-1, 1).contiguous()


def _unfolded(owner: Any, x: torch.Tensor) -> torch.Tensor:
    """What each output position of a convolution sees, (B, C, positions, entries)."""
    mode = "constant" if owner.padding_mode == "zeros" else owner.padding_mode
    padded = functional.pad(x, owner._reversed_padding_repeated_twice, mode=mode)
    count = len(owner.kernel_size)
    for axis in range(count):
        size, stride = owner.kernel_size[axis], owner.stride[axis]
        dilation, length = owner.dilation[axis], padded.shape[2 + 2 * axis]
        outputs = (length - dilation * (size - 1) - 1) // stride + 1
        index = torch.arange(outputs)[:, None] * stride + torch.arange(size) * dilation
        picked = padded.index_select(2 + 2 * axis, index.reshape(-1).to(x.device))
        padded = torch.unflatten(picked, 2 + 2 * axis, (outputs, size))
    order = [
        0,
        1,
        *(2 + 2 * axis for axis in range(count)),
        *(3 + 2 * axis for axis in range(count)),
    ]
    found = padded.permute(order)
    return found.flatten(2 + count).flatten(2, 1 + count)
