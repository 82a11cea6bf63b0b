"""Layers of a live vLLM model that add each row's own change: what the model runs on each step.

A site wraps one layer of the model. It leaves rows of no adapter as they are, bit for bit, and
asks an accelerator for no number. Slots are filled and emptied between steps.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dare_adapters.kernels import PackedDelta, sparse_delta_linear
from dare_vllm.per_request.added_rows import AddedRows
from dare_vllm.per_request.slots import RowSlots

__all__ = [
    "ADDED_BIAS",
    "ADDED_WEIGHT",
    "Change",
    "EmbeddingSite",
    "LinearSite",
    "NormSite",
    "Products",
    "Site",
    "Vectors",
]

# Parts of a vocabulary that the base does not have.
ADDED_WEIGHT, ADDED_BIAS = "added weight", "added bias"


@dataclass(frozen=True)
class Change:
    """One term of what an adapter does to a part of a site.

    Attributes:
        delta: of the rows and columns that this process holds; a vector where the parameter is.
        weight: the factor that it is added with.
    """

    delta: PackedDelta | torch.Tensor
    weight: float = 1.0


class Site(ABC):
    """A layer that can add changes.

    Attributes:
        name: of the layer, as the model names it.
        ran: whether the model has called it. A model that takes the weight from the layer
            without calling it would ignore a change.
    """

    def __init__(self, name: str, rows: RowSlots) -> None:
        self.name, self.rows = name, rows
        self.ran = False

    @abstractmethod
    def fill(self, slot: int, part: str, start: int, changes: Sequence[Change]) -> None:
        """Let rows of a slot be changed.

        Args:
            slot: from 0.
            part: "weight" or "bias"; of experts, "3.w1"; "added weight" and "added bias" are whole
                rows of a vocabulary.
            start: the layer's first row that changes: fused layers hold several parameters.
            changes: of one shape, which are added up; added rows are the first's, and of the
                others what is beyond.
        """

    @abstractmethod
    def clear(self, slot: int) -> None:
        """Let rows of a slot be the base's again."""


class LinearSite(Site):
    """A linear layer: y[t] += Σ w · x[t] Δᵀ, and the changes of its bias.

    Everything that vLLM multiplies by a weight goes through its layer's `quant_method.apply`,
    whatever holds the layer: before tensor-parallel sums, so that ranks add what they hold.

    Args:
        name: of the layer.
        rows: where slots are told.
        bias_width: N of its bias, 0: it has none.
        of_samples: whether its rows are those that are sampled from: the head's are.
        added: of a head, the rows that adapters bring.
    """

    def __init__(
        self,
        name: str,
        rows: RowSlots,
        *,
        bias_width: int = 0,
        of_samples: bool = False,
        added: AddedRows | None = None,
    ) -> None:
        super().__init__(name, rows)
        self.of_samples = of_samples
        self.added = added
        self.method: Any = None  # the layer's own, once it is wrapped
        self.products: dict[int, Products] = {}
        self.bias = Vectors(rows, bias_width)
        self.number = len(_sites)
        _sites.append(self)

    def wrap(self, layer: Any) -> None:
        """Let a layer's products be changed by this site."""
        self.method = method = layer.quant_method
        wrapped = copy.copy(method)

        def apply(layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            return self.add(method.apply(layer, x, bias), x)

        wrapped.apply = apply
        layer.quant_method = wrapped

    def wrap_forward(self, layer: Any) -> None:
        """The same for a layer that chooses among kernels in a forward of its own, unsharded."""
        self.method, own_forward = layer.quant_method, layer.forward

        def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            made = own_forward(x, *args, **kwargs)
            if isinstance(made, tuple):
                return (self.add(made[0], x), *made[1:])
            return self.add(made, x)

        layer.forward = forward

    def fill(self, slot: int, part: str, start: int, changes: Sequence[Change]) -> None:
        if _fill_added(self.added, slot, part, changes):
            return
        if part == "bias":
            self.bias.fill(slot, start, changes)
            return
        self.products.setdefault(start, Products(self.rows)).fill(slot, changes)

    def clear(self, slot: int) -> None:
        self.bias.clear(slot)
        for products in self.products.values():
            products.clear(slot)
        if self.added is not None:
            self.added.clear(slot)

    def add(self, output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The output of the base layer (…, N) for x (…, K), with each row's changes."""
        self.ran = True
        compiling = torch.compiler.is_compiling()  # nothing that changes may be looked at then
        if not compiling and not self.used:
            return output
        output = output.contiguous()
        flat, x = output.view(-1, output.shape[-1]), x.reshape(-1, x.shape[-1])
        if compiling:
            _add_changes(flat, x, self.number)
        else:
            self.run(flat, x)
        return output

    @property
    def used(self) -> bool:
        """Whether any slot changes the layer."""
        added = self.added is not None and self.added.used
        return added or self.bias.used or any(own.used for own in self.products.values())

    def run(self, output: torch.Tensor, x: torch.Tensor) -> None:
        """:meth:`add` to matrices, in place."""
        slots = self.rows.of_samples(x) if self.of_samples else self.rows.of_tokens(len(x))
        for start, products in self.products.items():
            if products.used:
                products.add(output, x, slots, start)
        if self.bias.used:
            output += self.bias.of(slots).to(output.dtype)
        if self.added is not None and self.added.used:
            self.added.multiply(output, x, slots)


class EmbeddingSite(Site):
    """An embedding: y[t] += Σ w · Δ[id[t]], before tensor-parallel sums.

    Args:
        name: of the layer.
        rows: where slots are told.
        added: the rows that adapters bring; None: its rows are no tokens.
    """

    def __init__(self, name: str, rows: RowSlots, added: AddedRows | None = None) -> None:
        super().__init__(name, rows)
        self.added = added
        self.method: Any = None  # the layer's own, once it is wrapped
        self.products = Products(rows)

    def wrap(self, layer: Any) -> None:
        """Let a layer's look-ups be changed by this site."""
        self.method = method = layer.quant_method
        wrapped = copy.copy(method)

        def embedding(layer: Any, ids: torch.Tensor) -> torch.Tensor:
            return self.add(method.embedding(layer, ids), ids)

        wrapped.embedding = embedding
        layer.quant_method = wrapped
        if hasattr(layer, "use_fused_embedding"):  # a kernel that reads the weight by itself
            layer.use_fused_embedding = False

    def wrap_positions(self, layer: Any) -> None:
        """The same for a table of learned positions, whose rows begin `offset` later."""
        own_forward = layer.forward

        def forward(positions: torch.Tensor) -> torch.Tensor:
            return self.add(own_forward(positions), positions + layer.offset)

        layer.forward = forward

    def fill(self, slot: int, part: str, start: int, changes: Sequence[Change]) -> None:
        if not _fill_added(self.added, slot, part, changes):
            self.products.fill(slot, changes)

    def clear(self, slot: int) -> None:
        self.products.clear(slot)
        if self.added is not None:
            self.added.clear(slot)

    def add(self, output: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The embeddings of ids (…) in the base, with each row's changes."""
        self.ran = True
        adds = self.added is not None and self.added.used
        if not self.products.used and not adds:
            return output
        output = output.contiguous()
        flat, ids = output.view(-1, output.shape[-1]), ids.reshape(-1)
        slots = self.rows.of_tokens(len(ids))
        self.products.look_up(flat, ids, slots)
        if self.added is not None:
            self.added.look_up(flat, ids, slots)
        return output


class NormSite(Site):
    """A normalisation: norm(x) · (w + Δ) + (b + Δ_b), for rows that change either.

    Args:
        name: of the layer.
        rows: where slots are told.
        widths: of its weight, and of its bias, 0: it has none.
        one: what the layer adds to its weight (Gemma stores w - 1).
        centred: whether it subtracts the mean (LayerNorm) or not (RMSNorm).
        batched: whether the model calls it with one dimension more, a batch of one: rows (1, T, …).
    """

    def __init__(
        self,
        name: str,
        rows: RowSlots,
        widths: tuple[int, int],
        *,
        one: float,
        centred: bool,
        batched: bool = False,
    ) -> None:
        super().__init__(name, rows)
        self.one, self.centred, self.batched = one, centred, batched
        self.weight, self.bias = (Vectors(rows, width) for width in widths)

    def wrap(self, layer: Any) -> None:
        """Let a layer's outputs be changed by this site."""
        own_forward = layer.forward

        def forward(x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
            self.ran = True
            if residual is None:
                return self.change(layer, own_forward(x), x)
            output, summed = own_forward(x, residual)
            return self.change(layer, output, summed), summed

        layer.forward = forward

    def fill(self, slot: int, part: str, start: int, changes: Sequence[Change]) -> None:
        (self.bias if part == "bias" else self.weight).fill(slot, start, changes)

    def clear(self, slot: int) -> None:
        self.weight.clear(slot)
        self.bias.clear(slot)

    def change(self, layer: Any, output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """What the layer made of x, (T, H) or (T, heads, H), with each row's own weight."""
        if not self.weight.used and not self.bias.used:
            return output
        if self.batched:
            return self._changed_rows(layer, output[0], x[0])[None]
        return self._changed_rows(layer, output, x)

    def _changed_rows(self, layer: Any, output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        slots = self.rows.of_tokens(len(x))
        between = (slice(None), *[None] * (x.dim() - 2))  # heads of one token have its slot
        wide = x.to(torch.float32)
        if self.centred:
            wide = wide - wide.mean(-1, keepdim=True)
        size = getattr(layer, "variance_size_override", None)
        variance = wide[..., :size].square().mean(-1, keepdim=True)
        made = wide * torch.rsqrt(variance + _epsilon(layer))
        made = made * (_changed(layer.weight, self.weight.of(slots)[between]) + self.one)
        own_bias = getattr(layer, "bias", None)
        if own_bias is not None:
            made = made + _changed(own_bias, self.bias.of(slots)[between])
        touched = self.weight.touches(slots) | self.bias.touches(slots)
        return torch.where(touched[between][..., None], made.to(output.dtype), output)


class Products:
    """Packed changes of a matrix, by slot."""

    def __init__(self, rows: RowSlots) -> None:
        self.rows = rows
        self.used = False
        self._changes: list[Sequence[Change]] = [()] * rows.count
        # A pass takes one delta of each slot; mixes need several.
        self._passes: list[tuple[list[PackedDelta | None], torch.Tensor]] = []

    def fill(self, slot: int, changes: Sequence[Change]) -> None:
        self._changes[slot] = tuple(changes)
        self._plan()

    def clear(self, slot: int) -> None:
        if self._changes[slot]:
            self.fill(slot, ())

    def slots(self) -> list[int]:
        """The slots that change."""
        return [slot for slot, changes in enumerate(self._changes) if changes]

    def _plan(self) -> None:
        self._passes = []
        for number in range(max(len(changes) for changes in self._changes)):
            here = [c[number] if number < len(c) else None for c in self._changes]
            deltas = [None if c is None else _matrix(c.delta) for c in here]
            weights = torch.tensor([0.0 if c is None else c.weight for c in here])
            self._passes.append((deltas, weights.to(self.rows.device)))
        self.used = bool(self._passes)

    def add(self, output: torch.Tensor, x: torch.Tensor, slots: torch.Tensor, start: int) -> None:
        """output[t, start + n] += Σ w · Σ_k x[t, k] Δ[n, k]."""
        for deltas, weights in self._passes:
            height = next(delta.rows for delta in deltas if delta is not None)
            part = output[:, start : start + height]
            sparse_delta_linear(x, deltas, slots, part, weights=weights)

    def look_up(self, output: torch.Tensor, ids: torch.Tensor, slots: torch.Tensor) -> None:
        """output[t] += Σ w · Δ[id[t]]; of rows beyond those of the delta nothing."""
        for deltas, weights in self._passes:
            for slot, delta in enumerate(deltas):
                if delta is None:
                    continue
                here = (slots == slot) & (ids < delta.rows)
                if output.device.type == "cpu":
                    place = here.nonzero().squeeze(1)
                    change = delta.rows_at(ids[place].clamp(0, delta.rows - 1)) * weights[slot]
                    output[place] = (change + output[place]).to(output.dtype)
                else:  # which rows are a slot's is known to the device alone
                    change = delta.rows_at(ids.clamp(0, delta.rows - 1)) * weights[slot]
                    changed = (change + output).to(output.dtype)
                    output.copy_(torch.where(here[:, None], changed, output))


class Vectors:
    """Changes of a vector, by slot, in one table that stays where it is.

    Args:
        rows: where slots are told.
        width: N, entries of the vector; 0 where the layer has none.

    Attributes:
        used: whether any slot changes it.
    """

    def __init__(self, rows: RowSlots, width: int) -> None:
        self.rows, self.width = rows, width
        self.used = False
        # The last row is for rows of no slot.
        self._table = torch.zeros(rows.count + 1, width, device=rows.device)
        self._touched = torch.zeros(rows.count + 1, dtype=torch.bool, device=rows.device)
        self._slots: set[int] = set()

    def fill(self, slot: int, start: int, changes: Sequence[Change]) -> None:
        """Set entries start … of a slot's change."""
        for change in changes:
            delta = _vector(change.delta)
            self._table[slot, start : start + len(delta)] += (change.weight * delta).to(
                self._table.device
            )
        self._touched[slot] = True
        self._slots.add(slot)
        self.used = True

    def clear(self, slot: int) -> None:
        """Let the rows of a slot have the base's vector."""
        if slot in self._slots:
            self._table[slot] = 0
            self._touched[slot] = False
            self._slots.remove(slot)
            self.used = bool(self._slots)

    def of(self, slots: torch.Tensor) -> torch.Tensor:
        """The change of each row, float32 (T, N); zero where there is none."""
        return self._table.index_select(0, self.rows.with_last(slots))

    def touches(self, slots: torch.Tensor) -> torch.Tensor:
        """Whether each row has a change, bool (T,)."""
        return self._touched.index_select(0, self.rows.with_last(slots))


_sites: list[LinearSite] = []  # of this process, for the operator below


@torch.library.custom_op("dare_vllm::add_changes", mutates_args=("output",))
def _add_changes(output: torch.Tensor, x: torch.Tensor, site: int) -> None:
    """:meth:`LinearSite.run`, of which a compiler sees nothing but tensors."""
    _sites[site].run(output, x)


@_add_changes.register_fake
def _(output: torch.Tensor, x: torch.Tensor, site: int) -> None:
    return None


def _fill_added(added: AddedRows | None, slot: int, part: str, changes: Sequence[Change]) -> bool:
    """Fill rows of a vocabulary that are added; False: the part is another."""
    fills = {} if added is None else {ADDED_WEIGHT: added.fill, ADDED_BIAS: added.fill_bias}
    if part not in fills:
        return False
    fills[part](slot, [_vector(change.delta) for change in changes])
    return True


def _epsilon(layer: Any) -> float:
    return float(layer.variance_epsilon if hasattr(layer, "variance_epsilon") else layer.eps)


def _changed(own: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """w + Δ rounded once to the dtype of w, as the merged model would hold it; float32."""
    return (own.to(torch.float32) + change).to(own.dtype).to(torch.float32)


def _matrix(delta: PackedDelta | torch.Tensor) -> PackedDelta:
    if not isinstance(delta, PackedDelta):
        raise TypeError("a matrix changes by a packed delta")
    return delta


def _vector(delta: PackedDelta | torch.Tensor) -> torch.Tensor:
    if not isinstance(delta, torch.Tensor):
        raise TypeError("a vector changes by a vector")
    return delta
