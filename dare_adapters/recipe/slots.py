"""The tensors that an output has, and which tensor of which model each is made of."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dare_adapters.errors import RecipeError
from dare_adapters.recipe.document import RecipeWarning
from dare_adapters.recipe.groups import Group
from dare_adapters.recipe.reference import ModelReference
from dare_adapters.recipe.structure import Stack, View, is_first, layer_count_key

__all__ = ["Slot", "head_stand_in", "layer_config", "list_slots"]

Views = Mapping[ModelReference, View]


@dataclass(frozen=True)
class Slot:
    """One tensor of the output.

    Attributes:
        name: of the output.
        group: the models it is made of.
        names: its name in each, before their own way of writing it.
        t: how deep it is: 0 at the first layer, 1 at the last; 0 outside the layers.
        in_layer: whether it is in one.
    """

    name: str
    group: Group
    names: Mapping[ModelReference, str]
    t: float
    in_layer: bool


def list_slots(groups: Sequence[Group], views: Views, donor: ModelReference) -> list[Slot]:
    """Every tensor that the output may have: embeddings, layer by layer, heads.

    Raises:
        RecipeError: a slice has layers that its model has not, or models differ in depth.
    """
    sliced = groups[0].length is not None
    outer = _outer_names(views, donor)
    # What is before the layers is of the first slice's models, what is behind them of the last's
    # (of all of them: mergekit takes as many as the first slice has).
    first = [_outside(name, groups[0]) for name in outer if is_first(name)]
    last = [_outside(name, groups[-1]) for name in outer if not is_first(name)]
    between = (
        _slice_slots(groups, views, donor) if sliced else _whole_slots(groups[0], views, donor)
    )
    return [*first, *between, *last]


def head_stand_in(name: str, view: View, holder: View) -> str | None:
    """The embedding, where it is also the output head that a model therefore does not store.

    Args:
        name: of a tensor that the model lacks.
        view: the model.
        holder: one that has it.
    """
    head = holder.info[name]
    if len(head.shape) != 2 or is_first(name) or not holder.is_vocabulary(name):
        return None
    # Configs written before transformers 5 do not say it where it is the class's default.
    tied = view.tied if view.tied is not None else view.architectures == holder.architectures
    embedding = view.embedding
    if not tied or embedding is None or view.info[embedding].shape[1:] != head.shape[1:]:
        return None
    return embedding


def layer_config(groups: Sequence[Group], views: Views, donor: ModelReference) -> dict[str, Any]:
    """What slices change in the donor's config: the number of layers, and lists with one item each.

    Returns:
        Key, with dots where it is in a part, -> new value.
    """
    stack = views[donor].stacks[0]
    total = sum(group.length or 0 for group in groups)
    changes: dict[str, Any] = {}
    key = layer_count_key(views[donor].config, stack.count)
    if total != stack.count:
        if key is None:
            warnings.warn(
                f"the config of {donor} does not say that it has {stack.count} layers; the output "
                f"has {total}, say so in its config.json",
                RecipeWarning,
                stacklevel=3,
            )
        else:
            changes[key] = total
    prefix = "text_config." if key and key.startswith("text_config.") else ""
    for name, value in _part(views[donor].config, prefix).items():
        if not (isinstance(value, list) and len(value) == stack.count and "layer" in name):
            continue
        items: list[Any] = []
        for group in groups:
            source = group.sources[0]
            own = _part(views[source.model].config, prefix).get(name)
            listed = own if isinstance(own, list) else value
            items += listed[source.start : source.start + (group.length or 0)]
        if len(items) == total and items != value:
            changes[prefix + name] = items
    return changes


def _outside(name: str, group: Group) -> Slot:
    return Slot(name, group, {source.model: name for source in group.sources}, 0.0, False)


def _outer_names(views: Views, donor: ModelReference) -> list[str]:
    """The donor's, and a head that it ties to its embedding but another model does not."""
    own = views[donor]
    names = [name for name in own.info if own.layer(name) is None]
    for view in views.values():
        names += [
            name
            for name in view.info
            if name not in own.info
            and view.layer(name) is None
            and head_stand_in(name, own, view) is not None
        ]
    return list(dict.fromkeys(names))


def _whole_slots(group: Group, views: Views, donor: ModelReference) -> Iterator[Slot]:
    stacks = {stack.prefix: stack for stack in views[donor].stacks}
    for source in group.sources:
        for stack in views[source.model].stacks:
            expected = stacks.get(stack.prefix)
            if expected is not None and expected.count != stack.count:
                raise RecipeError(
                    f"{source.model} has {stack.count} layers {stack.prefix}N and {donor} has "
                    f"{expected.count}; models of other depth are merged slice by slice"
                )
    found: dict[str, tuple[Stack, int]] = {}
    for view in (views[donor], *(views[source.model] for source in group.sources)):
        for name in view.info:
            if (layer := view.layer(name)) is not None:
                found.setdefault(name, layer[:2])
    order = list(stacks)
    ranked = sorted(
        found.items(),
        key=lambda item: (
            order.index(item[1][0].prefix) if item[1][0].prefix in stacks else len(order),
            item[1][1],
        ),
    )
    for name, (stack, number) in ranked:
        names = {source.model: name for source in group.sources}
        yield Slot(name, group, names, _depth(number, stack.count), True)


def _slice_slots(groups: Sequence[Group], views: Views, donor: ModelReference) -> Iterator[Slot]:
    main = _only_stack(views[donor], donor)
    by_layer = {model: _by_layer(view) for model, view in views.items()}
    position = 0
    for group in groups:
        length = group.length or 0
        prefixes = {}
        for source in group.sources:
            stack = _only_stack(views[source.model], source.model)
            prefixes[source.model] = stack.prefix
            if source.start + length > stack.count:
                raise RecipeError(
                    f"{group.label}: the layers [{source.start}, {source.start + length}) of "
                    f"{source.model}, which has {stack.count}"
                )
        for offset in range(length):
            rests: dict[str, None] = {}
            for source in group.sources:
                rests.update(dict.fromkeys(by_layer[source.model][source.start + offset]))
            for rest in rests:
                names = {
                    source.model: f"{prefixes[source.model]}{source.start + offset}.{rest}"
                    for source in group.sources
                }
                name = f"{main.prefix}{position}.{rest}"
                yield Slot(name, group, names, _depth(offset, length), True)
            position += 1


def _only_stack(view: View, model: ModelReference) -> Stack:
    stacks = [stack for stack in view.stacks if stack.count > 1] or list(view.stacks)
    if len(stacks) != 1:
        listed = ", ".join(f"{stack.prefix}N" for stack in stacks) or "none"
        raise RecipeError(
            f"slices are for models with one stack of layers; those of {model} are: {listed}. "
            "Merge it whole, with `models:`"
        )
    return stacks[0]


def _by_layer(view: View) -> dict[int, list[str]]:
    found: dict[int, list[str]] = defaultdict(list)
    for name in view.info:
        layer = view.layer(name)
        if layer is not None and layer[0] == view.stacks[0]:
            found[layer[1]].append(layer[2])
    return found


def _depth(number: int, count: int) -> float:
    return number / (count - 1) if count > 1 else 1.0


def _part(config: Mapping[str, Any], prefix: str) -> Mapping[str, Any]:
    part = config.get(prefix.rstrip("."), {}) if prefix else config
    return part if isinstance(part, Mapping) else {}
