"""A recipe and what is known of its models to the list of tensors to make."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, NamedTuple

import torch

from dare_adapters.checkpoint import Checkpoint, ParameterInfo
from dare_adapters.errors import RecipeError
from dare_adapters.recipe.document import RecipeWarning
from dare_adapters.recipe.grammar import Recipe
from dare_adapters.recipe.groups import Source, merge_groups
from dare_adapters.recipe.methods import MergeMethod, get_merge_method
from dare_adapters.recipe.reference import ModelReference
from dare_adapters.recipe.slots import Slot, Views, head_stand_in, layer_config, list_slots
from dare_adapters.recipe.structure import Inventory, View

__all__ = ["IDENTICAL", "PASSTHROUGH", "MergePlan", "OutputTensor", "TensorOf", "plan_merge"]

PASSTHROUGH = "passthrough"
IDENTICAL = "identical"
LISTED = 12


class TensorOf(NamedTuple):
    """A tensor of a model.

    Attributes:
        model: its number in `MergePlan.models`.
        name: in its checkpoint.
    """

    model: int
    name: str


@dataclass(frozen=True)
class OutputTensor:
    """How one tensor of the output is made.

    Attributes:
        name: of the output.
        inputs: what is merged, without the base.
        base: what the inputs' deltas are from; None: the method takes whole parameters.
        method: our combination type; PASSTHROUGH: `passthrough_of` is copied, times
            `options["scale"]` if there is one; IDENTICAL: it is copied, if all inputs are equal
            to it bit for bit (tables of integers).
        options: of the method.
        weights: one for each input.
        passthrough_of: what is copied.
        vocabulary: has a row, or an entry, for each token; inputs may differ in their number.
        dtype: what inputs and base are cast to first; None: nothing.
        out_dtype: what the result is stored in.
    """

    name: str
    inputs: tuple[TensorOf, ...]
    base: TensorOf | None
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: tuple[float, ...] = ()
    passthrough_of: TensorOf | None = None
    vocabulary: bool = False
    dtype: torch.dtype | None = None
    out_dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class MergePlan:
    """Everything that is to be computed.

    Attributes:
        models: the recipe's, by number.
        donor: the one whose config, tokenizer and names the output has.
        tensors: in the model's order: embeddings, layer by layer, heads.
        config_changes: key of config.json, with dots inside of parts, -> new value.
    """

    models: tuple[ModelReference, ...]
    donor: int
    tensors: tuple[OutputTensor, ...]
    config_changes: Mapping[str, Any]


def plan_merge(
    recipe: Recipe, models: Mapping[ModelReference, Inventory | Checkpoint]
) -> MergePlan:
    """Plan a merge; no tensor is read.

    Args:
        recipe: checked by `check_recipe`.
        models: all of `recipe.inputs`, opened; a DARE adapter as its base with it attached.

    Raises:
        RecipeError: models do not fit together, a layer is not there, or a filter leaves a
            required parameter without a value.
    """
    method = get_merge_method(recipe.merge_method)
    groups = merge_groups(recipe, method)
    references = recipe.inputs
    unopened = [str(reference) for reference in references if reference not in models]
    if unopened:
        raise RecipeError(
            f"a plan needs every model of the recipe; {', '.join(unopened)} is not given"
        )
    donor = View(models[recipe.donor])
    views = {
        reference: donor if reference == recipe.donor else View(models[reference], donor)
        for reference in references
    }
    planner = _Planner(recipe, method, views, references)
    slots = list_slots(groups, views, recipe.donor)
    tensors = [tensor for slot in slots if (tensor := planner.tensor(slot)) is not None]
    planner.finish(slots)
    changes = layer_config(groups, views, recipe.donor) if recipe.slices else {}
    changes.update(_config_changes(recipe, donor, tensors))
    return MergePlan(references, references.index(recipe.donor), tuple(tensors), changes)


def _config_changes(recipe: Recipe, donor: View, tensors: Iterable[OutputTensor]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    if any(tensor.vocabulary and tensor.name not in donor.info for tensor in tensors):
        # A head of its own, which transformers would overwrite with the embedding.
        inner = donor.config.get("text_config")
        in_part = isinstance(inner, Mapping) and "tie_word_embeddings" in inner
        changes["tie_word_embeddings"] = False
        if in_part:
            changes["text_config.tie_word_embeddings"] = False
    stored = recipe.out_dtype or recipe.dtype
    if stored is not None:
        old = "torch_dtype" in donor.config and "dtype" not in donor.config
        changes["torch_dtype" if old else "dtype"] = str(stored).removeprefix("torch.")
    return changes


class _Found(NamedTuple):
    """A source's tensor for a slot: its own name, what it is, and the name that filters see."""

    source: Source
    own_name: str
    info: ParameterInfo
    name: str


class _Planner:
    """Makes output tensors of slots, and collects what there is to say about all of them."""

    def __init__(
        self,
        recipe: Recipe,
        method: MergeMethod,
        views: Views,
        references: tuple[ModelReference, ...],
    ) -> None:
        self.recipe, self.method, self.views = recipe, method, views
        self.numbers = {reference: number for number, reference in enumerate(references)}
        self.lacking: dict[ModelReference, list[str]] = defaultdict(list)
        self.misshapen: list[str] = []
        self.remarks: dict[str, list[str]] = defaultdict(list)

    def tensor(self, slot: Slot) -> OutputTensor | None:
        """How it is made; None where it is left out, or cannot be made (see `finish`)."""
        found = self._find(slot)
        if not found:
            return None
        if not all(one.info.dtype.is_floating_point for one in found):
            return self._table(slot, found)
        if not self._is_complete(slot, found):
            return None
        vocabulary = not slot.in_layer and all(self._is_vocabulary(one) for one in found)
        shapes = {one.info.shape for one in found}
        if len({shape[1:] if vocabulary else shape for shape in shapes}) == 1:
            return self._merged(slot, found, vocabulary)
        listed = ", ".join(f"{one.source.model} {list(one.info.shape)}" for one in found)
        if slot.in_layer or vocabulary:
            self.misshapen.append(f"{slot.name} ({listed})")
            return None
        self.remarks["not merged, since the shapes differ, but the first model's"].append(
            f"{slot.name} ({listed})"
        )
        return self._copy(slot, found[0])

    def finish(self, slots: Iterable[Slot]) -> None:
        """Refuse what did not fit, and warn of what was left out.

        Raises:
            RecipeError: layers of the models are not alike.
        """
        if self.lacking:
            model, names = next(iter(self.lacking.items()))
            raise RecipeError(
                f"{model} lacks what the models it is merged with have: {_listed(names)}; they are "
                "of different architectures, or a shard is missing"
            )
        if self.misshapen:
            raise RecipeError(
                f"the shapes differ of {_listed(self.misshapen)}; only models of one size can be "
                "merged"
            )
        self._remark_on_others(slots)
        self._remark_on_filters(slots)
        for remark, names in self.remarks.items():
            number = "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"
            warnings.warn(f"{number} {remark}: {_listed(names)}", RecipeWarning, stacklevel=3)

    def _find(self, slot: Slot) -> list[_Found]:
        """The sources' tensors, the base's first; empty where no source stores one."""
        donor = self.views[self.recipe.donor]
        sources = slot.group.sources
        holders = [self.views[one.model] for one in sources]
        holder = next((view for view in (*holders, donor) if slot.name in view.info), None)
        found = []
        for source in sources:
            view, name = self.views[source.model], slot.names[source.model]
            stored: str | None = name if name in view.info else None
            if stored is None and not slot.in_layer and holder is not None:
                stored = head_stand_in(name, view, holder)
            if stored is not None:
                found.append(_Found(source, view.own_name[stored], view.info[stored], name))
        if not found and slot.name in donor.info:
            self.remarks["left out, which no model of the slice has"].append(slot.name)
        return found

    def _is_complete(self, slot: Slot, found: list[_Found]) -> bool:
        """Whether enough models have it: all of them, in a layer, and the base."""
        having = {one.source.model for one in found}
        lacking = [one.model for one in slot.group.sources if one.model not in having]
        if slot.in_layer:
            for model in lacking:
                self.lacking[model].append(slot.names[model])
            return not lacking
        if slot.group.base is not None and slot.group.base.model in lacking:
            self.remarks["left out, which the base_model lacks"].append(slot.name)
            return False
        if lacking:
            self.remarks["merged without the models that lack it"].append(slot.name)
        return True

    def _is_vocabulary(self, found: _Found) -> bool:
        view = self.views[found.source.model]
        return found.name not in view.info or view.is_vocabulary(found.name)

    def _merged(self, slot: Slot, found: list[_Found], vocabulary: bool) -> OutputTensor | None:
        method = self.method
        base = found[0] if found[0].source is slot.group.base else None
        inputs = found if base is None else found[1:]
        if len(found) == 1 and (base is not None or method.copies_singles):
            return self._copy(slot, found[0], vocabulary)
        if len(inputs) < method.least:
            # mergekit refuses, or (model_stock) leaves them out, and the model is incomplete.
            self.remarks[f"the base's, since too few models have it for {method.name}"].append(
                slot.name
            )
            return self._copy(slot, found[0], vocabulary)
        pairs = [(one.source, one.name) for one in inputs]
        values = slot.group.values(method, pairs, slot.name, slot.t)
        try:
            options = method.options(values, base is not None)
        except RecipeError as error:
            raise RecipeError(f"{slot.name}: {error}") from error
        if method.combination_type == PASSTHROUGH:
            return self._copy(slot, inputs[0], vocabulary, options)
        weights = values.get("weight", [1.0] * len(inputs))
        if method.base_is_first:
            inputs, base, weights = found, None, [1.0] * len(found)
        return OutputTensor(
            name=slot.name,
            inputs=tuple(map(self._tensor_of, inputs)),
            base=None if base is None else self._tensor_of(base),
            method=method.combination_type,
            options=options,
            weights=tuple(weights),
            vocabulary=vocabulary,
            dtype=self.recipe.dtype,
            out_dtype=self._out_dtype(found),
        )

    def _copy(
        self,
        slot: Slot,
        found: _Found,
        vocabulary: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> OutputTensor:
        return OutputTensor(
            name=slot.name,
            inputs=(self._tensor_of(found),),
            base=None,
            method=PASSTHROUGH,
            options=dict(options or {}),
            weights=(1.0,),
            passthrough_of=self._tensor_of(found),
            vocabulary=vocabulary,
            dtype=self.recipe.dtype,
            out_dtype=self._out_dtype([found]),
        )

    def _table(self, slot: Slot, found: list[_Found]) -> OutputTensor | None:
        """A tensor that is not of floats: it cannot be merged, and is never cast."""
        if len({(one.info.shape, one.info.dtype) for one in found}) > 1:
            listed = ", ".join(
                f"{one.source.model} {list(one.info.shape)} {one.info.dtype}" for one in found
            )
            self.misshapen.append(f"{slot.name} ({listed})")
            return None
        inputs = tuple(map(self._tensor_of, found))
        return OutputTensor(
            name=slot.name,
            inputs=inputs,
            base=None,
            method=IDENTICAL,
            weights=(1.0,) * len(inputs),
            passthrough_of=inputs[0],
            out_dtype=found[0].info.dtype,
        )

    def _tensor_of(self, found: _Found) -> TensorOf:
        return TensorOf(self.numbers[found.source.model], found.own_name)

    def _out_dtype(self, found: list[_Found]) -> torch.dtype:
        # Without a dtype in the recipe: what holds all that was stored. (mergekit's arcee_fusion
        # and ramplus_tl then make float32 of bfloat16, which is an accident of promotion.)
        stored = reduce(torch.promote_types, (one.info.dtype for one in found))
        return self.recipe.out_dtype or self.recipe.dtype or stored

    def _remark_on_others(self, slots: Iterable[Slot]) -> None:
        """Tensors outside the layers that the output has no place for: another model's heads."""
        names = {name for slot in slots for name in slot.names.values()}
        for reference, view in self.views.items():
            for name in view.info:
                outside = name not in names and view.layer(name) is None
                if outside and view.info[name].dtype.is_floating_point:
                    self.remarks[
                        f"left out, which {self.recipe.donor} lacks, whose config the output has"
                    ].append(f"{name} of {reference}")

    def _remark_on_filters(self, slots: Iterable[Slot]) -> None:
        recipe = self.recipe
        levels = [recipe.parameters, recipe.module_parameters]
        levels += [entry.parameters for entry in recipe.models]
        for part in recipe.slices:
            levels += [part.parameters, *(source.parameters for source in part.sources)]
        filters = {
            condition.filter: condition.place
            for settings in levels
            for setting in settings.values()
            for condition in setting
            if condition.filter not in (None, "*")
        }
        names = {name for slot in slots for name in (slot.name, *slot.names.values())}
        for wanted, place in filters.items():
            if not any(str(wanted) in name for name in names):
                warnings.warn(
                    f"{place}: the filter {wanted!r} is in no tensor's name, so that its value is "
                    "never used; a filter is a piece of a name, not a pattern",
                    RecipeWarning,
                    stacklevel=4,
                )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
