"""Where a checkpoint's parameters are in a live model: the one place that maps names.

transformers renames, stacks and concatenates checkpoint tensors while it loads them, and knows
how to undo that when it saves. :func:`locate` runs that undoing on the live parameters
themselves, with copies turned into views: what comes out under a checkpoint name is a window on
the live storage, whatever the conversion was.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from dare_adapters.errors import UnsupportedParameterError
from dare_adapters.mask import matrix_shape
from dare_adapters.matrix import MatrixView

__all__ = [
    "BEFORE_ADAPTERS",
    "LiveParameter",
    "Owners",
    "check_patchable",
    "find_module",
    "find_tensor",
    "is_patchable",
    "locate",
    "locate_all",
    "name_variants",
    "state_tensors",
]

# Names that transformers has replaced, still in the checkpoints of the first BERT models.
LEGACY_SUFFIXES = {".gamma": ".weight", ".beta": ".bias"}
_OWNER_SHIFT = 40  # positions of one parameter take the lower bits


@dataclass(frozen=True)
class LiveParameter:
    """A checkpoint parameter's window on a parameter or buffer of a live model.

    Attributes:
        owner: the live parameter's name.
        shape: the checkpoint parameter's shape.
        offset, strides: of the window, relative to the owner's first entry, owner contiguous.
        positions: flat positions in the owner instead, where no strides describe the window.
    """

    owner: str
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]
    positions: torch.Tensor | None = None

    def tensor(self, model: nn.Module) -> torch.Tensor:
        """The owner, as it is now: `.to()` may have replaced it."""
        return find_tensor(model, self.owner)

    @property
    def whole(self) -> bool:
        """Whether the window may be its whole owner in the owner's own order."""
        return self.positions is None and self.offset == 0 and _contiguous(self.shape, self.strides)

    def region(self, model: nn.Module) -> tuple[int, int, tuple[int, ...]]:
        """What two names share when they are one tied weight."""
        owner = self.tensor(model)
        # Windows by position have no offset; two on one owner differ in their first entry.
        first = self.offset if self.positions is None else int(self.positions[0])
        start = owner.data_ptr() + first * owner.element_size()
        return start, math.prod(self.shape), self.strides

    def view(self, model: nn.Module, shape: tuple[int, ...] | None = None) -> MatrixView:
        """The window as a matrix; `shape` (default: its own) may have fewer leading rows."""
        return self.view_on(self.tensor(model), shape)

    def view_on(self, owner: torch.Tensor, shape: tuple[int, ...] | None = None) -> MatrixView:
        """:meth:`view` on a tensor that stands for the owner, of its shape."""
        rows, columns = matrix_shape(shape or self.shape)
        if not owner.is_contiguous():
            return self._view_strided(owner, shape or self.shape)
        storage, strides, offset = owner.detach().view(-1), self.strides, self.offset
        if self.positions is not None:
            return MatrixView(storage, rows, columns, 0, 0, 0, self.positions.to(storage.device))
        row_stride, column_stride = _fold(self.owner, shape or self.shape, strides)
        return MatrixView(storage, rows, columns, offset, row_stride, column_stride)

    def places(self, index: torch.Tensor, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """Where entries of the window are in its owner: flat positions of both, both contiguous."""
        if self.positions is not None:
            return self.positions.to(index.device)[index]
        if self.whole:
            return index
        _, columns = matrix_shape(shape or self.shape)
        row_stride, column_stride = _fold(self.owner, shape or self.shape, self.strides)
        row = index // columns
        return self.offset + row * row_stride + (index - row * columns) * column_stride

    def _view_strided(self, owner: torch.Tensor, shape: tuple[int, ...]) -> MatrixView:
        """The window on an owner in another memory format, such as channels_last."""
        if not self.whole:
            raise UnsupportedParameterError(
                f"{self.owner}: a part of a parameter that is not contiguous in memory"
            )
        rows, columns = matrix_shape(shape)
        reach = sum((n - 1) * stride for n, stride in zip(owner.shape, owner.stride(), strict=True))
        storage = owner.detach().as_strided((reach + 1,), (1,))
        places = torch.arange(reach + 1, device=owner.device).as_strided(shape, owner.stride())
        return MatrixView(storage, rows, columns, 0, 0, 0, places.reshape(-1))


Owners = Mapping[str, torch.Tensor]
"""Live parameters and buffers by the names that the model gives them."""


def locate(
    model: nn.Module, names: Iterable[str], owners: Owners | None = None
) -> dict[str, LiveParameter | None]:
    """The live parameter of each checkpoint name, None where the model has none.

    Args:
        model: whose class knows the checkpoint's names; a model of no known library has its own.
        names: to find.
        owners: default: the model's own. Adapter layers around modules change their names; who
            knows the names without them gives them here.
    """
    around = {} if owners is not None else _names_in_adapter_layers(model)
    if owners is None:
        owners = {around.get(name, name): one for name, one in state_tensors(model).items()}
    table = {**_own_names(owners), **locate_all(model, owners)}
    if around:  # found as though nothing were around them; they are where they are
        inside = {own: live for live, own in around.items()}
        table = {
            name: replace(place, owner=inside.get(place.owner, place.owner))
            for name, place in table.items()
        }
    prefix = getattr(model, "base_model_prefix", "")
    return {
        name: next((table[v] for v in name_variants(name, prefix) if v in table), None)
        for name in names
    }


def state_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a model's state dict, themselves."""
    state = model.state_dict(keep_vars=True)
    return {name: one for name, one in state.items() if isinstance(one, torch.Tensor)}


def _names_in_adapter_layers(model: nn.Module) -> dict[str, str]:
    """Names of parameters in PEFT's layers -> those that they would have without."""
    layers = [
        name
        for name, module in model.named_modules()
        if hasattr(type(module), "adapter_layer_names") and "base_layer" in module._modules
    ]
    found: dict[str, str] = {}
    for layer in layers:
        for name, _ in model.get_submodule(f"{layer}.base_layer").state_dict().items():
            live = f"{layer}.base_layer.{name}"
            found[live] = live.replace(".base_layer.", ".")
    return found


def _own_names(owners: Owners) -> dict[str, LiveParameter]:
    """Every parameter under its live name, which adapters that were trained live (LoRA) use."""
    found = {}
    for name, tensor in owners.items():
        shape = tuple(tensor.shape)
        found[name] = LiveParameter(name, shape, 0, _contiguous_strides(shape))
    return found


def name_variants(name: str, prefix: str) -> list[str]:
    """A name, then with the base model's prefix added or stripped, and legacy endings renewed."""
    found = [name]
    if prefix:
        found.append(
            name.removeprefix(f"{prefix}.") if name.startswith(f"{prefix}.") else f"{prefix}.{name}"
        )
    for old, new in LEGACY_SUFFIXES.items():
        if name.endswith(old):
            found += [variant.removesuffix(old) + new for variant in found]
    return found


def locate_all(model: nn.Module, owners: Owners | None = None) -> dict[str, LiveParameter]:
    """Every parameter and persistent buffer of a live model under its checkpoint name."""
    owners = state_tensors(model) if owners is None else owners
    # Stand-ins have the owners' shapes, cost no memory, and storages that tell owners apart.
    stand_ins = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta").as_subclass(_Window)
        for name, tensor in owners.items()
    }
    windows = _undo_conversion(model, dict(stand_ins))
    found: dict[str, LiveParameter] = {}
    lost: list[str] = []
    with torch._C.DisableTorchFunctionSubclass():  # to ask a window is quicker so
        owner_of = {_storage_id(tensor): name for name, tensor in stand_ins.items()}
        for name, window in windows.items():
            owner = owner_of.get(_storage_id(window))
            if owner is None:
                lost.append(name)
                continue
            found[name] = LiveParameter(
                owner, tuple(window.shape), int(window.storage_offset()), tuple(window.stride())
            )
    if lost:
        seen = {parameter.owner for parameter in found.values()}
        found.update(_locate_by_position(model, {n: t for n, t in owners.items() if n not in seen}))
    return found


class _Window(torch.Tensor):
    """A tensor of which a contiguous copy is not worth having: views stay views."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.Tensor.contiguous:
            return args[0]
        return super().__torch_function__(  # type: ignore[no-untyped-call]
            function, types, args, kwargs or {}
        )


def _storage_id(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _undo_conversion(model: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `save_pretrained` would make of these tensors: checkpoint name -> tensor."""
    from transformers import PreTrainedModel
    from transformers.core_model_loading import revert_weight_conversion

    if not isinstance(model, PreTrainedModel):
        return tensors
    with torch.no_grad(), _conversions_of_loading(model):
        undone: dict[str, torch.Tensor] = revert_weight_conversion(model, tensors)
    return undone


# Where a model keeps how its checkpoint was converted, and where it was before an adapter's was.
_CONVERSIONS, BEFORE_ADAPTERS = "_weight_conversions", "_dare_weight_conversions"


@contextmanager
def _conversions_of_loading(model: nn.Module) -> Iterator[None]:
    """How the base was loaded, although `load_adapter` has overwritten it with how an adapter was.

    Where that was not kept it is what transformers does for models of this class.
    """
    found = model.__dict__.get(_CONVERSIONS)
    ours = BEFORE_ADAPTERS in model.__dict__
    theirs = any("base_model.model." in str(one) for one in found or ())
    if not ours and not theirs:
        yield
        return
    before = model.__dict__.get(BEFORE_ADAPTERS)
    if before is None:
        model.__dict__.pop(_CONVERSIONS, None)
    else:
        model.__dict__[_CONVERSIONS] = before
    try:
        yield
    finally:
        model.__dict__[_CONVERSIONS] = found
        if found is None:
            del model.__dict__[_CONVERSIONS]


def _locate_by_position(
    model: nn.Module, owners: dict[str, torch.Tensor]
) -> dict[str, LiveParameter]:
    """The same for conversions that no strides describe, by carrying positions through them."""
    names = list(owners)
    marked = {
        name: (torch.arange(owners[name].numel()) + (number << _OWNER_SHIFT)).view(
            owners[name].shape
        )
        for number, name in enumerate(names)
    }
    found = {}
    for name, marks in _undo_conversion(model, marked).items():
        numbers = marks >> _OWNER_SHIFT
        if marks.numel() and int(numbers.min()) == int(numbers.max()):
            flat = (marks & ((1 << _OWNER_SHIFT) - 1)).reshape(-1)
            found[name] = LiveParameter(
                names[int(numbers.flatten()[0])], tuple(marks.shape), 0, (), flat
            )
    return found


def find_tensor(model: nn.Module, name: str) -> torch.Tensor:
    """A parameter by its name, though adapter layers have come or gone around its module since.

    Args:
        model: that has it.
        name: from when it was located.
    """
    path, _, leaf = name.rpartition(".")
    module = find_module(model, path)
    while leaf not in module._parameters and "base_layer" in module._modules:
        module = module._modules["base_layer"]  # type: ignore[assignment]
    tensor = module._parameters.get(leaf)
    if tensor is None:
        tensor = getattr(module, leaf)
    assert isinstance(tensor, torch.Tensor)
    return tensor


def find_module(model: nn.Module, path: str) -> nn.Module:
    """Likewise a module; "" is the model."""
    module = model
    for part in path.split(".") if path else ():
        # Past Module.__getattr__, which is slow; some modules have attributes of their own.
        child = module._modules.get(part)
        while child is None and "base_layer" in module._modules:
            module = module._modules["base_layer"]  # type: ignore[assignment]
            child = module._modules.get(part)
        if child is None and part == "base_layer":
            continue  # the layer around it is gone
        module = getattr(module, part) if child is None else child
    return module


def check_patchable(name: str, tensor: torch.Tensor) -> None:
    """Refuse a live parameter that cannot be changed in place.

    Raises:
        UnsupportedParameterError: it is not there (meta, offloaded), sharded, or not plain floats.
    """
    reason = _unpatchable(tensor)
    if reason is not None:
        raise UnsupportedParameterError(f"{name} cannot be patched: {reason}")


def is_patchable(tensor: torch.Tensor) -> bool:
    """Whether it is there, whole, and of plain floats."""
    return _unpatchable(tensor) is None


def _unpatchable(tensor: torch.Tensor) -> str | None:
    kind = type(tensor).__name__
    if tensor.is_meta:
        return "it is on the meta device (offloaded to disk or not loaded); load it onto a device"
    if kind not in ("Parameter", "Tensor"):
        return f"it is a {kind}; only plain parameters that are whole in memory can be patched"
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        return f"its dtype is {tensor.dtype}; load the base in float32, bfloat16 or float16"
    return None


def _contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = _contiguous_strides(shape)
    return all(n == 1 or a == b for n, a, b in zip(shape, strides, expected, strict=True))


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, size = [], 1
    for extent in reversed(shape):
        strides.append(size)
        size *= max(extent, 1)
    return tuple(reversed(strides))


def _fold(owner: str, shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, int]:
    """Row and column stride of the matrix that a window is."""
    rows, columns = matrix_shape(shape)
    if _contiguous(shape, strides):
        return columns, 1
    meta = torch.empty_strided(shape, strides, device="meta")
    try:
        folded = meta.view(rows, columns)
    except RuntimeError as error:
        raise UnsupportedParameterError(
            f"{owner}: its layout in the live model (shape {shape}, strides {strides}) cannot be "
            f"seen as {rows} rows of {columns}"
        ) from error
    return folded.stride(0), folded.stride(1)
