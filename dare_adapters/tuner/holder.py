"""What a layer holds: the tensors of its adapters, and what the base's weights are with them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from dare_adapters.delta import Delta, NewParameter, WeightedDelta
from dare_adapters.errors import UnsupportedParameterError
from dare_adapters.kernels import PackedDelta
from dare_adapters.live import LiveParameter, is_patchable
from dare_adapters.tuner.effective import add_deltas, add_trained
from dare_adapters.tuner.exchange import tensor_of
from dare_adapters.tuner.stored import Placement, StoredParameter
from dare_adapters.tuner.tensors import AdapterTensors

__all__ = ["DareHolder"]

# Standard deviation of values that begin at random (init_weights=False).
_RANDOM = 0.1


class DareHolder(nn.Module):
    """Adapters of one module.

    Attributes:
        dare_stored: adapter -> its parameters here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.adapter_layer_names: tuple[str, ...] = ()
        self.other_param_names: tuple[str, ...] = ("dare_stored",)
        self.dare_stored: dict[str, list[StoredParameter]] = {}
        # Own parameter -> (layer of another module, its parameter): one weight of two modules.
        # In a list, so that it is no child of this module.
        self._tied: dict[str, tuple[list[DareHolder], str]] = {}

    @property
    def owner(self) -> nn.Module:
        """The module whose parameters change, without any adapter layers around it."""
        raise NotImplementedError

    def add_adapter(
        self, adapter: str, placements: Sequence[Placement], *, init_weights: bool
    ) -> None:
        """Allocate an adapter's tensors: no change, a random one, or whatever is loaded next."""
        stored = [StoredParameter(placement) for placement in placements]
        self.dare_stored[adapter] = stored
        for one in stored:
            base = tensor_of(self.owner, one.placement.local)
            for part, (dtype, shape) in one.parts.items():
                tensor = torch.zeros(shape, dtype=dtype, device=_real(base.device))
                if part == "value":
                    tensor = _initial_value(base, one.placement, tensor)
                elif one.trains(part) and part != "rows" and not init_weights:
                    tensor = (torch.randn(shape) * _RANDOM).to(tensor.device, dtype)
                container = self._container(one.placement, part)
                container[adapter] = nn.Parameter(tensor) if one.trains(part) else tensor

    def tie(self, local: str, layer: DareHolder, there: str) -> None:
        """Take the changes of a parameter from the layer of another module that shares it."""
        if layer is not self:
            self._tied[local] = ([layer], there)

    @property
    def tied(self) -> dict[str, tuple[DareHolder, str]]:
        """Own parameter -> the layer that has its changes, and the name there."""
        return {local: (layer, there) for local, ((layer,), there) in self._tied.items()}

    def holder(self, local: str) -> tuple[DareHolder, str]:
        """The layer that has the changes of a parameter, and the parameter's name there."""
        return self.tied.get(local, (self, local))

    def product(self, one: StoredParameter, adapter: str, device: torch.device) -> PackedDelta:
        """A parameter's change as products are taken from it; kept while its codes stay."""
        return one.product(self.parts(one, adapter), device)

    def forget_products(self) -> None:
        """Of floats, which may have been trained since."""
        for stored in self.dare_stored.values():
            for one in stored:
                one.forget_product()

    def _container(self, placement: Placement, part: str) -> AdapterTensors:
        name = f"{placement.stem}_{part}"
        if name not in self._modules:
            self.add_module(name, AdapterTensors())
            if part in ("scales", "support"):  # which never train
                self.other_param_names = (*self.other_param_names, name)
            else:
                self.adapter_layer_names = (*self.adapter_layer_names, name)
        found = self._modules[name]
        assert isinstance(found, AdapterTensors)
        return found

    def tensor_names(self, adapter: str) -> Iterator[tuple[StoredParameter, str, str]]:
        """(parameter, part, name of the container) of each tensor of an adapter."""
        for one in self.dare_stored.get(adapter, ()):
            for part in one.parts:
                yield one, part, f"{one.placement.stem}_{part}"

    def parts(self, one: StoredParameter, adapter: str) -> dict[str, torch.Tensor]:
        """A parameter's tensors as they are now."""
        stem = one.placement.stem
        return {part: getattr(self, f"{stem}_{part}")[adapter] for part in one.parts}

    def delta(self, one: StoredParameter, adapter: str) -> Delta | NewParameter:
        """A parameter's change as it is now."""
        return one.delta(self.parts(one, adapter))

    # --- the values of the base with adapters in them -----------------------------------------

    def changed_by(self, adapters: Sequence[str]) -> list[str]:
        """The parameters of the module that any of these adapters changes."""
        found = [
            one.placement.local for adapter in adapters for one in self.dare_stored.get(adapter, ())
        ]
        for local, ((layer,), there) in self._tied.items():
            if there in layer.changed_by(adapters):
                found.append(local)
        return list(dict.fromkeys(found))

    def effective(self, adapters: Sequence[str]) -> dict[str, torch.Tensor]:
        """Name -> value of each parameter of the module that these adapters change."""
        return {local: self.effective_of(local, adapters) for local in self.changed_by(adapters)}

    def effective_of(self, local: str, adapters: Sequence[str]) -> torch.Tensor:
        """The value of a parameter under adapters, each of weight 1."""
        if local in self._tied:
            (layer,), there = self._tied[local]
            return layer.effective_of(there, adapters)
        base = tensor_of(self.owner, local)
        here = [
            (one, adapter)
            for adapter in adapters
            for one in self.dare_stored.get(adapter, ())
            if one.placement.local == local
        ]
        new = next((pair for pair in here if pair[0].held.kind == "new"), None)
        if new is not None:
            value: torch.Tensor = self.parts(*new)["value"]
            return value if not value.is_floating_point() else value.to(base.dtype)
        if not is_patchable(base):
            raise UnsupportedParameterError(
                f"{local} of {type(self.owner).__name__} is a {type(base).__name__} of "
                f"{base.dtype}; only plain floating-point parameters can be changed"
            )
        made = self._sum(base, here)
        return self._with_rows(made, here)

    def _sum(self, base: torch.Tensor, here: Sequence[tuple[StoredParameter, str]]) -> torch.Tensor:
        if torch.is_grad_enabled() and self._any_trains(here):
            return self._trained_sum(base, here)
        if base.device.type != "cpu":
            return self._sum_on_device(base, here)
        windows: dict[object, tuple[LiveParameter, list[WeightedDelta]]] = {}
        for one, adapter in here:
            delta = self.delta(one, adapter)
            assert isinstance(delta, Delta)
            window = one.placement.window
            key = (window.offset, window.strides, window.shape, id(window.positions))
            windows.setdefault(key, (window, []))[1].append(WeightedDelta(delta))
        return add_deltas(base, list(windows.values()))

    def trains(self, adapters: Sequence[str]) -> bool:
        """Whether anything that these adapters hold for the module has a gradient."""
        return self._any_trains(
            [(one, name) for name in adapters for one in self.dare_stored.get(name, ())]
        )

    def _any_trains(self, here: Sequence[tuple[StoredParameter, str]]) -> bool:
        return any(
            part.requires_grad for one, name in here for part in self.parts(one, name).values()
        )

    def _trained_sum(
        self, base: torch.Tensor, here: Sequence[tuple[StoredParameter, str]]
    ) -> torch.Tensor:
        """Packed adapters first, which have no gradients; then those that do."""
        packed = [pair for pair in here if not pair[0].holds_floats]
        if packed:
            with torch.no_grad():
                base = self._sum(base, packed)
        trained = [pair for pair in here if pair[0].holds_floats]
        parts = [one.trained_part(self.parts(one, name), base.device) for one, name in trained]
        return add_trained(base, parts)

    def trained_change(
        self, adapters: Sequence[str], device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What adapters change of a matrix and of its bias, float32, differentiable."""
        changes: dict[str, torch.Tensor] = {}
        for local in ("weight", "bias"):
            here = [
                (one, name)
                for name in adapters
                for one in self.dare_stored.get(name, ())
                if one.placement.local == local
            ]
            if here:
                zeros = torch.zeros(here[0][0].placement.window.shape, device=device)
                floats = [pair for pair in here if pair[0].holds_floats]
                packed = [pair for pair in here if not pair[0].holds_floats]
                for one, name in packed:
                    zeros = zeros + self.product(one, name, device).dense()
                parts = [one.trained_part(self.parts(one, name), device) for one, name in floats]
                changes[local] = add_trained(zeros, parts) if parts else zeros
        rows, columns = self.owner.out_features, self.owner.in_features
        weight = changes.get("weight")
        if weight is None:
            weight = torch.zeros(rows, columns, device=device)  # type: ignore[call-overload]
        return weight, changes.get("bias")

    def _sum_on_device(
        self, base: torch.Tensor, here: Sequence[tuple[StoredParameter, str]]
    ) -> torch.Tensor:
        """The same sums from packed deltas, where those are."""
        total = torch.zeros(base.numel(), device=base.device)
        for one, adapter in here:
            change = self.product(one, adapter, base.device).dense().reshape(-1)
            if one.placement.window.whole:
                total[: len(change)] += change
            else:
                total[one.all_places(base.device)] += change
        flat = base.detach().contiguous().reshape(-1)
        return total.add_(flat).to(base.dtype).view(base.shape)

    def _with_rows(
        self, made: torch.Tensor, here: Sequence[tuple[StoredParameter, str]]
    ) -> torch.Tensor:
        """Rows that adapters add to a vocabulary: of the first that has them, then of the next."""
        added: torch.Tensor | None = None
        start = 0
        for one, adapter in here:
            if one.held.added_rows:
                rows = self.parts(one, adapter)["rows"].to(made.dtype)
                start = one.held.shape[0]
                have = 0 if added is None else len(added)
                if len(rows) > have:
                    added = rows if added is None else torch.cat([added, rows[have:]])
        if added is None:
            return made
        return torch.cat([made[:start], added, made[start + len(added) :]])


def _real(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "meta" else device


def _initial_value(base: torch.Tensor, placement: Placement, zeros: torch.Tensor) -> torch.Tensor:
    """A task head begins as it is in the model."""
    window = placement.window
    whole = window.whole and math.prod(window.shape) == base.numel()
    if base.is_meta or not whole or not zeros.is_floating_point():
        return zeros
    return base.detach().to(zeros.dtype).clone().view(zeros.shape)
