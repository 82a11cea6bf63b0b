"""What a tuner layer of any kind is: adapters' tensors, which of them are active, merged, tied."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from dare_adapters.delta import Delta, NewParameter, WeightedDelta
from dare_adapters.errors import UnsupportedParameterError
from dare_adapters.kernels import PackedDelta
from dare_adapters.live import LiveParameter, is_patchable
from dare_adapters.patch import Change, Patch
from dare_adapters.tuner.effective import add_deltas, add_trained
from dare_adapters.tuner.exchange import tensor_of
from dare_adapters.tuner.neighbours import MergedBeside, merged_beside, restore_beside
from dare_adapters.tuner.stored import Placement, StoredParameter
from dare_adapters.tuner.tensors import AdapterTensors

__all__ = ["DareState"]

# Standard deviation of values that begin at random (init_weights=False).
_RANDOM = 0.1


class DareState(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """Adapters of one module: what a wrapper and a bystander have in common.

    Attributes:
        dare_stored: adapter -> its parameters here.
    """

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.adapter_layer_names: tuple[str, ...] = ()
        self.other_param_names: tuple[str, ...] = ("dare_stored",)
        self.dare_stored: dict[str, list[StoredParameter]] = {}
        self.merged_adapters: list[str] = []
        self.is_merged = False  # the same in a word, without the names
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self._leaving: str | None = None
        self._patch = Patch()
        self._applied_beside: MergedBeside = []
        # The model and the path in it where the layer, or what is around it, is found. In a list,
        # so that it is no child of this module.
        self._place: tuple[list[nn.Module], str] = ([], "")
        # Own parameter -> (layer of another module, its parameter): one weight of two modules.
        # In a list, so that it is no child of this module.
        self._tied: dict[str, tuple[list[DareState], str]] = {}
        # In a batch of several adapters: the adapter of each row.
        self.rows: list[str] | None = None

    # --- what is here -------------------------------------------------------------------------

    @property
    def owner(self) -> nn.Module:
        """The module whose parameters change, without any adapter layers around it."""
        raise NotImplementedError

    @property
    def active(self) -> list[str]:
        """The active adapters, of which some may have nothing here."""
        active = self._active_adapter
        return [active] if isinstance(active, str) else list(active)

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

    def tie(self, local: str, layer: DareState, there: str) -> None:
        """Take the changes of a parameter from the layer of another module that shares it."""
        if layer is not self:
            self._tied[local] = ([layer], there)

    @property
    def tied(self) -> dict[str, tuple[DareState, str]]:
        """Own parameter -> the layer that has its changes, and the name there."""
        return {local: (layer, there) for local, ((layer,), there) in self._tied.items()}

    def holder(self, local: str) -> tuple[DareState, str]:
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

    # --- a vocabulary that grows ----------------------------------------------------------------

    def growing(self) -> list[str]:
        """The parameters to which any adapter adds rows."""
        found = [
            one.placement.local
            for stored in self.dare_stored.values()
            for one in stored
            if one.held.added_rows
        ]
        return list(dict.fromkeys(found))

    def rows_before(self, local: str) -> int:
        """How many rows a parameter has without any adapter."""
        merged = self._patch.rows_before(local)
        return len(tensor_of(self.owner, local)) if merged is None else merged

    def rows_under(self, local: str, adapters: Sequence[str]) -> int:
        """How many it has under adapters."""
        layer, there = self.holder(local)
        ends = [
            one.held.shape[0] + one.held.added_rows
            for adapter in adapters
            for one in layer.dare_stored.get(adapter, ())
            if one.placement.local == there and one.held.added_rows
        ]
        return max([layer.rows_before(there), *ends])

    def rows_now(self, local: str) -> int:
        """How many it has in the forward that is about to run."""
        if self.disable_adapters:
            return self.rows_before(local)
        if self.merged_adapters:
            return len(tensor_of(self.owner, local))
        return self.rows_under(local, self.active if self.rows is None else self.rows)

    # --- merging ------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Make adapters part of the base's own weights, in place; :meth:`unmerge` restores them.

        The deltas of all that are merged are summed in float32 and rounded once, and no bit of the
        base is lost: what was there is kept.

        Args:
            safe_merge: first look for NaN and infinity in what the weights would become.
            adapter_names: which; default: the active ones.

        Raises:
            ValueError: `safe_merge` found NaN or infinity.
            UnsupportedParameterError: a parameter is quantised, offloaded or sharded.
        """
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self._all_available_adapter_names()]
        if not names:
            return
        wanted = [*self.merged_adapters, *names]
        before = self._changes(self.merged_adapters)
        self._restore()
        try:
            if safe_merge:
                self._check_finite(wanted, names)
            self._patch.apply(self.owner, self._changes(wanted))
        except BaseException:
            self._patch.apply(self.owner, before)
            raise
        finally:
            self._applied_beside = merged_beside(self, self._outermost())
        self.merged_adapters, self.is_merged = wanted, True

    def unmerge(self) -> None:
        """Put every bit of the base back, whatever other methods have merged before or since."""
        if not self.merged_adapters:
            if self.dare_stored:
                warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._restore()
        self.merged_adapters, self.is_merged = [], False

    def found_at(self, model: nn.Module, path: str) -> None:
        """Remember where the layer is: adapters of other methods may be put around it there."""
        self._place = ([model], path)

    def _outermost(self) -> nn.Module | None:
        model, path = self._place
        try:
            return model[0].get_submodule(path) if model else None
        except AttributeError:  # it was taken out of the model
            return None

    def _restore(self) -> None:
        if not self._patch:
            return
        owner, patch = self.owner, self._patch
        now = merged_beside(self, self._outermost())
        restore_beside(owner, patch.owners, lambda: patch.restore(owner), self._applied_beside, now)
        self._applied_beside = []

    def forget_merged(self) -> None:
        """Make what is merged the base's own for good."""
        self._patch.forget()
        self.merged_adapters, self.is_merged = [], False

    def _changes(self, adapters: Sequence[str]) -> list[Change]:
        changes: dict[object, Change] = {}
        for adapter in adapters:
            for one in self.dare_stored.get(adapter, ()):
                window = one.placement.window
                key = (window.owner, window.offset, window.strides, window.shape)
                if window.positions is not None:
                    key = (*key, int(window.positions[0]))  # type: ignore[assignment]
                change = changes.setdefault(key, Change(one.placement.name, window))
                delta = self.delta(one, adapter)
                if isinstance(delta, NewParameter):
                    if change.value is None and not change.deltas:
                        change.value = delta.value
                elif change.value is None:
                    change.deltas.append(WeightedDelta(delta))
                    self._grow(change, delta)
        return list(changes.values())

    @staticmethod
    def _grow(change: Change, delta: Delta) -> None:
        added, have = delta.added_rows, change.added_rows
        if added is None:
            return
        if have is None:
            change.added_rows = added
        elif len(added) > len(have):
            change.added_rows = torch.cat([have, added[len(have) :].to(have.dtype)])

    @torch.no_grad()
    def _check_finite(self, wanted: Sequence[str], names: Sequence[str]) -> None:
        for value in self.effective(wanted).values():
            if not bool(torch.isfinite(value).all()):
                raise ValueError(  # PEFT's words
                    f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems "
                    "to be broken"
                )

    # --- what PEFT asks of every layer --------------------------------------------------------

    def get_base_layer(self) -> nn.Module:
        return self.owner

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones, and let those train unless `inference_mode`."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for key, parameter in self._trained():
            parameter.requires_grad_(key in names and not inference_mode)
        self._active_adapter = names

    def enable_adapters(self, enabled: bool) -> None:
        """Let the active adapters act, or none."""
        if enabled:
            self.set_adapter(self.active)
        else:
            for _, parameter in self._trained():
                parameter.requires_grad_(False)
        self._disable_adapters = not enabled

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Let adapters train, or not, whether they are active or not."""
        names = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        for key, parameter in self._trained():
            if key in names:
                parameter.requires_grad_(requires_grad)

    def set_scale(self, adapter: str, scale: float) -> None:
        """As diffusers sets an adapter's weight, after LoRA's layers: it must be 1 here.

        Raises:
            ValueError: it is not.
        """
        if scale != 1:
            raise ValueError(
                f"adapter {adapter!r} at the weight {scale}: an adapter of method DARE acts at 1; "
                "dare_adapters.combine, or add_weighted_adapter of a PeftModel, makes one of "
                "another weight"
            )

    def scale_layer(self, scale: float) -> None:
        """Likewise, of all active adapters."""
        for adapter in self.active:
            self.set_scale(adapter, scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo :meth:`scale_layer`, which has done nothing."""

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name in self.adapter_layer_names:
            for key, parameter in getattr(self, name)._parameters.items():
                if parameter is not None and parameter.is_leaf and parameter.is_floating_point():
                    yield key, parameter

    def _get_available_adapters(self) -> set[str]:
        return set(self._all_available_adapter_names())

    def _all_available_adapter_names(self) -> list[str]:
        found = set(self.dare_stored)
        for (layer,), _ in self._tied.values():
            found |= set(layer.dare_stored)
        return sorted(found - {self._leaving})

    def delete_adapter(self, adapter_name: str) -> None:
        """Drop an adapter's tensors; where it was active, others become active as PEFT has it."""
        self._leaving = adapter_name  # a tied layer may still have it
        try:
            super().delete_adapter(adapter_name)
        finally:
            self._leaving = None

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """To where the base's parameter is, in the dtype that they have."""
        for one, part, name in self.tensor_names(adapter_name):
            del part
            base = tensor_of(self.owner, one.placement.local)
            container = self._modules[name]
            assert isinstance(container, AdapterTensors)
            tensor = container[adapter_name]
            target = device or base.device
            if not tensor.is_meta and tensor.device != target and target.type != "meta":
                container[adapter_name] = tensor.to(target)


def _real(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "meta" else device


def _initial_value(base: torch.Tensor, placement: Placement, zeros: torch.Tensor) -> torch.Tensor:
    """A task head begins as it is in the model."""
    window = placement.window
    whole = window.whole and math.prod(window.shape) == base.numel()
    if base.is_meta or not whole or not zeros.is_floating_point():
        return zeros
    return base.detach().to(zeros.dtype).clone().view(zeros.shape)
