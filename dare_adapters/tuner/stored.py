"""One parameter of one adapter: what the tensors that a layer holds for it mean."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from dare_adapters.checkpoint import DTYPES
from dare_adapters.config import ParameterEntry
from dare_adapters.delta import Delta, DenseDelta, NewParameter
from dare_adapters.errors import AdapterFormatError
from dare_adapters.kernels import PackedDelta
from dare_adapters.live import LiveParameter
from dare_adapters.mask import BernoulliSupport, BlockedSupport, Slots, Support, matrix_shape
from dare_adapters.sparse_delta import SparseDelta
from dare_adapters.stored_support import SupportEncoding, decode_support
from dare_adapters.tuner.effective import TrainedPart

__all__ = ["Parts", "Placement", "StoredParameter"]

Parts = Mapping[str, torch.Tensor]
"""The tensors of a parameter by part: "values", "scales", "support", "delta", "rows", "value"."""


@dataclass(frozen=True)
class Placement:
    """One parameter of an adapter, on the module that it changes.

    Attributes:
        name: in the checkpoint; random masks are drawn from it.
        local: the module's parameter or buffer.
        window: the checkpoint's parameter on that one, whose name it has as its owner.
        entry: how it is stored in the adapter's file.
        stem: what the names of its tensors on the layer begin with.
        trainable: whether survivors are to be floats, in however few bits they are stored.
        wide: whether all floats are to be float32: optimisers fail in 16 bits.
        seed: of the adapter.
    """

    name: str
    local: str
    window: LiveParameter
    entry: ParameterEntry
    stem: str
    trainable: bool
    wide: bool
    seed: int


@dataclass
class StoredParameter:
    """A placed parameter, and what was computed of its support and codes.

    Attributes:
        placement: where it is.
        loaded: whether its tensors were read from a file.
    """

    placement: Placement
    loaded: bool = False
    _support: Support | None = field(default=None, repr=False)
    _packed: tuple[list[tuple[torch.Tensor, int]], SparseDelta] | None = field(
        default=None, repr=False
    )
    _product: tuple[Delta, PackedDelta] | None = field(default=None, repr=False)
    _places: dict[torch.device, tuple[torch.Tensor, torch.Tensor | None]] = field(
        default_factory=dict, repr=False
    )

    @property
    def held(self) -> ParameterEntry:
        """How the layer holds it: as in the file, but floats where it is to train."""
        entry = self.placement.entry
        if self.decodes:
            units = None if entry.mask == "blocked" else entry.slots
            return replace(entry, bits=32, dtype="F32", exponent=0, value_units=units)
        if self.placement.wide and entry.dtype in ("F16", "BF16"):
            return replace(entry, bits=32 if entry.kind == "sparse" else None, dtype="F32")
        return entry

    @property
    def parts(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Part -> dtype and shape of the tensor that the layer holds."""
        return {
            key.rpartition("_")[2]: (DTYPES[dtype], shape)
            for key, (dtype, shape) in self.held.tensors(self.placement.name).items()
        }

    @property
    def holds_floats(self) -> bool:
        """Whether the layer holds survivors as floats."""
        return not _packed(self.held)

    @property
    def decodes(self) -> bool:
        """Whether the layer holds floats where the file has codes."""
        return _packed(self.placement.entry) and self.placement.trainable

    def as_stored(self, parts: Parts) -> dict[str, torch.Tensor]:
        """Parts that a loader has cast, in the dtypes of the file again."""
        stored = StoredParameter(replace(self.placement, trainable=False))
        return {part: one.to(stored.parts[part][0]) for part, one in parts.items()}

    def trains(self, part: str) -> bool:
        """Whether a part is a parameter of the layer, and not a buffer."""
        floats = part != "scales" and self.parts[part][0].is_floating_point
        return floats and self.placement.trainable

    def delta(self, parts: Parts) -> Delta | NewParameter:
        """The change as `dare_adapters.delta` has it, of tensors as they are now, on the CPU."""
        entry = self.held
        if entry.kind == "new":
            return NewParameter(_on_cpu(parts["value"]))
        added = _on_cpu(parts["rows"]) if entry.added_rows else None
        if entry.kind == "dense":
            return DenseDelta(_on_cpu(parts["delta"]), added)
        if not _packed(entry):  # shares their memory, and so all changes of it
            values = _on_cpu(parts["values"]).reshape(-1)
            bits = 8 * values.element_size()
            return SparseDelta(entry.shape, self.support(parts), bits, values, None, 0, added)
        now = [(one, _version(one)) for one in parts.values()]
        if self._packed is None or not _same(self._packed[0], now):
            self.forget()
            assert entry.bits is not None
            values, scales = _on_cpu(parts["values"]).reshape(-1), _on_cpu(parts["scales"])
            support = self.support(parts)
            made = SparseDelta(
                entry.shape, support, entry.bits, values, scales, entry.exponent, added
            )
            made.check_sizes(self.placement.name)
            self._packed = (now, made)
        return self._packed[1]

    def product(self, parts: Parts, device: torch.device) -> PackedDelta:
        """The change as products are taken from it, on a device."""
        delta = self.delta(parts)
        assert isinstance(delta, Delta)
        kept = self._product
        # Codes make a delta once; floats make one each time, of which the first is kept.
        if (
            kept is None
            or kept[1].device != device
            or (_packed(self.held) and kept[0] is not delta)
        ):
            kept = (delta, PackedDelta.from_delta(delta, device=device))
            self._product = kept
        return kept[1]

    def forget_product(self) -> None:
        """Of floats, which change without a sign: `parameter.data` does not tell."""
        if not _packed(self.held):
            self._product = None

    def support(self, parts: Parts) -> Support:
        """Where the survivors are.

        Raises:
            AdapterFormatError: a stored one leaves the parameter.
        """
        if self._support is None:
            entry, name = self.placement.entry, self.placement.name
            rows, columns = matrix_shape(entry.shape)
            if entry.mask == "blocked":
                assert entry.block is not None
                seed, block = self.placement.seed, entry.block
                self._support = BlockedSupport(seed, name, rows, columns, block)
            elif entry.mask == "bernoulli":
                assert entry.drop_rate is not None
                seed, drop_rate = self.placement.seed, entry.drop_rate
                self._support = BernoulliSupport(seed, name, rows, columns, drop_rate)
            else:
                encoding: SupportEncoding = "bitmap" if entry.mask == "bitmap" else "gaps"
                stored = _on_cpu(parts["support"]).numpy()
                self._support = decode_support(encoding, stored, rows, columns, name)
            found = self._support.slot_count
            if entry.slots is not None and entry.slots != found:
                raise AdapterFormatError(
                    f"the support of {name} has {found} entries, the config says {entry.slots}"
                )
        return self._support

    def trained_part(self, parts: Parts, device: torch.device) -> TrainedPart:
        """A delta that is held as floats, as values with their places in the live parameter."""
        entry, window = self.held, self.placement.window
        if entry.kind == "dense":
            whole = window.whole and entry.shape == window.shape
            return TrainedPart(parts["delta"], None if whole else self.all_places(device))
        places, valid = self._survivor_places(parts, device)
        values = parts["values"]
        if valid is None:
            return TrainedPart(values, places)
        return TrainedPart(Slots(values, valid).compact(values), places)

    def forget(self) -> None:
        """What was computed of tensors that are others now."""
        self._support, self._packed, self._product = None, None, None
        self._places.clear()

    def check(self, parts: Parts) -> None:
        """Look at every number, as opening the adapter's directory does.

        Raises:
            AdapterFormatError: NaN or infinity, a negative scale, a support that does not fit.
        """
        name, entry = self.placement.name, self.held
        for part, (dtype, shape) in self.parts.items():
            tensor = parts[part]
            if tuple(tensor.shape) != shape or tensor.is_floating_point() != (
                dtype.is_floating_point
            ):
                raise AdapterFormatError(
                    f"the {part} of {name} are {tensor.dtype} {list(tensor.shape)}, the config "
                    f"says {dtype} {list(shape)}"
                )
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise AdapterFormatError(f"the {part} of {name} hold NaN or infinity")
            if part == "scales" and bool((tensor < 0).any()):
                raise AdapterFormatError(f"the scales of {name} hold a negative one")
        if entry.kind == "sparse":
            delta = self.delta(parts)
            assert isinstance(delta, SparseDelta)
            delta.check_sizes(name)

    def all_places(self, device: torch.device) -> torch.Tensor:
        """Where each entry of the parameter is in the live one: flat positions of both."""
        entry, window = self.placement.entry, self.placement.window
        return window.places(torch.arange(math.prod(entry.shape)), entry.shape).to(device)

    def _survivor_places(
        self, parts: Parts, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Flat positions in the live parameter, and which slots of (R, K) values are used."""
        if device not in self._places:
            entry, window = self.placement.entry, self.placement.window
            support = self.support(parts)
            slots = support.slots(0, support.rows)
            places = window.places(slots.compact(slots.index), entry.shape).to(device)
            valid = slots.valid if entry.mask == "blocked" else None
            self._places[device] = (places, None if valid is None else valid.to(device))
        return self._places[device]


def _packed(entry: ParameterEntry) -> bool:
    return entry.kind == "sparse" and entry.bits is not None and entry.bits < 16


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu()


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _same(before: list[tuple[torch.Tensor, int]], now: list[tuple[torch.Tensor, int]]) -> bool:
    return len(before) == len(now) and all(
        one is other and version == again
        for (one, version), (other, again) in zip(before, now, strict=True)
    )
