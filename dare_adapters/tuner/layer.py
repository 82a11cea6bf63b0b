"""The two kinds of tuner layers: around a module without children, or beside any other.

A module without children is wrapped, as PEFT does it. A module that has parameters of its own and
children too (a class token, the projections of `nn.MultiheadAttention`) keeps its place and its
children their names: a bystander in it exchanges the parameters while the module's forward runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import _get_in_out_features
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from dare_adapters.errors import UnsupportedParameterError
from dare_adapters.tuner.exchange import exchange, exchanged
from dare_adapters.tuner.lazy_weight import lazy_weight
from dare_adapters.tuner.side_path import better_adds, forward_adding, must_add
from dare_adapters.tuner.state import DareState

__all__ = ["BYSTANDER", "DareBystander", "DareLayer"]

# Weights of fewer entries are not worth the bookkeeping.
_LARGE = 1 << 16
# The name of a bystander in its module. PEFT skips names with the method's prefix in them.
BYSTANDER = "_dare"


class DareLayer(DareState):
    """A module without children, with adapters.

    Args:
        base_layer: the module, perhaps in layers of other methods.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = _features(self.owner)

    @property
    def owner(self) -> nn.Module:
        found: Any = self._modules["base_layer"]
        while isinstance(inner := found._modules.get("base_layer"), nn.Module):
            found = inner
        assert isinstance(found, nn.Module)
        return found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward under the active adapters.

        What adapters compute is left out of a graph that `torch.compile` makes: which of them act,
        and for which rows, is no part of it, and compiles nothing again.
        """
        if self.is_merged is not self._disable_adapters:
            return self.base_layer(*args, **kwargs)
        return self._forward_adapted(args, kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _forward_adapted(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._disable_adapters:
            self.unmerge()
            return self.base_layer(*args, **kwargs)
        if self.rows is not None:
            from dare_adapters.tuner.mixed_batch import mixed_forward

            return mixed_forward(self, args, kwargs)
        return self.forward_with(self.active, args, kwargs)

    def forward_with(
        self, adapters: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The module's forward with the weights that it has under these adapters."""
        if not self.changed_by(adapters):
            return self.base_layer(*args, **kwargs)
        if must_add(self) or better_adds(self, adapters, args):
            return forward_adding(self, adapters, args, kwargs)
        if self._better_recomputes(adapters):
            made: Any = checkpoint(
                self._forward_effective, adapters, args, kwargs,
                use_reentrant=False, preserve_rng_state=False,
            )  # fmt: skip
            return made
        return self._forward_effective(adapters, args, kwargs)

    def _forward_effective(
        self, adapters: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        values = self.effective(adapters)
        owner = self.owner
        if any(name in owner.__dict__ for name in values):  # FSDP
            with exchanged(owner, values):
                return self.base_layer(*args, **kwargs)
        return functional_call(self.base_layer, self._within(values), args, kwargs)

    def _better_recomputes(self, adapters: Sequence[str]) -> bool:
        """Whether backward makes the weight again, which autograd would keep for it until then.

        What is recomputed ends before the layer's own product, of which backward has no need.
        """
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        owner = self.owner
        if self._modules["base_layer"] is not owner or "weight" in owner.__dict__:
            return False  # other methods' dropout would be drawn again; FSDP's weights are gone
        weight = owner._parameters.get("weight")
        large = weight is not None and weight.numel() >= _LARGE
        return large and self.trains(adapters)

    def _within(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Names of the owner's parameters as the base layer has them."""
        prefix, found = "", self._modules["base_layer"]
        while found is not None and isinstance(
            inner := found._modules.get("base_layer"), nn.Module
        ):
            prefix, found = prefix + "base_layer.", inner
        return {prefix + name: value for name, value in values.items()}

    @property
    def weight(self) -> Any:
        """The module's weight as the active adapters have it: some models read it directly."""
        return self._seen("weight")

    @property
    def bias(self) -> Any:
        """Likewise."""
        return self._seen("bias")

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base_layer", "adapter_layer_names") or "base_layer" not in self._modules:
                raise
            return self._seen(name)

    def _seen(self, name: str) -> Any:
        if self.disable_adapters and self.merged_adapters and name in self.owner._parameters:
            self.unmerge()  # as a forward would, which does not come here
        found = getattr(self.owner, name)
        if not isinstance(found, torch.Tensor) or self.disable_adapters or self.merged_adapters:
            return found
        if name not in self.changed_by(self.rows or self.active):
            return found
        if self.rows is None and found.dim() and (rows := self.rows_now(name)) != len(found):
            found = found.detach()[:1].expand(rows, *found.shape[1:])  # of the shape that it has
        return lazy_weight(found, lambda: self._seen_value(name))

    def _seen_value(self, name: str) -> torch.Tensor:
        if self.rows is None:
            return self.effective_of(name, self.active)
        if len(set(self.rows)) > 1:
            raise UnsupportedParameterError(
                f"the model computes with the {name} of a {type(self.owner).__name__} without "
                "calling it, and it differs by row in this batch: pass rows of one adapter at a "
                "time"
            )
        return self.effective_of(name, self.rows[:1])

    def __repr__(self) -> str:
        return "dare." + super().__repr__()


class DareBystander(DareState):
    """In a module that has children: adapters of its own parameters, exchanged during its forward.

    Args:
        owner: the module; it is not held as a child.
        parent: what holds it. `nn.TransformerEncoderLayer` reads its attention's parameters without
            calling it, so they are exchanged during the forward of the whole layer.
    """

    def __init__(self, owner: nn.Module, parent: nn.Module | None) -> None:
        super().__init__()
        self._beside: dict[str, list[nn.Module]] = {"owner": [owner]}  # no children of this one
        reads = isinstance(parent, nn.TransformerEncoderLayer)
        around = parent if reads and parent is not None else owner
        self._beside["around"] = [around]
        self.in_features, self.out_features = None, None
        self._exchanged: list[dict[str, Any]] = []
        self._hooks = [
            around.register_forward_pre_hook(_enter),
            around.register_forward_hook(_leave, always_call=True),
        ]

    @property
    def owner(self) -> nn.Module:
        return self._beside["owner"][0]

    @property
    def around(self) -> nn.Module:
        """During whose forward the parameters are exchanged."""
        return self._beside["around"][0]

    def remove(self) -> None:
        """Leave the module as it was, but for what is merged."""
        for hook in self._hooks:
            hook.remove()
        self.owner._modules.pop(BYSTANDER, None)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> None:
        """As PEFT unloads layers of special kinds."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        self.remove()

    def enter(self) -> None:
        """Put the active adapters' values in place of the base's."""
        values: dict[str, torch.Tensor] = {}
        if self.disable_adapters:
            if self.merged_adapters:
                self.unmerge()
        elif not self.merged_adapters and self.rows is None:
            values = self.effective(self.active)
        self._exchanged.append(exchange(self.owner, values))

    def exchange_for(self, adapters: Sequence[str]) -> None:
        """Other adapters' values instead, inside :meth:`enter` and :meth:`leave`."""
        self.leave()
        self._exchanged.append(exchange(self.owner, self.effective(adapters)))

    def leave(self) -> None:
        """Put the base's own back."""
        if self._exchanged:
            exchange(self.owner, self._exchanged.pop())

    def __repr__(self) -> str:
        return "dare." + super().__repr__()


def _enter(module: nn.Module, args: Any) -> None:
    for bystander in _bystanders(module):
        bystander.enter()


def _leave(module: nn.Module, *_: Any) -> None:
    for bystander in _bystanders(module):
        bystander.leave()


def _bystanders(module: nn.Module) -> Iterator[DareBystander]:
    """Those whose values are exchanged during this module's forward."""
    for holder in (module, *module._modules.values()):
        found = None if holder is None else holder._modules.get(BYSTANDER)
        if isinstance(found, DareBystander) and found.around is module:
            yield found


def _features(module: nn.Module) -> tuple[int | None, int | None]:
    for names in (("in_features", "out_features"), ("num_embeddings", "embedding_dim")):
        if all(hasattr(module, name) for name in names):
            return getattr(module, names[0]), getattr(module, names[1])
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) or hasattr(module, "nf"):
        found: tuple[int, int] = _get_in_out_features(module)
        return found
    return None, None
