"""A model's own parameters and their names, whatever adapters are around its modules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from dare_adapters.tuner.exchange import tensor_of

__all__ = ["Owner", "base_model", "own_tensors"]


@dataclass(frozen=True)
class Owner:
    """A parameter or persistent buffer of the base.

    Attributes:
        module: what holds it, itself or in a `nn.ParameterList`.
        local: its name there.
        path: where that module is now, or the outermost adapter layer around it.
        module_name: where the module would be without adapters.
    """

    module: nn.Module
    local: str
    path: str
    module_name: str

    @property
    def tensor(self) -> torch.Tensor:
        """The tensor, as it is now."""
        return tensor_of(self.module, self.local)


# What PEFT and FSDP put around a whole model -> the name that the model has there.
_AROUND = ((PeftModel, "base_model"), (PeftMixedModel, "base_model"), (BaseTuner, "model"))


def base_model(model: nn.Module) -> nn.Module:
    """The model in all that PEFT and FSDP have put around it."""
    while (step := _step_inside(model)) is not None:
        model = model._modules[step]  # type: ignore[assignment]
    return model


def _step_inside(model: nn.Module) -> str | None:
    if "_fsdp_wrapped_module" in model._modules:
        return "_fsdp_wrapped_module"
    return next((step for kind, step in _AROUND if isinstance(model, kind)), None)


def own_tensors(model: nn.Module) -> dict[str, Owner]:
    """Name in the state dict of the model without adapters -> the tensor's owner."""
    return dict(_walk(model, "", ""))


def _walk(module: nn.Module, name: str, path: str) -> Iterator[tuple[str, Owner]]:
    inner, inner_path = module, path
    while True:
        if isinstance(inner, BaseTunerLayer):
            found = inner._modules.get("base_layer")
            step = "base_layer"
        elif isinstance(inner, AuxiliaryTrainingWrapper):
            step = "original_module" if "original_module" in inner._modules else "token_adapter"
            found = inner._modules.get(step)
            path = _join(path, step)  # what it wraps is used by name: layers go inside
        elif (around := _step_inside(inner)) is not None:
            step, found = around, inner._modules.get(around)
            path = _join(path, step)
        else:
            break
        if found is None:
            return  # adapter state beside the module that it belongs to
        inner, inner_path = found, _join(inner_path, step)
    hidden = inner._non_persistent_buffers_set
    for held, child in inner._modules.items():
        if isinstance(child, (nn.ParameterList, nn.ParameterDict)):  # which nobody calls
            for local, parameter in child._parameters.items():
                if parameter is not None:
                    own = f"{held}.{local}"
                    yield _join(name, own), Owner(inner, own, path, name)
    for local in (*inner._parameters, *(key for key in inner._buffers if key not in hidden)):
        if isinstance(getattr(inner, local), torch.Tensor):
            yield _join(name, local), Owner(inner, local, path, name)
    for local, child in inner._modules.items():
        if child is not None and not isinstance(child, (nn.ParameterList, nn.ParameterDict)):
            yield from _walk(child, _join(name, local), _join(inner_path, local))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
