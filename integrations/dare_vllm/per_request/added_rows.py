"""Vocabulary rows that adapters bring and the base does not have, in the rows an engine spares."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dare_adapters.delta import join_added_rows
from dare_vllm.per_request.slots import RowSlots

__all__ = ["AddedRows"]


class AddedRows:
    """Of one embedding or head, the rows that this rank holds, by slot.

    The layer's own rows there are zeros. Rows of a slot that has none are left as they are: their
    requests may not name such a token, and their logits of it are masked.

    Args:
        rows: where slots are told.
        first: the layer's row of the first that can be added.
    """

    def __init__(self, rows: RowSlots, first: int) -> None:
        self.rows, self.first = rows, first
        self._values: dict[int, torch.Tensor] = {}
        self._bias: dict[int, torch.Tensor] = {}

    @property
    def used(self) -> bool:
        """Whether any slot has rows."""
        return bool(self._values or self._bias)

    def fill(self, slot: int, values: Sequence[torch.Tensor]) -> None:
        """Give a slot rows.

        Args:
            slot: from 0.
            values: (n, width) of each adapter of a mix, in their order; see
                :func:`dare_adapters.delta.join_added_rows`.
        """
        self._set(self._values, slot, values)

    def fill_bias(self, slot: int, values: Sequence[torch.Tensor]) -> None:
        """Give a slot's rows a bias, (n,) of each adapter."""
        self._set(self._bias, slot, values)

    def clear(self, slot: int) -> None:
        """Let a slot have none."""
        self._values.pop(slot, None)
        self._bias.pop(slot, None)

    def look_up(self, output: torch.Tensor, ids: torch.Tensor, slots: torch.Tensor) -> None:
        """output[t] = V[id[t] - first] where id[t] is one of the rows of t's slot.

        Args:
            output: (T, width), in place.
            ids: (T,), the layer's rows.
            slots: (T,).
        """
        for slot, values in self._values.items():
            place = ids - self.first
            here = (slots == slot) & (place >= 0) & (place < len(values))
            found = values.to(output.dtype)[place.clamp(0, len(values) - 1)]
            output.copy_(torch.where(here[:, None], found, output))

    def multiply(self, output: torch.Tensor, x: torch.Tensor, slots: torch.Tensor) -> None:
        """output[t, first + i] = V[i] · x[t] + b[i] for each row of t's slot.

        Args:
            output: (T, N), in place.
            x: (T, width).
            slots: (T,).
        """
        for slot, values in self._values.items():
            part = output[:, self.first : self.first + len(values)]
            made = x @ values.to(x.dtype).T
            bias = self._bias.get(slot)
            if bias is not None:
                made = made + bias.to(made.dtype)
            part.copy_(torch.where((slots == slot)[:, None], made.to(part.dtype), part))

    def _set(
        self, table: dict[int, torch.Tensor], slot: int, values: Sequence[torch.Tensor]
    ) -> None:
        joined = join_added_rows(values)
        if joined is not None and len(joined):
            table[slot] = joined.to(self.rows.device)
