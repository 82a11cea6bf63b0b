"""What a tuner layer of any kind is: which of its adapters are active, and which are merged."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from dare_adapters.delta import NewParameter, WeightedDelta, join_added_rows
from dare_adapters.patch import Change, Patch
from dare_adapters.tuner.exchange import tensor_of
from dare_adapters.tuner.holder import DareHolder
from dare_adapters.tuner.neighbours import MergedBeside, merged_beside, restore_beside
from dare_adapters.tuner.tensors import AdapterTensors

__all__ = ["DareState"]


class DareState(DareHolder, BaseTunerLayer):  # type: ignore[misc]
    """Adapters of one module: what a wrapper and a bystander have in common."""

    def __init__(self) -> None:
        super().__init__()
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
        # In a batch of several adapters: the adapter of each row.
        self.rows: list[str] | None = None

    @property
    def active(self) -> list[str]:
        """The active adapters, of which some may have nothing here."""
        active = self._active_adapter
        return [active] if isinstance(active, str) else list(active)

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
        assert isinstance(layer, DareState)
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
                    rows = [change.added_rows, delta.added_rows]
                    change.added_rows = join_added_rows(rows)
        return list(changes.values())

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
