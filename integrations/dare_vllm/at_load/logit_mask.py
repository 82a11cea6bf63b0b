"""No answer has a token of a spare row, but those of requests whose adapter fills it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from dare_vllm.per_request.slots import RowSlots

__all__ = ["LogitMask", "mask_of"]

_ATTRIBUTE = "_dare_logit_mask"


def mask_of(model: Any) -> LogitMask | None:
    """The mask of a model's logits; None: it has no spare rows."""
    found: LogitMask | None = getattr(model, _ATTRIBUTE, None)
    return found


class LogitMask:
    """logits[t, j] = -inf for every token j that row t does not have.

    It comes last of all that makes logits: after ranks' parts were gathered, after scaling and
    soft caps.

    Args:
        own: tokens that every row has.
        total: of the model, spare ones included.
    """

    def __init__(self, own: int, total: int) -> None:
        self.own, self.total = own, total
        self._rows: RowSlots | None = None
        self._known = torch.empty(0)

    def wrap(self, model: Any) -> None:
        """Let a model's logits be masked."""
        compute = getattr(model, "compute_logits", None)
        if compute is None:
            return  # it only embeds

        def compute_logits(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            logits = compute(hidden_states, *args, **kwargs)
            if logits is not None:  # another rank has them
                self.apply(logits, hidden_states)
            return logits

        model.compute_logits = compute_logits
        setattr(model, _ATTRIBUTE, self)

    def attach(self, rows: RowSlots) -> None:
        """Let slots have tokens of their own.

        Args:
            rows: where slots are told.
        """
        self._rows = rows
        # The last entry is for rows of no slot; the table stays where it is.
        self._known = torch.full((rows.count + 1,), self.own, device=rows.device)

    def fill(self, slot: int, added: int) -> None:
        """Let rows of a slot have some tokens more than all rows have."""
        self._known[slot] = self.own + added

    def clear(self, slot: int) -> None:
        """Let rows of a slot have no tokens of their own."""
        self._known[slot] = self.own

    def apply(self, logits: torch.Tensor, hidden: torch.Tensor) -> None:
        """Mask logits (n, total), in place, of hidden states (n, …)."""
        spare = logits[..., self.own :]
        if self._rows is None:
            spare.fill_(-torch.inf)
            return
        slots = self._rows.with_last(self._rows.of_samples(hidden))
        known = self._known.index_select(0, slots)
        tokens = torch.arange(self.own, self.total, device=logits.device)
        spare.masked_fill_(tokens >= known[:, None], -torch.inf)
