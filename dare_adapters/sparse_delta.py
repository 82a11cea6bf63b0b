"""A delta at the survivors of a support, stored as floats or as packed codes with a scale a row."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch

from dare_adapters import codec, compiled, compiled_selection
from dare_adapters.delta import Delta
from dare_adapters.errors import AdapterFormatError
from dare_adapters.mask import BlockedSupport, Slots, Support
from dare_adapters.matrix import MatrixView
from dare_adapters.memory_block import MemoryBlock
from dare_adapters.scales import largest_scale, load_scales

__all__ = ["SparseDelta"]


class SparseDelta(Delta):
    """A change of the entries of a support, stored as :mod:`dare_adapters.codec` describes.

    Args:
        shape: of the parameter.
        support: which entries change.
        bits: 32 or 16 (float values), or 8, 4, 2, 1 (packed codes).
        values: float (slots,) or packed uint8 (bytes,), rows one after the other.
        scales: stored scales (rows,), with `exponent`; None at 32 and 16 bits.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        support: Support,
        bits: int,
        values: torch.Tensor,
        scales: torch.Tensor | None = None,
        exponent: int = 0,
        added_rows: torch.Tensor | None = None,
    ) -> None:
        super().__init__(shape, added_rows)
        self.support, self.bits = support, bits
        self.values, self.scales, self.exponent = values, scales, exponent

    @property
    def entries_per_row(self) -> int:
        if self.support.row_counts is None:
            return self.support.slots_per_row
        return max(1, self.support.slot_count // max(self.rows, 1))

    @property
    def shows_damage(self) -> bool:
        return True  # an adapter's own numbers are looked at where it is opened

    @property
    def recalls_positions(self) -> bool:
        return True

    @property
    def support_key(self) -> object | None:
        return self.support.key

    def read(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        support = self.support
        packed = self.bits < 16 and compiled.can_read(self.values)
        if packed and isinstance(support, BlockedSupport) and support.repeatable:
            width, scales = support.slots_per_row, self.row_scales
            return compiled.read_rows(
                support.where, self.bits, self.values, scales, width, start, stop
            )
        slots = self.support.slots(start, stop)
        matrix = self._read_values(start, stop, slots)
        if slots.repeatable:
            return slots.index.view(-1), slots.repeat_before(matrix).view(-1)
        return slots.compact(slots.index), slots.compact(matrix)

    def survivors(self, start: int, stop: int) -> tuple[Slots, torch.Tensor]:
        """The slots of rows start … stop - 1 and their values, float32 (n, K); 0 where unused."""
        slots = self.support.slots(start, stop)
        return slots, slots.clear_unused(self._read_values(start, stop, slots))

    def positions(self, start: int, stop: int) -> torch.Tensor:
        slots = self.support.slots(start, stop)
        return slots.index.view(-1) if slots.repeatable else slots.compact(slots.index)

    def apply_compiled(
        self,
        target: MatrixView,
        weight: float,
        start: int,
        stop: int,
        memory: MemoryBlock | None = None,
    ) -> torch.Tensor | None:
        if target.device.type != "cpu":
            return self._apply_on_device(target, weight, start, stop)
        where = self._compiled_support(target)
        if where is None or self.bits >= 16:
            return None
        originals = compiled.apply_rows(
            where,
            self.bits,
            self.values,
            self.row_scales,
            weight,
            target.storage[target.offset :],
            target.row_stride,
            self.support.slots_per_row,
            start,
            stop,
            memory,
        )
        target.mark_written()
        return originals

    @property
    def kept_entries(self) -> int:
        return 0 if self.packed_support is None else self.rows * self.support.slots_per_row

    def restore_compiled(
        self, target: MatrixView, originals: torch.Tensor, start: int, stop: int
    ) -> bool:
        if originals.dtype != target.dtype or originals.device != target.device:
            return False
        on_device = target.device.type != "cpu"
        where = self._device_support(target) if on_device else self._compiled_support(target)
        if where is None:
            return False
        storage, slots = target.storage[target.offset :], self.support.slots_per_row
        if on_device:
            from dare_adapters.kernels.gpu.change import restore_on_device

            restore_on_device(where, storage, target.row_stride, originals, slots, start, stop)
        else:
            compiled.restore_rows(where, storage, target.row_stride, originals, slots, start, stop)
        target.mark_written()
        return True

    def _apply_on_device(
        self, target: MatrixView, weight: float, start: int, stop: int
    ) -> torch.Tensor | None:
        """:meth:`apply_compiled` where the parameter is; only what is stored goes there."""
        where = self._device_support(target)
        if where is None:
            return None
        from dare_adapters.kernels.gpu.change import apply_on_device

        originals = apply_on_device(
            where,
            self.bits,
            self.values.to(target.device, non_blocking=True),
            None if self.scales is None else self.row_scales.to(target.device),
            weight,
            target.storage[target.offset :],
            target.row_stride,
            self.support.slots_per_row,
            start,
            stop,
        )
        target.mark_written()
        return originals

    def _device_support(self, target: MatrixView) -> compiled.Where | None:
        from dare_adapters.kernels.gpu.available import can_compile

        support = self.support
        if not isinstance(support, BlockedSupport) or not support.repeatable:
            return None
        straight = target.positions is None and target.column_stride == 1
        known = straight and target.dtype in compiled.DTYPES and can_compile(target.device)
        return support.where if known else None

    def read_kept(
        self, support: Support, factor: float, start: int, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        own = self.packed_support
        if own is None or not isinstance(support, BlockedSupport):
            return super().read_kept(support, factor, start, stop)
        return compiled_selection.read_kept(
            own.where, self.bits, self.values, self.row_scales, support.where, factor, start, stop
        )

    def l1(self, start: int, stop: int) -> float:
        if self.packed_support is None:
            return super().l1(start, stop)
        magnitudes, counts = self.magnitude_counts(start, stop)
        return float((magnitudes.to(torch.float64) * counts).sum())

    @property
    def counts_magnitudes(self) -> bool:
        """Whether :meth:`magnitude_counts` is sooner made than entries are read."""
        few = (1 << (self.bits - 1)) < self.support.slots_per_row // 2
        return self.packed_support is not None and few

    def magnitude_counts(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The magnitudes that occur in each row, float32 (n, k), and how often, int32 (n, k)."""
        support = self.packed_support
        assert support is not None
        counts = compiled_selection.code_counts(support.where, self.bits, self.values, start, stop)
        levels = torch.arange(counts.shape[1], dtype=torch.float32)
        return levels * self.row_scales[start:stop, None], counts

    @property
    def packed_support(self) -> BlockedSupport | None:
        """The support, where the loops that choose among packed survivors can use it."""
        support = self.support
        if not isinstance(support, BlockedSupport) or not support.repeatable or self.bits >= 16:
            return None
        usable = compiled_selection.available() and compiled.can_read(self.values)
        return support if usable else None

    def _compiled_support(self, target: MatrixView) -> compiled.Where | None:
        support = self.support
        if not isinstance(support, BlockedSupport) or not support.repeatable:
            return None
        straight = target.positions is None and target.column_stride == 1
        return support.where if straight and compiled.can_use(target.storage) else None

    def check_sizes(self, name: str) -> None:
        """Compare the values with the support, and look at the scales as they will be used.

        Raises:
            AdapterFormatError: there are more or fewer values than survivors where the support
                alone says how many there are; a scale is too large for float32.
        """
        if self.scales is not None:
            limit = torch.finfo(torch.float32).max / (1 << (self.bits - 1))
            suspect = largest_scale(self.scales.dtype, self.exponent) > limit
            if suspect and bool((self.row_scales.to(torch.float64) > limit).any()):
                raise AdapterFormatError(
                    f"{name}: its scales times 2**{self.exponent} are beyond float32"
                )
        offsets = self._row_offsets
        if offsets is not None and int(offsets[-1]) != self.values.numel():
            raise AdapterFormatError(
                f"{name}: its support needs {int(offsets[-1])} units of values, "
                f"{self.values.numel()} are stored"
            )

    def _read_values(self, start: int, stop: int, slots: Slots) -> torch.Tensor:
        """float32 (n, K), anything where a slot is unused."""
        count, width = slots.index.shape
        offsets = self._row_offsets
        if offsets is None:
            size = self._row_size
            stored = self.values[start * size : stop * size].view(count, size)
            if self.bits >= 16:
                return stored.to(torch.float32, copy=True)
            codes = codec.unpack(stored, self.bits).reshape(count, -1)
            codes = codes[:, :width]
        else:
            first, last = int(offsets[start]), int(offsets[stop])
            stored = self.values[first:last]
            per_unit = 1 if self.bits >= 16 else 8 // self.bits
            row_start = torch.from_numpy((offsets[start:stop] - first) * per_unit)
            place = (row_start[:, None] + torch.arange(width)).masked_fill_(~_full(slots), 0)
            flat = stored if self.bits >= 16 else codec.unpack(stored, self.bits).reshape(-1)
            codes = flat[place].to(torch.float32) if flat.numel() else place.to(torch.float32)
            if self.bits >= 16:
                return codes
        return codes * self.row_scales[start:stop, None]

    @cached_property
    def row_scales(self) -> torch.Tensor:
        """What codes of each row are multiplied by, float32 (rows,); below 16 bits alone."""
        assert self.scales is not None
        return load_scales(self.scales, self.exponent)

    @cached_property
    def _row_size(self) -> int:
        """Units of `values` (floats or bytes) of each row, where all rows have the same."""
        slots = self.support.slots_per_row
        return slots if self.bits >= 16 else codec.bytes_per_row(slots, self.bits)

    @cached_property
    def _row_offsets(self) -> np.ndarray | None:
        """Where each row starts in `values` (rows + 1,), or None where all are of one size."""
        counts = self.support.row_counts
        if counts is None:
            return None
        units = counts if self.bits >= 16 else -(-counts * self.bits // 8)
        return np.concatenate([[0], np.cumsum(units)])


def _full(slots: Slots) -> torch.Tensor:
    assert slots.valid is not None
    return slots.valid
