"""Where a running model's weights lie: as in the checkpoint, or packed for a kernel."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dare_adapters.errors import BaseMismatchError, UnsupportedParameterError

__all__ = [
    "check_layout",
    "intercepted_copies",
    "pack_again",
    "reload_obstacle",
    "sparse_obstacle",
]

# What keeps plain weights under their own shape, where the platform does.
_PLAIN_METHODS = {
    "UnquantizedEmbeddingMethod",
    "UnquantizedFusedMoEMethod",
    "UnquantizedLinearMethod",
}
# Backends for experts that read weights as they were loaded.
_PLAIN_EXPERTS = {"BATCHED_TRITON", "TRITON"}
_ADVICE = "swap with route='reload'"


def sparse_obstacle(model: nn.Module, model_config: Any) -> str | None:
    """Why touched entries alone cannot be written in this model; None: nothing is known of."""
    if model_config.quantization is not None:
        return f"the model is quantised ({model_config.quantization})"
    if model_config.use_mla:
        return "its attention (MLA) keeps weights that are computed from others"
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if method is None:
            continue
        if type(method).__name__ not in _PLAIN_METHODS:
            return f"{name} stores its weights as {type(method).__name__} does"
        backend = getattr(method, "unquantized_backend", None)
        if backend is not None and backend.name not in _PLAIN_EXPERTS:
            return f"{name} packs its experts for the {backend.name} kernel"
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.numel() == 0 and weight.dim() == 1:
            return (
                f"{name} is packed for the CPU; load with model_loader_extra_config="
                '{"plain_weights": true} to keep weights plain'
            )
    return None


def reload_obstacle(model: nn.Module) -> str | None:
    """Why weights cannot be loaded again in this model; None: nothing is known of."""
    for name, module in _cpu_experts(model):
        config = module.quant_method.moe
        if module.w13_weight.shape[1] != 2 * config.intermediate_size_per_partition:
            return f"{name} pads its experts for the CPU kernel, which vLLM does on first load only"
    return None


def check_layout(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Compare a tensor of the checkpoint with what the model has, by way of its own loader.

    Nothing is changed: the loader's final copies are compared instead of made.

    Args:
        name: checkpoint name.
        tensor: what the model should have, whole.

    Raises:
        UnsupportedParameterError: the loader does not copy it entry by entry.
        BaseMismatchError: the model has other values.
    """
    compared: list[int] = []
    try:
        with intercepted_copies(model, lambda to, given: compared.append(_compare(to, given))) as (
            replaced
        ):
            loaded = model.load_weights([(name, tensor)])  # type: ignore[operator]
    except (AssertionError, IndexError, NotImplementedError, RuntimeError, ValueError) as error:
        raise UnsupportedParameterError(
            f"{name} is stored otherwise in the running model than in the checkpoint "
            f"({error}); {_ADVICE}"
        ) from error
    here = loaded is None or bool(set(loaded))
    if replaced() or (here and not compared):
        raise UnsupportedParameterError(
            f"{name} is loaded in a way of its own, not by copying; {_ADVICE}"
        )
    wrong = sum(compared)
    if wrong:
        raise BaseMismatchError(
            f"the running model differs from base and mixture in {wrong} entries of {name}: it is "
            f"stored otherwise than in the checkpoint, or was changed by other means; {_ADVICE}"
        )


def _put_back(before: list[tuple[nn.Module, dict[str, nn.Parameter | None]]]) -> bool:
    """Undo what a loader made anew instead of copying into it; whether there was any."""
    replaced = False
    for module, parameters in before:
        now = module._parameters
        if now.keys() != parameters.keys() or any(now[n] is not parameters[n] for n in now):
            replaced = True
            now.clear()
            now.update(parameters)
    return replaced


def pack_again(model: nn.Module, *, reloaded: bool) -> None:
    """Make again what the CPU packs of plain weights, where vLLM does that on first load only.

    Args:
        reloaded: whether all weights were loaded again, the experts' with them.
    """
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if type(method).__name__ == "UnquantizedEmbeddingMethod":
            method.process_weights_after_loading(module)  # a tied head has a copy of its own
    if reloaded:
        for _, module in _cpu_experts(model):
            module.quant_method.moe_kernel.fused_experts.process_weights_after_loading(module)


def _cpu_experts(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        backend = getattr(getattr(module, "quant_method", None), "unquantized_backend", None)
        if backend is not None and backend.name == "CPU" and "w13_weight" in module._parameters:
            yield name, module


@contextmanager
def intercepted_copies(
    model: nn.Module, copy: Callable[[torch.Tensor, torch.Tensor], object]
) -> Iterator[Callable[[], bool]]:
    """`Tensor.copy_` of this thread calls `copy(destination, source)` and copies nothing.

    Gives a function that says, after the block, whether parameters were made anew instead of
    written to; the model has its own back.
    """
    original, thread = torch.Tensor.copy_, threading.get_ident()
    before = [(module, dict(module._parameters)) for module in model.modules()]
    replaced = False

    def call(
        destination: torch.Tensor, source: torch.Tensor, non_blocking: bool = False
    ) -> torch.Tensor:
        if threading.get_ident() != thread:
            return original(destination, source, non_blocking)
        copy(destination, source)
        return destination

    torch.Tensor.copy_ = call  # type: ignore[method-assign,assignment]
    try:
        yield lambda: replaced
    finally:
        torch.Tensor.copy_ = original  # type: ignore[method-assign]
        replaced = _put_back(before)


def _compare(destination: torch.Tensor, source: torch.Tensor) -> int:
    """How many entries differ of what would be copied."""
    if destination.shape != source.shape or not source.is_floating_point():
        raise NotImplementedError(f"{list(source.shape)} are copied into {list(destination.shape)}")
    given = source.to(dtype=destination.dtype, device=destination.device)
    return int((given != destination).sum())
