"""What can be said of a recipe before any model is opened."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from dare_adapters.combine.registry import get_method
from dare_adapters.errors import CombinationError, RecipeError
from dare_adapters.recipe.document import RecipeWarning, nearest
from dare_adapters.recipe.grammar import Recipe
from dare_adapters.recipe.groups import Group, merge_groups
from dare_adapters.recipe.methods import (
    PARAMETER_NAMES,
    MergeMethod,
    get_merge_method,
)
from dare_adapters.recipe.parameters import REQUIRED, Settings, check_setting
from dare_adapters.recipe.reference import ModelReference

__all__ = ["check_recipe"]

NOWHERE = "the output"  # in place of a tensor's name, where no filter asks for one


def check_recipe(recipe: Recipe) -> None:
    """Refuse what cannot be run, without looking at any model; warn of what has no effect.

    Raises:
        RecipeError: the method, a parameter, a value, or the number of models is not supported.
    """
    method = get_merge_method(recipe.merge_method)
    if method.combination_type != "passthrough":
        try:
            get_method(method.combination_type)
        except CombinationError as error:
            raise RecipeError(f"merge_method {method.name}: {error}") from error
    ignored = [text for level in _levels(recipe, method) for text in _check_level(level, method)]
    groups = merge_groups(recipe, method)
    for group in groups:
        _check_required(group, method)
        _try(group, method)
    _check_tokens(recipe)
    if ignored:
        listed = "; ".join(dict.fromkeys(ignored))
        warnings.warn(f"parameters without effect: {listed}", RecipeWarning, stacklevel=2)
    _warn_of_unlisted_base(recipe, method, groups)


class _Level:
    """Settings, and what they are of: everything, an input, or the base."""

    def __init__(self, settings: Settings, scope: str) -> None:
        self.settings, self.scope = settings, scope


def _levels(recipe: Recipe, method: MergeMethod) -> Iterator[_Level]:
    yield _Level(recipe.parameters, "shared")
    yield _Level(recipe.module_parameters, "shared")
    has_base = method.base != "ignored"
    for entry in recipe.models:
        is_base = has_base and entry.model == recipe.base_model
        yield _Level(entry.parameters, "base" if is_base else "input")
    for part in recipe.slices:
        yield _Level(part.parameters, "shared")
        for source in part.sources:
            is_base = has_base and source.model == (part.base_model or recipe.base_model)
            yield _Level(source.parameters, "base" if is_base else "input")


def _check_level(level: _Level, method: MergeMethod) -> Iterator[str]:
    """Refuse unknown names and wrong values; what has no effect, in words."""
    for name, setting in level.settings.items():
        place = setting[0].place if setting else ""
        if name not in PARAMETER_NAMES:
            own = [parameter.name for parameter in method.parameters]
            raise RecipeError(
                f"{place}: {method.name} has no parameter {name!r}{nearest(name, own)}; its "
                f"parameters are {', '.join(own) or 'none'}"
            )
        parameter = method.parameter(name)
        if parameter is None:
            yield f"{name} ({method.name} has none)"
            continue
        check_setting(parameter, setting)
        if not parameter.used:
            yield f"{name} ({method.name} makes no use of it)"
        elif parameter.scope == "shared" and level.scope != "shared":
            yield f"{name} of a single model ({place}; it is one for all: write it further out)"
        elif parameter.scope == "non_base" and level.scope == "base":
            yield f"{name} of the base_model ({place})"


def _check_required(group: Group, method: MergeMethod) -> None:
    for parameter in method.parameters:
        if parameter.default is not REQUIRED:
            continue
        if any(parameter.name in settings for settings in group.levels):
            continue
        if parameter.scope == "shared":
            raise RecipeError(
                f"{group.label}: {method.name} needs the parameter {parameter.name}, "
                f"{parameter.wanted}; write it under 'parameters'"
            )
        for source in group.inputs:
            if parameter.name not in source.parameters:
                raise RecipeError(
                    f"{group.label}: {method.name} needs the parameter {parameter.name}, "
                    f"{parameter.wanted}, for {source.model}; write it under its 'parameters'"
                )


def _try(group: Group, method: MergeMethod) -> None:
    """Where all values are plain, what they make together can be judged now."""
    names = {parameter.name for parameter in method.parameters}
    for settings in (*group.levels, *(source.parameters for source in group.inputs)):
        for name, setting in settings.items():
            plain = len(setting) == 1 and setting[0].filter is None and len(setting[0].values) == 1
            if name in names and not plain:
                return
    values = group.values(method, [(source, NOWHERE) for source in group.inputs], NOWHERE, 0.0)
    try:
        method.options(values, group.base is not None)
    except RecipeError as error:
        raise RecipeError(f"{group.label}: {error}") from error


def _check_tokens(recipe: Recipe) -> None:
    if recipe.tokenizer is None:
        return
    for token, rule in recipe.tokenizer.tokens.items():
        model = rule.source.model if rule.source else None
        if model is not None and model not in recipe.inputs:
            raise RecipeError(
                f"tokenizer.tokens: {token!r} is to come from {model}, which is not merged; its "
                f"source must be one of {', '.join(map(str, recipe.inputs))}"
            )


def _warn_of_unlisted_base(recipe: Recipe, method: MergeMethod, groups: tuple[Group, ...]) -> None:
    listed: set[ModelReference] = {entry.model for entry in recipe.models}
    base = recipe.base_model
    if not recipe.models or base is None or base in listed or method.base != "ignored":
        return
    merged = any(source.model == base for source in groups[0].inputs)
    told = (
        "is merged as one more input, as mergekit does; list it among models, or leave it out"
        if merged
        else "is not merged; the output has its config and tokenizer"
    )
    warnings.warn(
        f"{method.name} has no base: the base_model {base} {told}", RecipeWarning, stacklevel=3
    )
