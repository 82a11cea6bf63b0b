"""Routed experts whose weights differ by row: rows of adapters are computed expert by expert.

A fused kernel has no place between its two products where a change could be added. So rows that an
adapter changes are computed anew, from the same weights and the router's own choice. On a CPU that
is every row: the kernel that vLLM takes where LoRA is enabled (Triton) does not run there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dare_vllm.per_request.shards import Shard
from dare_vllm.per_request.sites import Change, Products, Site
from dare_vllm.per_request.slots import RowSlots

__all__ = ["ExpertsSite", "expert_entries", "expert_shard", "is_plain_experts"]

MATRICES = ("w1", "w2", "w3")
"""Gate, down and up projection, as vLLM calls them."""


class ExpertsSite(Site):
    """y[t] = Σ_e r[t, e] · (W2 + Δ2)(silu((W1 + Δ1) x[t]) · (W3 + Δ3) x[t]), before ranks' sums.

    Args:
        name: of the layer.
        rows: where slots are told.
    """

    def __init__(self, name: str, rows: RowSlots) -> None:
        super().__init__(name, rows)
        self.products: dict[str, Products] = {}  # "3.w1" -> what changes there

    def wrap(self, layer: Any) -> None:
        """Let a `RoutedExperts` layer be changed by this site."""
        own_forward = layer.forward_modular

        def forward_modular(
            x: torch.Tensor,
            topk_weights: torch.Tensor,
            topk_ids: torch.Tensor,
            *args: Any,
            **kw: Any,
        ) -> Any:
            self.ran = True
            slots = self.rows.of_tokens(len(x))
            if x.device.type == "cpu":
                return self.run(layer, x, topk_weights, topk_ids, slots)
            output = own_forward(x, topk_weights, topk_ids, *args, **kw)
            filled = self._filled()
            if filled:
                held = torch.isin(slots, torch.tensor(sorted(filled), device=slots.device))
                here = held.nonzero().squeeze(1)
                output[here] = self.run(
                    layer, x[here], topk_weights[here], topk_ids[here], slots[here]
                )
            return output

        layer.forward_modular = forward_modular

    def fill(self, slot: int, part: str, start: int, changes: Sequence[Change]) -> None:
        self.products.setdefault(part, Products(self.rows)).fill(slot, changes)

    def clear(self, slot: int) -> None:
        for products in self.products.values():
            products.clear(slot)

    def run(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        slots: torch.Tensor,
    ) -> torch.Tensor:
        """All experts' sum for each row, (n, H).

        Args:
            layer: with `w13_weight` (E, 2 I, H) and `w2_weight` (E, H, I).
            x: (n, H).
            topk_weights, topk_ids: the router's choice, (n, k).
            slots: int64 (n,).
        """
        made = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        inner = layer.w2_weight.shape[2]
        for expert in range(layer.w13_weight.shape[0]):
            row, choice = (topk_ids == expert).nonzero(as_tuple=True)
            if not len(row):
                continue
            own, own_slots = x[row], slots[row]
            hidden = own @ layer.w13_weight[expert].T
            self._add(hidden, own, own_slots, f"{expert}.w1", 0)
            self._add(hidden, own, own_slots, f"{expert}.w3", inner)
            active = torch.nn.functional.silu(hidden[:, :inner]) * hidden[:, inner:]
            output = active @ layer.w2_weight[expert].T
            self._add(output, active, own_slots, f"{expert}.w2", 0)
            made.index_add_(0, row, output * topk_weights[row, choice, None].to(torch.float32))
        return made.to(x.dtype)

    def _add(
        self, output: torch.Tensor, x: torch.Tensor, slots: torch.Tensor, part: str, start: int
    ) -> None:
        products = self.products.get(part)
        if products is not None and products.used:
            products.add(output, x, slots, start)

    def _filled(self) -> set[int]:
        return {slot for products in self.products.values() for slot in products.slots()}


def is_plain_experts(layer: Any) -> bool:
    """Whether a `RoutedExperts` layer is one that :class:`ExpertsSite` computes as vLLM does."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    config = layer.moe_config
    plain = (
        layer.activation == MoEActivation.SILU
        and config.is_act_and_mul
        and not config.has_bias
        and not layer.apply_router_weight_on_input
        and layer.swiglu_limit is None
        and not layer.use_ep
        and not layer.quant_method.is_monolithic
    )
    if not plain:
        return False
    inner, hidden = _inner(layer), int(config.hidden_dim)
    count = int(config.num_experts)
    shapes = tuple(layer.w13_weight.shape), tuple(layer.w2_weight.shape)
    return shapes == ((count, 2 * inner, hidden), (count, hidden, inner))


def expert_shard(layer: Any, matrix: str) -> Shard:
    """Which part of an expert's matrix this rank holds."""
    inner, hidden = _inner(layer), int(layer.moe_config.hidden_dim)
    first = int(layer.moe_config.moe_parallel_config.tp_rank) * inner
    whole = int(layer.moe_config.moe_parallel_config.tp_size) * inner
    held = first, first + inner
    if matrix == "w2":
        return Shard((hidden, whole), (0, hidden), held, 0)
    return Shard((whole, hidden), held, (0, hidden), inner if matrix == "w3" else 0)


def expert_entries(
    layer: Any, part: str, start: int, row: torch.Tensor, column: torch.Tensor
) -> torch.Tensor:
    """Entries of what this rank holds of an expert's matrix, on the CPU."""
    expert, _, matrix = part.partition(".")
    weight = layer.w2_weight if matrix == "w2" else layer.w13_weight
    index = (row + start).to(weight.device), column.to(weight.device)
    found: torch.Tensor = weight.detach()[int(expert)][index].cpu()
    return found


def _inner(layer: Any) -> int:
    return int(layer.moe_config.intermediate_size_per_partition)
