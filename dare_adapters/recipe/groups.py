"""Which models are merged together, under which parameters: all of them, or slice by slice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dare_adapters.errors import RecipeError
from dare_adapters.recipe.grammar import Recipe
from dare_adapters.recipe.methods import MergeMethod
from dare_adapters.recipe.parameters import REQUIRED, Settings, resolve
from dare_adapters.recipe.reference import ModelReference

__all__ = ["Group", "Source", "merge_groups", "with_adapter_bases"]


@dataclass(frozen=True)
class Source:
    """A model that takes part.

    Attributes:
        model: which.
        parameters: its own.
        start: its first layer, of a slice.
    """

    model: ModelReference
    parameters: Settings
    start: int = 0


@dataclass(frozen=True)
class Group:
    """Models that are merged together.

    Attributes:
        label: what messages call it.
        inputs: in the recipe's order; the base is among them only where the method has none.
        base: or None.
        levels: settings for all inputs, from the highest precedence to the lowest.
        length: how many layers, of a slice; None: all there are.
    """

    label: str
    inputs: tuple[Source, ...]
    base: Source | None
    levels: tuple[Settings, ...]
    length: int | None = None

    @property
    def sources(self) -> tuple[Source, ...]:
        """The base, if there is one, and the inputs."""
        return self.inputs if self.base is None else (self.base, *self.inputs)

    def values(
        self, method: MergeMethod, inputs: Sequence[tuple[Source, str]], output: str, t: float
    ) -> dict[str, Any]:
        """Resolved parameters for one tensor: a list, one for each input, unless shared.

        Args:
            method: whose parameters.
            inputs: those that have the tensor, each with the name that filters see.
            output: the name that filters of shared parameters see.
            t: how deep it is, 0 … 1.

        Raises:
            RecipeError: a required one is missing.
        """
        values: dict[str, Any] = {}
        for parameter in method.parameters:
            if parameter.scope == "shared":
                values[parameter.name] = resolve(parameter, self.levels, output, t)
            else:
                values[parameter.name] = [
                    resolve(
                        parameter, (source.parameters, *self.levels), name, t, str(source.model)
                    )
                    for source, name in inputs
                ]
        return values


def merge_groups(recipe: Recipe, method: MergeMethod) -> tuple[Group, ...]:
    """The groups of a recipe: one for `models`, one for each slice.

    Raises:
        RecipeError: a base is missing, a model comes twice, or there are too few or too many.
    """
    groups = tuple(_from_models(recipe, method) if recipe.models else _from_slices(recipe, method))
    for group in groups:
        _check(group, method)
    return groups


def with_adapter_bases(recipe: Recipe, bases: Mapping[ModelReference, ModelReference]) -> Recipe:
    """The recipe with the base that its adapters name, where it needs one and has none.

    Args:
        recipe: any.
        bases: adapter -> what its config says it is over.

    Raises:
        RecipeError: they name different ones.
    """
    named = {bases[model]: model for model in reversed(recipe.inputs) if model in bases}
    if recipe.base_model is not None or not named:
        return recipe
    if len(named) > 1:
        listed = ", ".join(f"{model} over {base}" for base, model in named.items())
        raise RecipeError(
            f"the adapters of the recipe are over different bases ({listed}); say with base_model "
            "which one is meant"
        )
    return replace(recipe, base_model=next(iter(named)))


def _from_models(recipe: Recipe, method: MergeMethod) -> Iterator[Group]:
    sources = [Source(entry.model, entry.parameters) for entry in recipe.models]
    levels = (recipe.module_parameters, recipe.parameters)
    base = recipe.base_model
    if base is None or base in (source.model for source in sources):
        yield _group("models", sources, base, levels, method)
        return
    # To a method without a base, mergekit makes an unlisted base_model one more input, which
    # fails where it lacks a weight or is one too many. Where it would not fail it counts as an
    # input here too; where it would, it only says whose config and tokenizer the output has.
    if method.base != "ignored" or _takes(method, len(sources) + 1, levels):
        sources.append(Source(base, {}))
    yield _group("models", sources, base, levels, method)


def _takes(method: MergeMethod, count: int, levels: Sequence[Settings]) -> bool:
    """Whether an input without parameters of its own can be one of so many."""
    if method.most is not None and count > method.most:
        return False
    return all(
        own.default is not REQUIRED or any(own.name in settings for settings in levels)
        for own in method.parameters
    )


def _from_slices(recipe: Recipe, method: MergeMethod) -> Iterator[Group]:
    for number, part in enumerate(recipe.slices):
        sources = [
            Source(source.model, source.parameters, source.layer_range[0])
            for source in part.sources
        ]
        levels = (part.parameters, recipe.module_parameters, recipe.parameters)
        base = part.base_model or recipe.base_model
        start, end = part.sources[0].layer_range
        yield _group(f"slices[{number}]", sources, base, levels, method, end - start)


def _group(
    label: str,
    sources: Sequence[Source],
    base: ModelReference | None,
    levels: tuple[Settings, ...],
    method: MergeMethod,
    length: int | None = None,
) -> Group:
    models = [source.model for source in sources]
    twice = next((model for model in models if models.count(model) > 1), None)
    if twice is not None:
        raise RecipeError(
            f"{label}: the model {twice} comes twice; merge it once, or slice by slice"
        )
    if method.base == "ignored":
        return Group(label, tuple(sources), None, levels, length)
    if method.base == "optional" and base is None:
        return Group(label, tuple(sources), None, levels, length)
    if base is None:
        raise RecipeError(
            f"{label}: {method.name} works on deltas from a base; name it with base_model"
        )
    if base not in models:
        raise RecipeError(
            f"{label}: {method.name} needs as many layers of the base_model {base}; list it among "
            "the sources"
        )
    inputs = tuple(source for source in sources if source.model != base)
    return Group(label, inputs, sources[models.index(base)], levels, length)


def _check(group: Group, method: MergeMethod) -> None:
    count = len(group.inputs)
    if count < method.least or (method.most is not None and count > method.most):
        wanted = f"at least {method.least}" if method.most != method.least else f"{method.least}"
        besides = " besides the base_model" if group.base is not None else ""
        plural = "model" if wanted == "1" else "models"
        raise RecipeError(
            f"{group.label}: {method.name} merges {wanted} {plural}{besides}, here are {count}"
        )
