"""Two faults of vLLM's LoRA on CPUs, kept from the answers of requests beside one.

vLLM 0.32's torch operators look up the LoRA of slot -1, "none", which is the last slot: rows of
the base then get the change of whatever LoRA is there. Here they get back what they had. And
scoring a prompt takes the slots of sampled rows for the prompt's, which ends the engine. Rows of
DARE adapters have LoRAs of zeros, of which products need not be taken at all.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from dare_vllm.per_request.slots import rows_of

__all__ = ["hook_cpu_lora"]


def hook_cpu_lora() -> None:
    """Replace the three functions by which LoRAs are added on a CPU."""
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    for name in ("add_lora_linear", "add_lora_embedding", "add_lora_logits"):
        setattr(PunicaWrapperCPU, name, _guarded(getattr(PunicaWrapperCPU, name)))


def _guarded(stock: Any) -> Any:
    of_samples = stock.__name__ == "add_lora_logits"

    @functools.wraps(stock)
    def add(self: Any, y: torch.Tensor, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rows = rows_of(self)
        if rows is None:
            return stock(self, y, x, *args, **kwargs)
        slots = rows.of_samples(x) if of_samples else self.token_lora_indices
        holds = torch.tensor([*rows.holds_lora, False])[rows.with_last(slots)]
        if not bool(holds.any()):
            return None
        kept = y[: len(slots)][~holds].clone()
        with _sampled_from(self, slots) if of_samples else nullcontext():
            made = stock(self, y, x, *args, **kwargs)
        y[: len(slots)][~holds] = kept
        return made

    return add


@contextmanager
def _sampled_from(wrapper: Any, slots: torch.Tensor) -> Iterator[None]:
    """Let a wrapper find these slots for the rows that logits are asked of."""
    table, count = wrapper._sampler_indices, wrapper.indices_len[1]
    wrapper._sampler_indices, wrapper.indices_len[1] = slots, len(slots)
    try:
        yield
    finally:
        wrapper._sampler_indices, wrapper.indices_len[1] = table, count
