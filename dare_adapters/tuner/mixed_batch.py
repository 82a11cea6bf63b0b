"""Rows of one batch under different adapters.

`model(..., adapter_names=["math", "chat", "__base__"])`: inside it every layer knows the adapter of
each row. Layers that multiply or look up do so with the base for all rows and add each row's own
delta from its packed form (:mod:`side_path`); all others run once for each adapter, on its rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from dare_adapters.errors import UnsupportedParameterError
from dare_adapters.tuner.layer import DareBystander, DareLayer
from dare_adapters.tuner.mixed_vocabulary import forward_known_words, widened, words_checked
from dare_adapters.tuner.side_path import can_add, forward_with_deltas
from dare_adapters.tuner.state import DareState

if TYPE_CHECKING:
    from dare_adapters.tuner.model import DareModel

__all__ = ["BASE", "mixed_batch", "mixed_forward"]

# What PEFT calls a row without an adapter.
BASE = "__base__"
# Attentions that make one bias for all rows, with a layer that is given positions and no rows.
_BIAS = "compute_bias"


@contextmanager
def mixed_batch(
    model: DareModel, names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[None]:
    """Inside the block each row of a batch is answered by the adapter of its name.

    Args:
        model: the tuner.
        names: one for each row; `"__base__"` for none.
        args, kwargs: of the forward or `generate` that follows.

    Raises:
        ValueError: in training, while adapters are merged, for names that are not loaded, or for
            more or fewer of them than rows.
    """
    _check(model, names, args, kwargs)
    copies = _copies(model.model, kwargs)
    expanded = [name for name in names for _ in range(copies)]
    encoder = _encoder(model.model)
    inside = set() if encoder is None else set(encoder.modules())
    layers = [layer for layer in model.model.modules() if isinstance(layer, DareState)]
    owners = _exchanged_forwards(model.model, layers)
    for layer in layers:
        layer.rows = list(names) if copies > 1 and layer in inside else expanded
        layer.forget_products()
    try:
        for owner, name, forward in owners:
            owner.__dict__[name] = forward
        with words_checked(model.model, [_adapters(name) for name in names], args, kwargs):
            yield
    finally:
        for owner, name, _ in owners:
            owner.__dict__.pop(name, None)
        for layer in layers:
            layer.rows = None


def mixed_forward(layer: DareLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A layer's forward, each row under its own adapter."""
    rows = layer.rows
    assert rows is not None
    present = [name for name in dict.fromkeys(rows) if layer.changed_by([name])]
    if not present:
        return layer.base_layer(*args, **kwargs)
    if len(set(rows)) == 1:
        return layer.forward_with(present, args, kwargs)
    count = _first_dimension(args, kwargs)
    if isinstance(layer.owner, nn.Embedding) and count == 1:  # positions, the same for all rows
        args = tuple(_repeated(one, len(rows)) for one in args)
        count = len(rows)
    per_row = _inputs_per_row(layer, len(rows), count, args, kwargs)
    assert count is not None
    if can_add(layer, present, rows=True):
        return forward_with_deltas(layer, present, _slots(rows, present, per_row), args, kwargs)
    return _by_adapter(layer, rows, per_row, count, args, kwargs)


def _inputs_per_row(
    layer: DareLayer, rows: int, count: int | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> int:
    """1, or the length of the rows where these are laid out one after the other.

    Raises:
        ValueError: the input is not that of as many rows.
    """
    x = next((one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)), None)
    laid_out = x is not None and x.dim() == (1 if isinstance(layer.owner, nn.Embedding) else 2)
    if count is None or count % rows or (count != rows and not laid_out):
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{rows} and {count} respectively, of a {type(layer.owner).__name__}. A layer that is "
            "computed once for all rows cannot have an adapter for each: pass rows of one adapter "
            "at a time"
        )
    return count // rows


def _by_adapter(
    layer: DareLayer,
    rows: Sequence[str],
    per_row: int,
    count: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    def run(name: str, index: torch.Tensor) -> Any:
        own_args, own_kwargs = _taken((args, kwargs), index, count)
        return forward_known_words(layer, _adapters(name), own_args, own_kwargs)

    return _joined(rows, per_row, run)


def _joined(rows: Sequence[str], per_row: int, run: Any) -> Any:
    """The outputs of the rows of each adapter, in the order of the batch."""
    outputs, places = [], []
    for name in dict.fromkeys(rows):
        here = [row for row, own in enumerate(rows) if own == name]
        index = (torch.tensor(here)[:, None] * per_row + torch.arange(per_row)).reshape(-1)
        outputs.append(run(name, index))
        places.append(index)
    order = torch.cat(places).argsort()
    counts = [len(place) for place in places]
    return _gathered(outputs, counts, order)


def _gathered(outputs: list[Any], counts: list[int], order: torch.Tensor) -> Any:
    first = outputs[0]
    if isinstance(first, torch.Tensor):
        outputs = widened(outputs)
        if not all(len(one) == count for one, count in zip(outputs, counts, strict=True)):
            raise UnsupportedParameterError(
                f"an output of shape {list(first.shape)} cannot be put together from rows of "
                "several adapters: pass rows of one adapter at a time"
            )
        return torch.cat(outputs).index_select(0, order.to(first.device))
    if isinstance(first, (tuple, list)):
        parts = [_gathered(list(part), counts, order) for part in zip(*outputs, strict=True)]
        return type(first)(parts) if not hasattr(first, "_fields") else type(first)(*parts)
    if isinstance(first, dict):
        return type(first)(
            (key, _gathered([one[key] for one in outputs], counts, order)) for key in first
        )
    return first


def _taken(values: Any, index: torch.Tensor, count: int) -> Any:
    """Of every tensor with an entry for each input, those at `index`."""

    def take(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.dim() and len(value) == count:
            return value.index_select(0, index.to(value.device))
        return value

    return tree_map(take, values)


def _adapters(name: str) -> list[str]:
    return [] if name == BASE else [name]


def _slots(rows: Sequence[str], present: Sequence[str], per_row: int) -> torch.Tensor:
    """The slot of each input, -1 where no adapter changes the layer; int64 (inputs,)."""
    number = {name: slot for slot, name in enumerate(present)}
    return torch.tensor([number.get(name, -1) for name in rows]).repeat_interleave(per_row)


def _exchanged_forwards(
    model: nn.Module, layers: Sequence[DareState]
) -> list[tuple[nn.Module, str, Any]]:
    """Methods of modules that cannot run for several adapters at once: module, name, instead."""
    found: list[tuple[nn.Module, str, Any]] = []
    for layer in layers:
        if isinstance(layer, DareBystander):
            owner = layer.around
            found.append((owner, "forward", _forward_by_rows(owner, layer, owner is model)))
    for module in model.modules():
        children = module._modules.values()
        if callable(getattr(module, _BIAS, None)) and any(
            isinstance(child, DareLayer) and isinstance(child.owner, nn.Embedding)
            for child in children
        ):
            found.append((module, _BIAS, _bias_by_rows(module)))
    return found


def _forward_by_rows(owner: nn.Module, layer: DareBystander, is_root: bool) -> Any:
    """A module's forward, once for each adapter that changes its own parameters."""
    plain = owner.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        rows = layer.rows
        if rows is None or not layer.changed_by(rows):
            return plain(*args, **kwargs)
        if len(set(rows)) == 1:
            layer.exchange_for(rows[:1])
            return plain(*args, **kwargs)
        if is_root:
            listed = ", ".join(layer.changed_by(rows))
            raise UnsupportedParameterError(
                f"the adapters change {listed} of the whole {type(owner).__name__}, which answers "
                "for all rows at once: pass rows of one adapter at a time"
            )
        count = _first_dimension(args, kwargs)
        if count is None or count % len(rows):
            raise UnsupportedParameterError(
                f"{type(owner).__name__} is given {count} inputs for a batch of {len(rows)} rows, "
                "and its own parameters differ by row: pass rows of one adapter at a time"
            )

        def run(name: str, index: torch.Tensor) -> Any:
            own_args, own_kwargs = _taken((args, kwargs), index, count)
            with _all_rows(owner, name, len(index) * len(rows) // count):
                layer.exchange_for(_adapters(name))
                return plain(*own_args, **own_kwargs)

        return _joined(rows, count // len(rows), run)

    return forward


def _bias_by_rows(module: nn.Module) -> Any:
    """An attention's bias, for each row by its adapter; (rows, heads, queries, keys)."""
    plain = getattr(module, _BIAS)
    layer = next(one for one in module._modules.values() if isinstance(one, DareLayer))

    def compute_bias(*args: Any, **kwargs: Any) -> Any:
        rows = layer.rows
        if rows is None or len(set(rows)) == 1:
            return plain(*args, **kwargs)
        made = {}
        for name in dict.fromkeys(rows):
            with _all_rows(module, name, 1):
                made[name] = plain(*args, **kwargs)
        return torch.cat([made[name] for name in rows])

    return compute_bias


@contextmanager
def _all_rows(module: nn.Module, name: str, count: int) -> Iterator[None]:
    """One adapter for all layers in a module."""
    layers = [layer for layer in module.modules() if isinstance(layer, DareState)]
    before = [layer.rows for layer in layers]
    for layer in layers:
        layer.rows = [name] * count
    try:
        yield
    finally:
        for layer, rows in zip(layers, before, strict=True):
            layer.rows = rows


def _first_dimension(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.dim():
            return len(value)
    return None


def _repeated(value: Any, count: int) -> Any:
    if isinstance(value, torch.Tensor) and value.dim() and len(value) == 1:
        return value.expand(count, *value.shape[1:])
    return value


def _check(
    model: DareModel, names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"adapter_names is {names!r:.60}; it must be a list, a name for each row")
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    unknown = set(names) - {BASE} - model.peft_config.keys()
    if unknown:
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}"
        )
    if any(isinstance(one, DareState) and one.merged_adapters for one in model.modules()):
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call "
            "`unmerge_adapter` first."
        )
    count = _first_dimension(args, kwargs)
    if count is not None and count != len(names):
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(names)} and {count} respectively."
        )


def _copies(model: nn.Module, kwargs: dict[str, Any]) -> int:
    """How many times `generate` will repeat each row: its beams, or the answers it returns."""
    given = kwargs.get("generation_config")
    default = getattr(model, "generation_config", None)

    def setting(name: str) -> int:
        for value in (kwargs.get(name), getattr(given, name, None), getattr(default, name, None)):
            if isinstance(value, int):
                return value
        return 1

    names = ("num_beams", "num_return_sequences")
    asked = any(name in kwargs for name in (*names, "generation_config"))
    return max(1, *(setting(name) for name in names)) if asked else 1


def _encoder(model: nn.Module) -> nn.Module | None:
    """The encoder of an encoder-decoder, whose rows `generate` does not repeat."""
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False) or not hasattr(model, "get_encoder"):
        return None
    found: Any = model
    encoder: nn.Module = found.get_encoder()
    return encoder
