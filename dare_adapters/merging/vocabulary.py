"""Vocabularies of a merge: whose row of which embedding each of the output's tokens has.

With `tokenizer` in the recipe rows are found by token, as mergekit does. Without it they are found
by number, which is refused where the models' tokenizers contradict it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial, reduce
from math import ceil
from pathlib import Path
from typing import Any

import torch

from dare_adapters.checkpoint import read_json
from dare_adapters.errors import CheckpointError, RecipeError
from dare_adapters.merging.chat_template import choose_chat_template, write_chat_template
from dare_adapters.merging.models import MergeModel
from dare_adapters.merging.rows import AlignedTensor, RowPlanner
from dare_adapters.merging.tokenizer import (
    ModelTokenizer,
    OutputTokenizer,
    build_tokenizer,
    has_tokenizer,
    load_tokenizer,
    move_token_ids,
    shown,
)
from dare_adapters.recipe import (
    MergePlan,
    ModelReference,
    OutputTensor,
    Recipe,
    RecipeWarning,
    TensorOf,
    get_merge_method,
)

__all__ = ["Vocabulary", "plan_vocabulary"]

GENERATION_CONFIG = "generation_config.json"
ADVICE = "align them by token, with `tokenizer: {source: union}`"
Models = Mapping[ModelReference, MergeModel]


@dataclass
class Vocabulary:
    """What a merge does about tokens.

    Attributes:
        tensors: name -> the inputs of an output tensor, aligned; those that need it.
        rows: of the output's embeddings, where the config is to be told.
        tokenizer: the output's; None: the donor's files as they are.
        chat_template: to write into it; None: its own.
        move: the donor's token id -> the output's, or None: that token is gone.
    """

    tensors: dict[str, AlignedTensor] = field(default_factory=dict)
    rows: int | None = None
    tokenizer: OutputTokenizer | None = None
    chat_template: str | None = None
    move: Callable[[int], int | None] = lambda token_id: token_id

    def change_config(self, config: dict[str, Any]) -> None:
        """Tell a model's config how many rows there are, and which ids moved."""
        if self.rows is not None:
            inner = config.get("text_config")
            parts = [part for part in (config, inner) if isinstance(part, dict)]
            for part in [one for one in parts if "vocab_size" in one] or parts[-1:]:
                part["vocab_size"] = self.rows
        self._move_ids(config, "config.json")

    def write(self, directory: Path) -> None:
        """Put the tokenizer into a directory, and adapt a generation_config.json that is there."""
        if self.tokenizer is None:
            return
        self.tokenizer.write(directory)
        if self.chat_template is not None:
            write_chat_template(directory, self.chat_template)
        file = directory / GENERATION_CONFIG
        if file.is_file():
            config = read_json(file, CheckpointError)
            before = json.dumps(config)
            self._move_ids(config, GENERATION_CONFIG)
            if json.dumps(config) != before:
                file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def _move_ids(self, config: dict[str, Any], name: str) -> None:
        if self.tokenizer is None or not self.tokenizer.vocabulary:
            return
        vocabulary, special = self.tokenizer.vocabulary, self.tokenizer.special
        ids = {key: vocabulary[text] for key, text in special.items() if text in vocabulary}
        gone = move_token_ids(config, self.move, ids)
        if gone:
            warnings.warn(
                f"the output's tokenizer lacks the tokens that {', '.join(gone)} of the donor's "
                f"{name} named, so that the output's does not name them; set them as needed",
                RecipeWarning,
                stacklevel=5,
            )


def plan_vocabulary(
    recipe: Recipe,
    plan: MergePlan,
    models: Models,
    *,
    as_adapter: bool = False,
    token: str | bool | None = None,
) -> Vocabulary:
    """Align the vocabularies of a merge's models, and refuse what cannot be; nothing is written.

    Args:
        recipe, plan: of the merge.
        models: opened.
        as_adapter: the output keeps the base's rows.
        token: hub access token.

    Raises:
        RecipeError: a tokenizer is missing, tokenizers contradict each other, a rule cannot be
            followed, or an adapter could not hold the output.
    """
    planner = _Planner(recipe, plan, models)
    if recipe.tokenizer is not None:
        vocabulary = planner.by_token(as_adapter, token)
    else:
        vocabulary = planner.by_row()
    own = vocabulary.tokenizer.path if vocabulary.tokenizer else models[recipe.donor].path
    others = dict.fromkeys(models[model].path for model in (recipe.donor, *recipe.inputs))
    vocabulary.chat_template = choose_chat_template(recipe.chat_template, own, others)
    if vocabulary.chat_template is not None and not has_tokenizer(own):
        raise RecipeError(
            f"chat_template: {own} has no tokenizer, which a chat template is written into; leave "
            "chat_template out, or take another model's tokenizer (tokenizer: {source: …})"
        )
    if vocabulary.chat_template is not None and vocabulary.tokenizer is None:
        vocabulary.tokenizer = OutputTokenizer(own, {}, {})
    return vocabulary


class _Planner:
    """Plans the rows of all vocabulary tensors of a merge."""

    def __init__(self, recipe: Recipe, plan: MergePlan, models: Models) -> None:
        self.recipe, self.plan, self.models = recipe, plan, models
        self.opened = [models[reference] for reference in plan.models]
        self.tensors = [tensor for tensor in plan.tensors if tensor.vocabulary]
        self.heights: dict[int, int] = {}
        for tensor in self.tensors:
            for place in _places(tensor):
                rows = self._info_rows(place)
                self.heights[place.model] = max(rows, self.heights.get(place.model, 0))

    def by_token(self, as_adapter: bool, token: str | bool | None) -> Vocabulary:
        """Rows as a tokenizer of the output orders them."""
        settings = self.recipe.tokenizer
        assert settings is not None
        if not self.tensors:
            raise RecipeError(
                "tokenizer: no tensor of the models was recognised as an embedding of tokens; "
                "leave the key out"
            )
        tokenizers = [
            ModelTokenizer(reference, self.models[reference].path, self._height(number))
            for number, reference in enumerate(self.plan.models)
        ]
        donor = tokenizers.pop(self.plan.donor)
        made = build_tokenizer(settings, donor, tokenizers, token)
        tokens = max(made.vocabulary.values()) + 1
        multiple = settings.pad_to_multiple_of or 1
        rows = ceil(tokens / multiple) * multiple
        if as_adapter:
            rows = self._adapter_rows(made, rows)
        self._refuse_columns(rows)
        ids = torch.tensor(list(made.vocabulary.values()))
        maps = [torch.full((rows,), -1) for _ in self.plan.models]
        for index, reference in zip(maps, self.plan.models, strict=True):
            own = made.models[reference]
            index[ids] = torch.tensor([own.get(text, -1) for text in made.vocabulary])
        if as_adapter and rows > tokens:
            # What has no token stays what it is in the base.
            ids = torch.cat([ids, torch.arange(tokens, rows)])
            maps[self.plan.donor][tokens:] = torch.arange(tokens, rows)
        rules = {made.vocabulary[text]: (text, rule) for text, rule in settings.tokens.items()}
        planner = RowPlanner(self.plan.models, maps, ids, rules, made)
        found = {tensor.name: self._aligned(tensor, planner) for tensor in self.tensors}
        if planner.nowhere:
            warnings.warn(
                f"{len(planner.nowhere)} tokens ({shown(list(planner.nowhere))}) are in no model "
                f"that {', '.join(planner.lacking)} is made of, and get rows of zeros; give them a "
                "source under tokenizer.tokens",
                RecipeWarning,
                stacklevel=4,
            )
        aligned = {name: tensor for name, tensor in found.items() if tensor is not None}
        move = _moving(made, self.plan.models[self.plan.donor], rows)
        return Vocabulary(aligned, rows, made, None, move)

    def by_row(self) -> Vocabulary:
        """The donor's rows, where models differ in how many they have."""
        aligned: dict[str, AlignedTensor] = {}
        extra: dict[int, list[str]] = {}
        for tensor in self.tensors:
            rows = self._donor_rows(tensor)
            if all(self._info_rows(place) == rows for place in _places(tensor)):
                continue
            if not aligned:
                extra = self._compare_tokens()
            every = torch.arange(rows)
            planner = RowPlanner(self.plan.models, [every] * len(self.opened), every)
            found = self._aligned(tensor, planner)
            if planner.nowhere:
                raise RecipeError(
                    f"{tensor.name} would have {rows} rows, as {self.recipe.donor}, and no "
                    f"model that it is made of has so many; {ADVICE}"
                )
            assert found is not None
            aligned[tensor.name] = found
        rows = self._height(self.plan.donor) or 0
        for number, tokens in extra.items():
            height = self.heights[number]
            text = f"among them those of {shown(tokens)}" if tokens else "none of them of a token"
            warnings.warn(
                f"{height - rows} rows of the embeddings of {self.plan.models[number]} are left "
                f"out, {text}: {self.recipe.donor} has {rows}, and it {height}. To keep them, "
                f"{ADVICE}",
                RecipeWarning,
                stacklevel=4,
            )
        return Vocabulary(aligned)

    def _read(self, places: Mapping[int, TensorOf], number: int) -> torch.Tensor:
        return self.opened[number].parameter(places[number].name)

    def _base_of(self, tensor: OutputTensor) -> int | None:
        """The base among the models that a tensor is made of."""
        if tensor.base is not None:
            return tensor.base.model
        if get_merge_method(self.recipe.merge_method).base_is_first:
            return tensor.inputs[0].model
        if self.recipe.base_model is None:
            return None
        number = self.plan.models.index(self.recipe.base_model)
        return number if number in (place.model for place in tensor.inputs) else None

    def _aligned(self, tensor: OutputTensor, planner: RowPlanner) -> AlignedTensor | None:
        """None: its inputs are aligned as they are."""
        places = {place.model: place for place in _places(tensor)}
        heights = {number: self._info_rows(place) for number, place in places.items()}
        rows = planner.plan(self._base_of(tensor), heights, tensor.name)
        if all(rows.keeps(number, height) for number, height in heights.items()):
            return None
        infos = [self.opened[number].info[place.name] for number, place in places.items()]
        dtypes = [info.dtype for info in infos] + ([tensor.dtype] if tensor.dtype else [])
        dtype = reduce(torch.promote_types, dtypes)
        return AlignedTensor(rows, infos[0].shape[1:], dtype, partial(self._read, places))

    def _donor_rows(self, tensor: OutputTensor) -> int:
        """How many rows the donor has of a tensor."""
        donor = self.opened[self.plan.donor]
        name = next((p.name for p in _places(tensor) if p.model == self.plan.donor), tensor.name)
        if name in donor.info:
            return donor.info[name].shape[0]
        return self._height(self.plan.donor) or self._info_rows(_places(tensor)[0])

    def _height(self, number: int) -> int | None:
        """How many embeddings a model has."""
        if number in self.heights:
            return self.heights[number]
        config = self.opened[number].config
        inner = config.get("text_config")
        inside = inner.get("vocab_size") if isinstance(inner, Mapping) else None
        size = config.get("vocab_size", inside)
        return size if isinstance(size, int) else None

    def _info_rows(self, place: TensorOf) -> int:
        return self.opened[place.model].info[place.name].shape[0]

    def _adapter_rows(self, made: OutputTokenizer, rows: int) -> int:
        """The base's, where its tokens stay where they are."""
        donor = self.plan.models[self.plan.donor]
        height = self._height(self.plan.donor) or 0
        if rows > height:
            raise RecipeError(
                f"the output has {rows} embeddings and its base {donor} {height}; an adapter keeps "
                "the base's rows: write a checkpoint (as_adapter=False), or leave tokenizer out"
            )
        own = made.models[donor]
        moved = [text for text, n in own.items() if made.vocabulary.get(text) != n and n < height]
        if moved:
            raise RecipeError(
                f"tokens of the base {donor} are elsewhere or missing in the output's tokenizer "
                f"({shown(moved)}); an adapter keeps the base's rows: write a checkpoint "
                "(as_adapter=False), or take tokenizer: {source: base}"
            )
        return height

    def _compare_tokens(self) -> dict[int, list[str]]:
        """See that a row is the same token in every model.

        Returns:
            Number of a model with more rows than the output -> the tokens that those are of.

        Raises:
            RecipeError: it is not.
        """
        rows = self._height(self.plan.donor) or 0
        known: dict[int, tuple[str, ModelReference]] = {}
        extra: dict[int, list[str]] = {}
        order = sorted(self.heights, key=lambda number: number != self.plan.donor)
        for number in order:
            model, height = self.plan.models[number], self.heights[number]
            ids = self._token_ids(model)
            if height > rows:
                extra[number] = [text for text, n in ids.items() if rows <= n < height]
            differing = []
            for text, n in ids.items():
                if n < min(rows, height) and known.setdefault(n, (text, model))[0] != text:
                    differing.append(f"{n} ({known[n][0]!r} of {known[n][1]}, here {text!r})")
            if differing:
                more = f" and {len(differing) - 6} more" if len(differing) > 6 else ""
                raise RecipeError(
                    f"the models' embeddings differ in their rows, and {model} has other tokens in "
                    f"those that they share: {', '.join(differing[:6])}{more}; {ADVICE}"
                )
        return extra

    def _token_ids(self, model: ModelReference) -> dict[str, int]:
        path = self.models[model].path
        try:
            tokenizer = load_tokenizer(path, str(model))
            reason = f"there is none at {path}"
        except RecipeError as error:
            tokenizer, reason = None, str(error)
        if tokenizer is None:
            warnings.warn(
                f"the models' embeddings differ in their rows, and the tokenizer of {model} cannot "
                f"be looked at ({reason}); each of its rows is taken to be the same token as the "
                "others'",
                RecipeWarning,
                stacklevel=6,
            )
            return {}
        found = tokenizer.get_vocab()
        return dict(sorted(found.items(), key=lambda item: (item[1], item[0])))

    def _refuse_columns(self, rows: int) -> None:
        """Tensors with a column for each token, as the final_logits_bias of BART."""
        height = self._height(self.plan.donor)
        for tensor in self.plan.tensors:
            place = _places(tensor)[0]
            shape = self.opened[place.model].info[place.name].shape
            if not tensor.vocabulary and rows != height and shape == (1, height):
                raise RecipeError(
                    f"tokenizer: {tensor.name} has a column for each of {height} tokens, and the "
                    f"output has {rows}; that is not supported. Leave the key tokenizer out"
                )


def _places(tensor: OutputTensor) -> list[TensorOf]:
    """What a tensor is made of, the base first."""
    return [*([tensor.base] if tensor.base else []), *tensor.inputs]


def _moving(made: OutputTokenizer, donor: ModelReference, rows: int) -> Callable[[int], int | None]:
    texts = {n: text for text, n in made.models[donor].items()}
    taken = set(made.vocabulary.values())

    def move(token_id: int) -> int | None:
        if token_id in texts:
            return made.vocabulary.get(texts[token_id])
        # Negative numbers mean something else; a spare row stays where it is while it is spare.
        return token_id if token_id < 0 or (token_id < rows and token_id not in taken) else None

    return move
