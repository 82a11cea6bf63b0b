"""A model as statistics need it, and as it was before when they are done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["evaluating", "gradients_of"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout inside the block, each module's own mode after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def gradients_of(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    use: Callable[[nn.Parameter, torch.Tensor], None],
) -> Iterator[None]:
    """Each gradient of these parameters goes to `use` as soon as it is whole, and is freed.

    So a backward pass never holds more than the gradients of a few layers. The gradients and
    requires_grad that the model had come back after the block.
    """
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    wanted = {id(parameter) for parameter in parameters}

    def take(parameter: torch.Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert isinstance(parameter, nn.Parameter)
        assert gradient is not None
        use(parameter, gradient.detach())

    handles = []
    try:
        for parameter, _, _ in before:
            parameter.grad = None
            parameter.requires_grad_(id(parameter) in wanted)
        for parameter in parameters:
            handles.append(parameter.register_post_accumulate_grad_hook(take))  # type: ignore[no-untyped-call]
        # A caller may be in inference mode, where nothing has a gradient.
        with torch.inference_mode(False), torch.enable_grad(), evaluating(model):
            yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient
