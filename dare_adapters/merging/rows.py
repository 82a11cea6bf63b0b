"""Vocabulary tensors of several models, their rows in the output's order, read as needed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from dare_adapters.delta import WholeDelta
from dare_adapters.errors import RecipeError
from dare_adapters.merging.tokenizer import OutputTokenizer
from dare_adapters.recipe import ModelReference, TokenRule

__all__ = ["AlignedDelta", "AlignedTensor", "RowPlan", "RowPlanner"]

ZERO, MEAN = -1, -2
STEP_ENTRIES = 1 << 20


@dataclass(frozen=True)
class RowPlan:
    """Where every row of the output is in every model. R rows, F of them filled in.

    Attributes:
        own: model number -> int64 (R,), which of its rows it is; -1: none.
        filled: int64 (F,), ascending: rows that a model without its own takes from elsewhere. A
            row that is none of these is padding: the mean of the model's other rows.
        fill_model: int64 (F,), from which model, or ZERO, or MEAN of the models with their own.
        fill_row: int64 (F,), which of that model's rows.
    """

    own: Mapping[int, torch.Tensor]
    filled: torch.Tensor
    fill_model: torch.Tensor
    fill_row: torch.Tensor

    @property
    def rows(self) -> int:
        """R."""
        return len(next(iter(self.own.values())))

    def keeps(self, model: int, rows: int) -> bool:
        """Whether a model's tensor of so many rows is the aligned one already."""
        own = self.own[model]
        return len(own) == rows and torch.equal(own, torch.arange(rows))


class RowPlanner:
    """Plans the rows of one tensor after the other.

    Args:
        models: of the merge, by number.
        maps: of each model, int64 (R,): its row of each of the output's, or -1.
        ids: the output's rows that are not padding.
        rules: of tokens, by row.
        tokenizer: of the output; None: rows have numbers alone, and no rules.

    Attributes:
        nowhere: tokens that no model has which a tensor is made of, and no rule gives.
        lacking: the names of such tensors.
    """

    def __init__(
        self,
        models: Sequence[ModelReference],
        maps: Sequence[torch.Tensor],
        ids: torch.Tensor,
        rules: Mapping[int, tuple[str, TokenRule]] | None = None,
        tokenizer: OutputTokenizer | None = None,
    ) -> None:
        self.models, self.maps, self.ids = models, maps, ids
        self.rules, self.tokenizer = rules or {}, tokenizer
        self.nowhere: dict[str, None] = {}
        self.lacking: dict[str, None] = {}

    def plan(self, base: int | None, heights: Mapping[int, int], name: str) -> RowPlan:
        """The rows of a tensor, by mergekit's rules.

        What a model lacks it takes as a rule says, else from the one model that has it, else from
        the base, else as the mean of those that have it, else as zeros.

        Args:
            base: the number of the base, if it is one of the models.
            heights: number of each model that the tensor is made of -> its rows.
            name: of the tensor, for messages.

        Raises:
            RecipeError: a rule names a row that is not there.
        """
        own = {
            number: self.maps[number].masked_fill(self.maps[number] >= height, -1)
            for number, height in heights.items()
        }
        numbers = torch.tensor(list(own))
        having = torch.stack([index >= 0 for index in own.values()])
        count = having.sum(0)
        real = torch.zeros(len(count), dtype=torch.bool)
        real[self.ids] = True
        first = numbers[having.to(torch.uint8).argmax(0)]
        chosen = torch.where(count == 1, first, MEAN)
        if base is not None:
            chosen[own[base] >= 0] = base
        chosen[count == 0] = ZERO
        rows = torch.full_like(count, -1)
        for number, index in own.items():
            rows[chosen == number] = index[chosen == number]
        wanted = real & (count < len(own))
        ruled = torch.zeros_like(real)
        for place, (text, rule) in self.rules.items():
            if rule.source is not None and (wanted[place] or rule.force):
                model, row = self._source(name, text, rule, own, heights)
                chosen[place], rows[place] = model, row
                wanted[place] = ruled[place] = True
                if rule.force:
                    for index in own.values():
                        index[place] = -1
        self._note(name, (wanted & (count == 0) & ~ruled).nonzero().squeeze(1))
        filled = wanted.nonzero().squeeze(1)
        return RowPlan(own, filled, chosen[filled], rows[filled])

    def _note(self, name: str, places: torch.Tensor) -> None:
        if not len(places):
            return
        self.lacking[name] = None
        texts = {n: text for text, n in self.tokenizer.vocabulary.items()} if self.tokenizer else {}
        self.nowhere.update({texts.get(place, str(place)): None for place in places.tolist()})

    def _source(
        self,
        name: str,
        text: str,
        rule: TokenRule,
        own: Mapping[int, torch.Tensor],
        heights: Mapping[int, int],
    ) -> tuple[int, int]:
        """The model and its row that a rule names."""
        source = rule.source
        assert source is not None
        assert self.tokenizer is not None
        if source.kind == "zero":
            return ZERO, -1
        assert source.model is not None
        number = self.models.index(source.model)
        where = f"tokenizer.tokens: {text!r} is to come from {source.model}, which"
        if number not in own:
            raise RecipeError(f"{where} {name} is not made of; name one of its models")
        row = source.token_id
        if source.kind == "model" or row is None:
            wanted = text if source.kind == "model" else str(source.token)
            row = self.tokenizer.models[source.model].get(wanted)
            if row is None:
                raise RecipeError(f"{where} has no token {wanted!r}")
        if row >= heights[number]:
            raise RecipeError(
                f"{where} has no row {row} of {name}; it has {heights[number]}, from 0"
            )
        return number, row


@dataclass(frozen=True)
class _Opened:
    """What reading needs.

    Attributes:
        tensors: model number -> its tensor, (its rows, *rest).
        fills: (F, *rest), dtype of the aligned tensors.
        slot: int64 (R,), which of the fills a row is; -1: padding.
        padding: model number -> the row that pads it, (*rest), dtype of the aligned tensors.
    """

    tensors: Mapping[int, torch.Tensor]
    fills: torch.Tensor
    slot: torch.Tensor
    padding: dict[int, torch.Tensor]


class AlignedTensor:
    """A vocabulary tensor of several models.

    What is filled in is computed once, and held until :meth:`release`.

    Args:
        plan: of its rows.
        rest: the shape of a row.
        dtype: that holds what any model's tensor does.
        read: model number -> its tensor.
    """

    def __init__(
        self,
        plan: RowPlan,
        rest: tuple[int, ...],
        dtype: torch.dtype,
        read: Callable[[int], torch.Tensor],
    ) -> None:
        self.plan, self.dtype = plan, dtype
        self.shape = (plan.rows, *rest)
        self._read = read
        self._lock = threading.Lock()
        self._opened: _Opened | None = None

    def rows(self, model: int, start: int, stop: int) -> torch.Tensor:
        """A model's rows start … stop - 1, float32 (n, *rest), the caller's own."""
        return self._gather(self._open(), model, start, stop, torch.float32)

    def whole(self, model: int) -> torch.Tensor:
        """A model's tensor, (R, *rest), the caller's own."""
        opened = self._open()
        made = torch.empty(self.shape, dtype=self.dtype)
        for start, stop in self._steps():
            made[start:stop] = self._gather(opened, model, start, stop, self.dtype)
        return made

    def release(self) -> None:
        """Forget what was computed; it is computed again if it is read again."""
        with self._lock:
            self._opened = None

    def _open(self) -> _Opened:
        with self._lock:
            if self._opened is None:
                self._opened = self._make()
            return self._opened

    def _make(self) -> _Opened:
        plan = self.plan
        tensors = {model: self._read(model) for model in plan.own}
        slot = torch.full((plan.rows,), -1)
        slot[plan.filled] = torch.arange(len(plan.filled))
        fills = torch.zeros((len(plan.filled), *self.shape[1:]), dtype=self.dtype)
        for model, tensor in tensors.items():
            here = (plan.fill_model == model).nonzero().squeeze(1)
            fills[here] = tensor[plan.fill_row[here]].to(self.dtype)
        self._add_means(fills, tensors)
        opened = _Opened(tensors, fills, slot, {})
        if any(bool(((own < 0) & (slot < 0)).any()) for own in plan.own.values()):
            for model in tensors:
                opened.padding[model] = self._mean_row(opened, model)
        return opened

    def _add_means(self, fills: torch.Tensor, tensors: Mapping[int, torch.Tensor]) -> None:
        wanted = (self.plan.fill_model == MEAN).nonzero().squeeze(1)
        step = self._steps()[0][1]
        for start in range(0, len(wanted), step):
            here = wanted[start : start + step]
            total = torch.zeros((len(here), *self.shape[1:]))
            count = torch.zeros(len(here), *(1 for _ in self.shape[1:]))
            for model, tensor in tensors.items():
                own = self.plan.own[model][self.plan.filled[here]]
                having = (own >= 0).nonzero().squeeze(1)
                total[having] += tensor[own[having]].to(torch.float32)
                count[having] += 1
            fills[here] = (total / count).to(self.dtype)

    def _mean_row(self, opened: _Opened, model: int) -> torch.Tensor:
        real = (self.plan.own[model] >= 0) | (opened.slot >= 0)
        total = torch.zeros(self.shape[1:], dtype=torch.float64)
        opened.padding[model] = total.to(self.dtype)
        for start, stop in self._steps():
            rows = self._gather(opened, model, start, stop, torch.float32)
            total += rows[real[start:stop]].sum(0, dtype=torch.float64)
        return (total / max(int(real.sum()), 1)).to(self.dtype)

    def _gather(
        self, opened: _Opened, model: int, start: int, stop: int, dtype: torch.dtype
    ) -> torch.Tensor:
        own = self.plan.own[model][start:stop]
        tensor = opened.tensors[model]
        if len(own) and bool((own == own[0] + torch.arange(len(own))).all()) and own[0] >= 0:
            return tensor[int(own[0]) : int(own[0]) + len(own)].to(dtype, copy=True)
        made = torch.empty((len(own), *self.shape[1:]), dtype=dtype)
        slot = opened.slot[start:stop]
        here = (own >= 0).nonzero().squeeze(1)
        made[here] = tensor[own[here]].to(dtype)
        here = ((own < 0) & (slot >= 0)).nonzero().squeeze(1)
        made[here] = opened.fills[slot[here]].to(dtype)
        here = ((own < 0) & (slot < 0)).nonzero().squeeze(1)
        if len(here):
            made[here] = opened.padding[model].to(dtype)
        return made

    def _steps(self) -> list[tuple[int, int]]:
        step = max(1, STEP_ENTRIES // max(prod(self.shape[1:]), 1))
        return [(at, min(at + step, self.shape[0])) for at in range(0, self.shape[0], step)]


class AlignedDelta(WholeDelta):
    """A model's aligned tensor minus the base's, or, without a base, minus zero.

    Args:
        tensor: of all models.
        model, base: numbers of two.
    """

    def __init__(self, tensor: AlignedTensor, model: int, base: int | None) -> None:
        super().__init__(tensor.shape)
        self.tensor, self.model, self.base = tensor, model, base

    def read(self, start: int, stop: int) -> tuple[None, torch.Tensor]:
        if len(self.shape) == 1:  # a bias is one row of a matrix, but has one for each token
            start, stop = start * self.columns, stop * self.columns
        change = self.tensor.rows(self.model, start, stop)
        if self.base is not None:
            change -= self.tensor.rows(self.base, start, stop)
        return None, change.reshape(-1)

    def release(self) -> None:
        self.tensor.release()
