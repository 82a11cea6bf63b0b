"""Gram matrices of what goes into linear layers: which directions of input a weight is used in.

For merging by RegMean (Jin et al. 2023, arXiv 2212.09849).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dare_adapters.errors import DareError
from dare_adapters.live import LiveParameter
from dare_adapters.statistics.memory import require_memory
from dare_adapters.statistics.modes import evaluating
from dare_adapters.statistics.places import find_places

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["LinearWeight", "gram_matrices", "linear_weights"]

Batch = Mapping[str, torch.Tensor]


def gram_matrices(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    *,
    names: Iterable[str] | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    mask_padding: bool = False,
) -> dict[str, torch.Tensor]:
    """XᵀX / n of the inputs of every linear layer, with the model in eval mode.

    X has a row for each of the n positions of all batches, padding among them, as in MergeLM's
    `regmean_merging`. Layers are `nn.Linear` and GPT-2's `Conv1D` (MergeLM: `nn.Linear` alone).
    Left out are layers that never run (also those whose weight another module uses directly) and
    those that share their weight with an embedding.

    Checkpoint weights that one live layer holds side by side have one Gram matrix, in one memory.

    Memory: 4 · inputs² bytes for each layer, 0.5 GB where it has 11008 inputs; where all of them
    do not fit, `include` some, and leave the others without.

    Args:
        model: with whatever adapters are active.
        batches: of the model's inputs; labels are not used.
        names: checkpoint names; by default those that saving the model would write.
        include, exclude: glob patterns of the weights' names.
        mask_padding: leave positions out where `attention_mask` is 0. It applies to inputs of
            (examples, tokens, inputs) and (examples · tokens, inputs), not to those of poolers,
            heads and experts, which are not one row a token.

    Returns:
        Checkpoint name of the weight -> float32, on the CPU: (inputs, inputs) where the weight is
        (outputs, inputs), (1, inputs, inputs) where it is (inputs, outputs), as Conv1D's are.

    Raises:
        DareError: no layer ran, an input was not finite, or memory is too small.
        UnsupportedParameterError: a parameter is on the meta device.
        ValueError: patterns that leave nothing.
    """
    weights = linear_weights(model, names, include, exclude)
    inputs = {id(weight.owner): weight.inputs for weight in weights.values()}
    require_memory(
        sum(4 * size * size for size in inputs.values()),
        f"the Gram matrices of {len(inputs)} layers",
        "choose some of them with include (--include PATTERN)",
    )
    sums = _Sums(mask_padding)
    with _watching(model, set(inputs), sums), evaluating(model), torch.no_grad():
        for batch in batches:
            sums.begin(batch)
            model(**{k: v.to(model.device) for k, v in batch.items() if k != "labels"})
    found = {n: sums.of(weight) for n, weight in weights.items() if sums.ran(weight)}
    if not found:
        raise DareError("no linear layer ran: there were no batches, or include leaves none")
    for name, gram in found.items():
        if not bool(torch.isfinite(gram).all()):
            raise DareError(f"the Gram matrix of {name} is not finite; use the model in float32")
    return found


@dataclass(frozen=True)
class LinearWeight:
    """A checkpoint weight that is all or some of a linear layer's outputs.

    Attributes:
        owner: the layer's live weight.
        inputs: of the layer.
        input_axis: which axis of the checkpoint weight the inputs are: 1 in (outputs, inputs).
    """

    owner: nn.Parameter
    inputs: int
    input_axis: int


def linear_weights(
    model: PreTrainedModel,
    names: Iterable[str] | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> dict[str, LinearWeight]:
    """The weights of a live model's linear layers by checkpoint name.

    Raises:
        UnsupportedParameterError, ValueError: as `gram_matrices` says.
    """
    live_axes = _live_input_axes(model)
    found = {}
    for name, place in find_places(model, names, include, exclude).items():
        owner = place.tensor(model)
        live_axis = live_axes.get(id(owner))
        if live_axis is None:
            continue
        axis = _input_axis(place, (owner.shape[0], owner.shape[1]), live_axis)
        if axis is not None:
            assert isinstance(owner, nn.Parameter)
            found[name] = LinearWeight(owner, owner.shape[live_axis], axis)
    return found


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D)) and isinstance(module.weight, nn.Parameter)


def _live_input_axes(model: nn.Module) -> dict[int, int]:
    """id of a linear layer's weight -> which of its axes the inputs are."""
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return {
        id(module.weight): 1 if isinstance(module, nn.Linear) else 0
        for module in model.modules()
        if _is_linear(module) and id(module.weight) not in embedded
    }


def _input_axis(place: LiveParameter, live: tuple[int, int], live_axis: int) -> int | None:
    """The axis of a window on which the layer's inputs lie in order, each once; or None."""
    if len(place.shape) != 2:
        return None
    for axis in (1, 0):
        if place.shape[axis] != live[live_axis]:
            continue
        if place.positions is not None:
            flat = place.positions.view(place.shape)
            along = flat % live[1] if live_axis == 1 else flat // live[1]
            order = torch.arange(live[live_axis]).view((1, -1) if axis == 1 else (-1, 1))
            if bool((along == order).all()):
                return axis
            continue
        inward, outward = place.strides[axis], place.strides[1 - axis]
        if live_axis == 1:
            apart = place.offset % live[1] == 0 and outward % live[1] == 0
        else:
            apart = place.offset + (place.shape[1 - axis] - 1) * outward < live[1]
        if apart and inward == (1 if live_axis == 1 else live[1]):
            return axis
    return None


class _Sums:
    """XᵀX and the number of rows so far, by the id of the live weight."""

    def __init__(self, mask_padding: bool) -> None:
        self.totals: dict[int, torch.Tensor] = {}
        self.rows: dict[int, int] = {}
        self._divided: set[int] = set()
        self._mask_padding = mask_padding
        self._real: torch.Tensor | None = None

    def begin(self, batch: Batch) -> None:
        """The batch whose inputs come next."""
        mask = batch.get("attention_mask") if self._mask_padding else None
        self._real = mask.bool() if mask is not None and mask.dim() == 2 else None

    def ran(self, weight: LinearWeight) -> bool:
        """Whether its layer had any input."""
        return self.rows.get(id(weight.owner), 0) > 0

    def of(self, weight: LinearWeight) -> torch.Tensor:
        """XᵀX / n, in a shape that tells where the weight has its inputs."""
        key = id(weight.owner)
        if key not in self._divided:
            self._divided.add(key)
            self.totals[key].div_(self.rows[key])
        return self.totals[key][None] if weight.input_axis == 0 else self.totals[key]

    def add(self, key: int, values: torch.Tensor) -> None:
        """One layer's input, (..., inputs)."""
        rows = values.detach().reshape(-1, values.shape[-1])
        if (real := self._real) is not None:
            a_token_each = values.shape[:-1] in (real.shape, (real.numel(),))
            rows = rows[real.reshape(-1).to(rows.device)] if a_token_each else rows
        rows = rows.to(torch.float32)
        product = (rows.T @ rows).cpu()
        if key in self.totals:
            self.totals[key].add_(product)
        else:
            self.totals[key] = product
        self.rows[key] = self.rows.get(key, 0) + len(rows)


@contextmanager
def _watching(model: nn.Module, wanted: set[int], sums: _Sums) -> Iterator[None]:
    def take(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sums.add(id(module.weight), args[0] if args else next(iter(kwargs.values())))

    handles = [
        module.register_forward_pre_hook(take, with_kwargs=True)
        for module in model.modules()
        if _is_linear(module) and id(module.weight) in wanted
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
