"""Where the tensors of each slot's delta are, as a tensor that a kernel reads.

A table is nothing but addresses: an equal list of addresses has an equal table, and one that was
made is never wrong later. So tables are kept, and those that a captured graph reads are kept for
good; what an engine writes into the tensors meanwhile is seen.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock

import torch

from dare_adapters.kernels.compressed_rows import CompressedRowsLayout
from dare_adapters.kernels.packed_delta import PackedDelta

__all__ = ["slot_table"]

FIELDS = 5
KEPT = 4096

_Key = tuple[object, ...]
_tables: OrderedDict[_Key, torch.Tensor] = OrderedDict()
_captured: dict[_Key, torch.Tensor] = {}
_lock = Lock()


def slot_table(deltas: Sequence[PackedDelta | None], device: torch.device) -> torch.Tensor:
    """Addresses of deltas, int64 (slots, 5), zeros where there is none.

    In a row: offsets or column index; values; scales; row starts; and how many entries there are
    in compressed rows. Zero for what there is not.
    """
    addresses = [None if delta is None else _addresses(delta) for delta in deltas]
    key: _Key = (device, *addresses)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    with _lock:
        table = _captured.get(key)
        if table is not None:
            return table
        table = _tables.pop(key, None)
        if table is None:
            if capturing:
                return _written(addresses, device)
            rows = [one or (0,) * FIELDS for one in addresses]
            table = torch.tensor(rows, dtype=torch.int64).to(device)
        if capturing:
            _captured[key] = table
            return table
        _tables[key] = table
        if len(_tables) > KEPT:
            _tables.popitem(last=False)
        return table


def _addresses(delta: PackedDelta) -> tuple[int, ...]:
    layout = delta.layout
    entries = layout.survivors if isinstance(layout, CompressedRowsLayout) else 0
    return (*delta.addresses, entries)


def _written(addresses: Sequence[tuple[int, ...] | None], device: torch.device) -> torch.Tensor:
    """A table that is written on the device: nothing can be copied to it while it is captured."""
    table = torch.zeros(len(addresses), FIELDS, dtype=torch.int64, device=device)
    for slot, own in enumerate(addresses):
        for field, address in enumerate(own or ()):
            if address:
                table[slot, field].fill_(address)
    return table
