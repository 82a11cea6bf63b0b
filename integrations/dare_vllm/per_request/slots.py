"""Which slot each row of a step belongs to: vLLM's own tables for LoRA, read in one place.

vLLM gives each adapter of a batch one of `max_loras` slots, and each token the number of its slot,
-1 for the base. Its tables have room for the largest batch and stay where they are, so that what
reads a table's first rows needs no number from the device.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["RowSlots", "rows_of"]

_by_wrapper: WeakKeyDictionary[Any, RowSlots] = WeakKeyDictionary()


def rows_of(wrapper: Any) -> RowSlots | None:
    """The tables of a wrapper of vLLM's, if any adapter could be served by it."""
    return _by_wrapper.get(wrapper)


class RowSlots:
    """The slots of the rows of a step's tensors.

    Args:
        wrapper: vLLM's `PunicaWrapperBase`, which each step fills its tables in.
        count: of slots.

    Attributes:
        count: of slots.
        holds_lora: slots that hold a stock LoRA.
    """

    def __init__(self, wrapper: Any, count: int) -> None:
        self.count = count
        self.holds_lora = [False] * count
        self._tokens: torch.Tensor = wrapper._token_lora_indices
        self._samples: torch.Tensor = wrapper._sampler_indices
        self._prompt: torch.Tensor | None = None
        # vLLM leaves them uninitialised until the first batch that any LoRA could be in.
        self._tokens.fill_(-1)
        self._samples.fill_(-1)
        _by_wrapper[wrapper] = self

    @property
    def device(self) -> torch.device:
        """Where the tables are."""
        return self._tokens.device

    def of_tokens(self, count: int) -> torch.Tensor:
        """Slots of the step's first `count` tokens, int64 (count,)."""
        return self._tokens[:count]

    def of_samples(self, hidden: torch.Tensor) -> torch.Tensor:
        """Slots of rows of which logits are asked, int64 (n,).

        Args:
            hidden: (n, …), rows that are sampled from; or inside :meth:`scoring_prompts` some
                rows of the step's tokens, as a view.
        """
        if self._prompt is None:
            return self._samples[: len(hidden)]
        step = self._prompt
        first = (hidden.data_ptr() - step.data_ptr()) // max(
            step.stride(0) * step.element_size(), 1
        )
        return self._tokens[first : first + len(hidden)]

    @contextmanager
    def scoring_prompts(self, hidden: torch.Tensor) -> Iterator[None]:
        """Inside the block logits are asked of slices of a step's tokens, not of its samples.

        Args:
            hidden: (tokens, …), all of the step's.
        """
        self._prompt = hidden
        try:
            yield
        finally:
            self._prompt = None

    def with_last(self, slots: torch.Tensor) -> torch.Tensor:
        """Slots, with the number `count` for rows of no slot, to look up a table of count + 1."""
        known = (slots >= 0) & (slots < self.count)
        return torch.where(known, slots, self.count)
