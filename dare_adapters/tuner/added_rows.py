"""Vocabulary rows that adapters add, in a batch of several: read and answered from these alone.

An embedding under adapters finds a new word in the rows of the input's adapter; a head multiplies
with them. A word that an input's adapter lacks is zero where it is read, -inf where it is answered
(:mod:`mixed_vocabulary` says which inputs may have one). No weight of the grown size is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from dare_adapters.tuner.layer import DareLayer

__all__ = ["AddedRows", "GrownVocabulary"]


@dataclass(frozen=True)
class AddedRows:
    """What one adapter adds to a weight.

    Attributes:
        slot: of the adapter.
        first: the row of the grown weight where they begin; a padded base has rows there too.
        rows: (n, columns), any float dtype.
    """

    slot: int
    first: int
    rows: torch.Tensor


class GrownVocabulary:
    """The words of each slot of a batch.

    Args:
        added: what adapters add.
        of_base: how many words the base has.
        ends: how many each slot has.
        device: of the layer.
    """

    def __init__(
        self, added: Sequence[AddedRows], of_base: int, ends: Sequence[int], device: torch.device
    ) -> None:
        self._added, self._of_base, self._widest = added, of_base, max(ends)
        # The last one is the base's: it is what slot -1 finds.
        self._ends = torch.tensor([*ends, of_base], device=device)

    @classmethod
    def under(
        cls, layer: DareLayer, adapters: Sequence[str], device: torch.device
    ) -> GrownVocabulary | None:
        """That of a layer, with the adapter of each slot; None: none of them adds a row."""
        holder, local = layer.holder("weight")
        added = [
            AddedRows(slot, one.held.shape[0], holder.parts(one, name)["rows"].to(device))
            for slot, name in enumerate(adapters)
            for one in holder.dare_stored.get(name, ())
            if one.placement.local == local and one.held.added_rows
        ]
        if not added:
            return None
        ends = [layer.rows_under("weight", [name]) for name in adapters]
        return cls(added, layer.rows_before("weight"), ends, device)

    def of_base(self, words: torch.Tensor) -> torch.Tensor:
        """Words that the base can look up; another stands for one that it lacks."""
        return words.masked_fill(words >= self._of_base, 0)

    def read(self, found: torch.Tensor, words: torch.Tensor, token_slot: torch.Tensor) -> None:
        """Put added rows in place of what the base found.

        Args:
            found: (tokens, columns), of :meth:`of_base`.
            words: int64 (tokens,).
            token_slot: int64 (tokens,); -1 for none.
        """
        found[words >= self._ends[token_slot]] = 0
        for one in self._added:
            last = one.first + len(one.rows)
            here = (token_slot == one.slot) & (words >= one.first) & (words < last)
            place = here.nonzero().squeeze(1)
            found[place] = one.rows[words[place] - one.first].to(found.dtype)

    def answer(self, made: torch.Tensor, x: torch.Tensor, token_slot: torch.Tensor) -> torch.Tensor:
        """Logits of all words, those that a token's adapter lacks -inf.

        Args:
            made: (tokens, words of the base).
            x: (tokens, columns), the head's input.
            token_slot: as in :meth:`read`.
        """
        wide = made.new_full((len(made), max(self._widest, made.shape[1])), -torch.inf)
        wide[:, : made.shape[1]] = made
        for one in self._added:
            place = (token_slot == one.slot).nonzero().squeeze(1)
            own = x[place].to(torch.float32) @ one.rows.to(torch.float32).T
            wide[place, one.first : one.first + len(one.rows)] = own.to(made.dtype)
        return wide
