"""What guards a model with adapters in its weights: its state, its lock, and what it refuses.

Adapters stand aside while the model is cast or moved, and no other thread changes the weights
during a forward; saving and loading weights that are patched is refused, or warned of.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from dare_adapters.errors import PatchedModelError, PatchedStateWarning
from dare_adapters.live_adapters import LiveAdapters
from dare_adapters.lock import WeightsLock

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "existing_state",
    "locked_call",
    "refusing",
    "state_of",
    "suspending",
    "without_dare_adapters",
]

_STATE = "_dare_live_adapters"
# The state of the model around it, in a model that is a part of another.
_OUTER = "_dare_outer_adapters"
# Of models without adapters: a forward that is under way when the first one comes holds it off.
# Not in the model itself, which would then need this library to be unpickled.
_locks: WeakKeyDictionary[nn.Module, WeightsLock] = WeakKeyDictionary()
_making = threading.Lock()


def state_of(model: PreTrainedModel) -> LiveAdapters:
    """The model's own state, made when it is first needed."""
    with _making:
        state: LiveAdapters | None = model.__dict__.get(_STATE)
        if state is None:
            from transformers import PreTrainedModel

            state = LiveAdapters(lock=_locks.setdefault(model, WeightsLock()))
            for part in model.modules():
                if isinstance(part, PreTrainedModel) and part is not model:
                    object.__setattr__(part, _OUTER, state)
            object.__setattr__(model, _STATE, state)
            model.register_state_dict_pre_hook(_warn_of_patched_state)
            model.register_load_state_dict_pre_hook(_refuse_loading)
        return state


def existing_state(model: nn.Module) -> LiveAdapters | None:
    """The same if there is one."""
    found: LiveAdapters | None = model.__dict__.get(_STATE)
    return found


def lock_of(model: nn.Module) -> WeightsLock:
    """What a forward of this model holds."""
    state: LiveAdapters | None = model.__dict__.get(_STATE) or model.__dict__.get(_OUTER)
    if state is not None:
        return state.lock
    lock = _locks.get(model)
    if lock is None:
        with _making:
            lock = _locks.setdefault(model, WeightsLock())
    return lock


def _active(model: nn.Module) -> LiveAdapters | None:
    state: LiveAdapters | None = model.__dict__.get(_STATE)
    return state if state is not None and state.active else None


@contextmanager
def without_dare_adapters(model: nn.Module) -> Iterator[None]:
    """The model's own weights inside the block, with all that is active back after it."""
    state = _active(model)
    with nullcontext() if state is None else state.suspended(model):
        yield


def _warn_of_patched_state(model: nn.Module, *_: Any) -> None:
    if (state := _active(model)) is not None:
        warnings.warn(
            f"this state dict holds the weights of the base with {', '.join(state.active)} in "
            "them; call disable_dare_adapters() first for the base's own",
            PatchedStateWarning,
            stacklevel=3,
        )


def _refuse_loading(model: nn.Module, *_: Any) -> None:
    if (state := _active(model)) is not None:
        raise PatchedModelError(
            f"load_state_dict while {', '.join(state.active)} is active would be undone in part "
            "when it is disabled; call disable_dare_adapters() first"
        )


def locked_call(plain: Callable[..., Any]) -> Callable[..., Any]:
    """A forward or generate during which no other thread changes the weights."""

    @functools.wraps(plain)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Tracing compiles the lock away; a compiled forward is not guarded.
        if torch.compiler.is_compiling():
            return plain(self, *args, **kwargs)
        with lock_of(self).reading():
            return plain(self, *args, **kwargs)

    return call


def suspending(plain: Callable[..., Any]) -> Callable[..., Any]:
    """`_apply`, behind .to(), .half(), .cuda(): the base is cast or moved, then patched again."""

    @functools.wraps(plain)
    def _apply(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if (state := _active(self)) is None:
            return plain(self, *args, **kwargs)
        with state.suspended(self):
            return plain(self, *args, **kwargs)

    return _apply


def refusing(plain: Callable[..., Any]) -> Callable[..., Any]:
    """`save_pretrained`, which must not write patched weights as though they were the base."""

    @functools.wraps(plain)
    def save_pretrained(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        for key, whose in ((_STATE, ""), (_OUTER, " in the model around this one")):
            state = self.__dict__.get(key)
            if state is not None and state.active:
                raise PatchedModelError(
                    f"save_pretrained while {', '.join(state.active)} is active{whose} would write "
                    "patched weights as the model's own. To save the base: disable_dare_adapters() "
                    "first; to save the fine-tune: merge_dare_adapters() first, or "
                    "dare_adapters.export; to save the adapter: save_dare_adapter()"
                )
        done = plain(self, *args, **kwargs)
        if getattr(self, "_hf_peft_config_loaded", False) and (args or "save_directory" in kwargs):
            from dare_adapters.tuner.saving import save_again

            save_again(self, args[0] if args else kwargs["save_directory"])
        return done

    return save_pretrained
