"""`load_dare_adapter` and friends on every transformers model, installed by the import."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dare_adapters.adapter import Adapter
from dare_adapters.combine.registry import get_method
from dare_adapters.model_guards import (
    existing_state,
    locked_call,
    refusing,
    state_of,
    suspending,
)
from dare_adapters.open_source import opening_source
from dare_adapters.source import DeltaSource
from dare_adapters.store import save_source

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["install"]

Source = str | Path | DeltaSource


def load_dare_adapter(
    self: PreTrainedModel,
    source: Source | Sequence[Source],
    adapter_name: str | None = None,
    *,
    weight: float | Sequence[float] = 1.0,
    combination_type: str = "linear",
    revision: str | None = None,
    token: str | bool | None = None,
    check_base: bool = True,
    strict: bool = True,
    verify: bool = True,
    activate: bool = True,
    **options: Any,
) -> str:
    """Put a DARE adapter on this model, in place.

    With `activate` it becomes the one active adapter. The model's class, size and speed stay as
    they are; `disable_dare_adapters` brings every bit of the base back.

    Args:
        source: an adapter directory, a hub id, an opened `Adapter`; a LoRA adapter's directory,
            of which the delta B·A is taken; a mix; or a list of them, which are combined under
            one name.
        adapter_name: what to call it; by default the last part of `source`.
        weight: factor of the delta; for a list, one for each.
        combination_type: how a list is combined; see `add_weighted_adapter`.
        revision, token: for hub ids.
        check_base: compare sampled weights with those of the adapter's base.
        strict: refuse an adapter that changes parameters which this model does not have.
        verify: check the adapter's SHA-256 and look for damaged numbers.
        activate: make it the active adapter; otherwise only load it.
        **options: for a list: `density`, `majority_sign_method`, `seed` and all others that
            `add_weighted_adapter` takes.

    Returns:
        The adapter's name.

    Raises:
        AdapterNotFoundError: there is nothing at `source`.
        AdapterFormatError: it is damaged.
        AdapterExistsError: the name is taken.
        ArchitectureMismatchError: it was made for another architecture.
        BaseMismatchError: this model does not hold the adapter's base.
        CombinationError: a list cannot be combined as asked.
        UnsupportedParameterError: a parameter cannot be changed where it is.
    """
    sources = [source] if isinstance(source, (str, Path, DeltaSource)) else list(source)
    _check_some(sources)
    weights = _weights(weight, len(sources))
    _check_combination(combination_type, options, len(sources))
    if adapter_name is None:
        adapter_name = "+".join(_default_name(item) for item in sources)
    _check_name(adapter_name)
    state, loaded = state_of(self), False
    try:
        with ExitStack() as reading:
            opened = [
                item
                if isinstance(item, DeltaSource)
                else reading.enter_context(opening_source(item, revision, token, verify))
                for item in sources
            ]
            components = _components(
                self,
                opened,
                weights,
                combination_type,
                options,
                strict=strict,
                check_base=check_base,
            )
            state.load(self, adapter_name, components, check_base=check_base, strict=strict)
            loaded = True
        if activate:
            state.activate(self, {adapter_name: 1.0})
    except BaseException:
        if loaded:
            state.delete(self, adapter_name)
        raise
    return adapter_name


def set_dare_adapter(
    self: PreTrainedModel,
    adapters: str | Sequence[str] | Mapping[str, float],
    *,
    weights: Sequence[float] | None = None,
) -> None:
    """Make loaded adapters the active ones: one, several, or names with weights.

    The deltas of several are summed in float32 and rounded once.

    Raises:
        AdapterNotFoundError: a name is not loaded.
        PatchedModelError: called from inside a forward pass.
    """
    if isinstance(adapters, str):
        adapters = [adapters]
    if isinstance(adapters, Mapping):
        if weights is not None:
            raise ValueError("weights are given twice: in the mapping and as weights=")
        chosen = dict(zip(adapters, _weights(list(adapters.values()), len(adapters)), strict=True))
    else:
        names = list(adapters)
        chosen = dict(
            zip(names, _weights(1.0 if weights is None else weights, len(names)), strict=True)
        )
        if len(chosen) < len(names):
            raise ValueError(f"an adapter is named twice in {names}; give it one weight")
    state_of(self).activate(self, chosen)


def disable_dare_adapters(self: PreTrainedModel) -> None:
    """Bring every bit of the base back; the adapters stay loaded."""
    state_of(self).activate(self, {})


def delete_dare_adapter(self: PreTrainedModel, adapter_name: str) -> None:
    """Unload an adapter; the other active ones stay active.

    Raises:
        AdapterNotFoundError: it is not loaded.
    """
    state_of(self).delete(self, adapter_name)


def add_weighted_adapter(
    self: PreTrainedModel,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "linear",
    **options: Any,
) -> None:
    """Make a new adapter of loaded ones; it is computed when it is activated.

    Args:
        adapters: names of loaded adapters.
        weights: one for each.
        adapter_name: of the new one; it is not activated.
        combination_type: "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune" with
            PEFT's meaning, and all others that `dare_adapters.combine.method_names()` lists.
        **options: of that method: `density`, `majority_sign_method`, … (see its docstring and
            the README's table); and of all methods:
            seed (0) and mask ("auto", "blocked", "bernoulli") of what is dropped at random;
            prune ("dare", "drop_only", "magnitude") with drop_rate, done to every delta first;
            statistics, a mapping for each adapter, for "fisher" and "regmean".

    Raises:
        AdapterNotFoundError: a name is not loaded.
        AdapterExistsError: `adapter_name` is taken.
        CombinationError: an unknown method or option, or a value out of range.
    """
    _check_name(adapter_name)
    _check_some(adapters)
    factors = _weights(weights, len(adapters))
    _check_combination(combination_type, options, len(adapters))
    state = state_of(self)
    if combination_type == "linear" and not options:  # sums of sums need no detour
        components = [
            (source, own * factor)
            for name, factor in zip(adapters, factors, strict=True)
            for source, own in state.get(name).components
        ]
    else:
        sources = [state.source(self, name) for name in adapters]
        components = _components(
            self, sources, factors, combination_type, options, strict=False, check_base=True
        )
    state.load(self, adapter_name, components, check_base=False, strict=False)


def save_dare_adapter(
    self: PreTrainedModel,
    save_directory: str | Path,
    adapter_name: str | None = None,
    *,
    overwrite: bool = False,
    push_to_hub: bool = False,
    repo_id: str | None = None,
    **hub: Any,
) -> None:
    """Write a loaded adapter to a directory: tensors, config, model card, companions.

    One that was combined of others is computed and stored with the bits of the finest of them.

    Args:
        save_directory: to create.
        adapter_name: which; may be left out where exactly one is loaded.
        overwrite: replace the directory if it exists.
        push_to_hub: upload it too, to `repo_id` (default: the directory's name).
        **hub: `private`, `token`, `revision`, `commit_message`.

    Raises:
        AdapterNotFoundError: it is not loaded.
    """
    state = state_of(self)
    if adapter_name is None:
        if len(state.loaded) != 1:
            raise ValueError(
                f"adapter_name is needed: {len(state.loaded)} adapters are loaded "
                f"({', '.join(state.loaded) or 'none'})"
            )
        adapter_name = next(iter(state.loaded))
    source = state.source(self, adapter_name)
    if isinstance(source, Adapter):
        source.save(save_directory, overwrite=overwrite)
    else:
        with state.suspended(self):
            base = state.base_reader(self, adapter_name)
            save_source(source, save_directory, base=base, overwrite=overwrite)
    if push_to_hub:
        Adapter.open(save_directory).push_to_hub(repo_id or Path(save_directory).name, **hub)


def merge_dare_adapters(self: PreTrainedModel) -> list[str]:
    """Make the active adapters part of this model's weights for good, and unload all adapters.

    After this the model is an ordinary fine-tune: `save_pretrained` writes it.

    Returns:
        The names that were merged.
    """
    return state_of(self).keep()


@contextmanager
def dare_adapter(
    self: PreTrainedModel, adapters: str | Sequence[str] | Mapping[str, float]
) -> Iterator[PreTrainedModel]:
    """`with model.dare_adapter("a"):` these adapters inside the block, those before it after.

    Of those before it, one that was deleted or merged inside the block does not come back.
    """
    before = dict(state_of(self).active)
    set_dare_adapter(self, adapters)
    try:
        yield self
    finally:
        state = state_of(self)
        state.activate(self, {name: w for name, w in before.items() if name in state.loaded})


def _loaded_names(self: PreTrainedModel) -> list[str]:
    """Names of the loaded DARE adapters."""
    state = existing_state(self)
    return list(state.loaded) if state is not None else []


def _active_names(self: PreTrainedModel) -> list[str]:
    """Names of the active DARE adapters."""
    state = existing_state(self)
    return list(state.active) if state is not None else []


def _weights(weight: float | Sequence[float], count: int) -> list[float]:
    weights = [weight] * count if isinstance(weight, (int, float)) else list(weight)
    if len(weights) != count:
        raise ValueError(f"{len(weights)} weights for {count} adapters; one for each is needed")
    for value in weights:
        if isinstance(value, bool) or not abs(float(value)) < float("inf"):
            raise ValueError(f"a weight is {value!r}; it must be a finite number")
    return [float(value) for value in weights]


_OF_ALL_METHODS = ("seed", "mask", "prune", "drop_rate", "statistics")


def _check_combination(kind: str, options: dict[str, Any], count: int) -> None:
    """Refuse before anything is opened what cannot be combined.

    Raises:
        CombinationError: an unknown method or option.
    """
    own = {name: value for name, value in options.items() if name not in _OF_ALL_METHODS}
    get_method(kind).check(own, count)


def _components(
    model: PreTrainedModel,
    sources: Sequence[DeltaSource],
    weights: Sequence[float],
    combination_type: str,
    options: dict[str, Any],
    *,
    strict: bool,
    check_base: bool,
) -> list[tuple[DeltaSource, float]]:
    """Sources and weights as what is loaded under one name."""
    if combination_type == "linear" and not options:
        return list(zip(sources, weights, strict=True))
    how = {name: value for name, value in options.items() if name in _OF_ALL_METHODS}
    how["check_base"] = check_base
    how["options"] = {name: v for name, v in options.items() if name not in _OF_ALL_METHODS}
    combined = state_of(model).combine(model, sources, weights, combination_type, strict, **how)
    return [(combined, 1.0)]


def _check_some(adapters: Sequence[object]) -> None:
    if not adapters:
        raise ValueError("there is no adapter in an empty list")


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not name:
        raise ValueError(f"adapter_name is {name!r}; it must be a string with something in it")


def _default_name(source: Source) -> str:
    path = source.label if isinstance(source, DeltaSource) else source
    return re.split(r"[/\\]", str(path).rstrip("/\\"))[-1] or "default"


def install() -> None:
    """Add the methods to `transformers.PreTrainedModel`; doing it again does nothing."""
    from transformers import PreTrainedModel
    from transformers.generation import GenerationMixin

    if hasattr(PreTrainedModel, "load_dare_adapter"):
        return
    for method in (
        load_dare_adapter,
        set_dare_adapter,
        disable_dare_adapters,
        delete_dare_adapter,
        add_weighted_adapter,
        save_dare_adapter,
        merge_dare_adapters,
        dare_adapter,
    ):
        setattr(PreTrainedModel, method.__name__, method)
    PreTrainedModel.dare_adapters = property(_loaded_names)
    PreTrainedModel.active_dare_adapters = property(_active_names)
    PreTrainedModel.__call__ = locked_call(PreTrainedModel.__call__)
    PreTrainedModel._apply = suspending(PreTrainedModel._apply)
    PreTrainedModel.save_pretrained = refusing(PreTrainedModel.save_pretrained)
    GenerationMixin.generate = locked_call(GenerationMixin.generate)
