"""mergekit's recipe grammar, read into frozen dataclasses.

Stricter than mergekit in one thing: a key that means nothing is an error, not silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dare_adapters.recipe.document import Entry, read_document
from dare_adapters.recipe.methods import PARAMETER_NAMES
from dare_adapters.recipe.parameters import Settings, read_parameters
from dare_adapters.recipe.reference import ModelReference, read_reference

__all__ = [
    "InputModel",
    "InputSlice",
    "OutputSlice",
    "Recipe",
    "TokenRule",
    "TokenSource",
    "TokenizerSettings",
    "read_recipe",
]

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}
CHAT_TEMPLATES = ("auto", "alpaca", "chatml", "exaone", "llama3", "mistral")
SHORTEST_TEMPLATE = 20  # characters of a Jinja chat template
MAX_LAYER = 1 << 20
KEYS = (
    "models",
    "slices",
    "modules",
    "merge_method",
    "base_model",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
)


@dataclass(frozen=True)
class InputModel:
    """An entry of `models`.

    Attributes:
        model: which.
        parameters: its own.
    """

    model: ModelReference
    parameters: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class InputSlice:
    """An entry of a slice's `sources`.

    Attributes:
        model: which.
        layer_range: its layers, the last one not included.
        parameters: its own.
    """

    model: ModelReference
    layer_range: tuple[int, int]
    parameters: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class OutputSlice:
    """An entry of `slices`: layers that are made together.

    Attributes:
        sources: as many layers of each.
        base_model: in place of the recipe's.
        parameters: for all its sources.
    """

    sources: tuple[InputSlice, ...]
    base_model: ModelReference | None = None
    parameters: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class TokenSource:
    """Where a token's embedding comes from.

    Attributes:
        kind: "model" (its row of this token), "model_token" (its row of another), or "zero".
        model: whose row, unless zero.
        token, token_id: which row, for "model_token"; one of the two.
    """

    kind: str
    model: ModelReference | None = None
    token: str | None = None
    token_id: int | None = None


@dataclass(frozen=True)
class TokenRule:
    """What a recipe says of one token.

    Attributes:
        source: its embedding in models that lack it; None: the usual rule.
        force: also in models that have it.
    """

    source: TokenSource | None = None
    force: bool = False


@dataclass(frozen=True)
class TokenizerSettings:
    """`tokenizer`, or `tokenizer_source`.

    Attributes:
        source: "union", "base" (of `Recipe.donor`), or a model whose tokenizer is taken.
        tokens: token -> rule.
        pad_to_multiple_of: of the number of embedding rows.
    """

    source: str | ModelReference = "union"
    tokens: Mapping[str, TokenRule] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None


@dataclass(frozen=True)
class Recipe:
    """A merge, as it was written; of `models` and `slices` one is empty.

    Attributes:
        merge_method: mergekit's name.
        models: the inputs, whole.
        slices: or the output's layers, stretch by stretch.
        base_model: the base, for methods with one, and whose config and tokenizer the output has.
        dtype: what parameters are cast to before they are merged.
        out_dtype: what the output is stored in.
        parameters: for everything.
        module_parameters: of `modules: default`, before those.
        tokenizer: what to do about vocabularies.
        chat_template: "auto", a built-in name, or a Jinja template.
        text: the YAML.
    """

    merge_method: str
    models: tuple[InputModel, ...] = ()
    slices: tuple[OutputSlice, ...] = ()
    base_model: ModelReference | None = None
    dtype: torch.dtype | None = None
    out_dtype: torch.dtype | None = None
    parameters: Settings = field(default_factory=dict)
    module_parameters: Settings = field(default_factory=dict)
    tokenizer: TokenizerSettings | None = None
    chat_template: str | None = None
    text: str = field(default="", compare=False)

    @property
    def inputs(self) -> tuple[ModelReference, ...]:
        """Every model that gives tensors, once, as they are written; the base last if unlisted."""
        named = [entry.model for entry in self.models]
        for part in self.slices:
            named += [source.model for source in part.sources]
            named += [part.base_model] if part.base_model else []
        named += [self.base_model] if self.base_model else []
        return tuple(dict.fromkeys(named))

    @property
    def donor(self) -> ModelReference:
        """Whose config, tokenizer and tensor names the output has (mergekit: any, if no base)."""
        return self.base_model or self.inputs[0]


def read_recipe(source: str | Path | Mapping[str, Any]) -> Recipe:
    """Read a recipe; no model is looked at.

    Args:
        source: a path, a text of several lines, or a mapping.

    Raises:
        RecipeError: it is no recipe; the message names the key and its line.
    """
    entry, text = read_document(source)
    found = entry.mapping("a recipe")
    for key, value in found.items():
        if key not in KEYS:
            _refuse_key(key, value)
    found = {key: value for key, value in found.items() if value.value is not None}
    given = [key for key in ("models", "slices", "modules") if key in found and found[key].value]
    if len(given) != 1:
        named = f"both {' and '.join(given)}" if given else "none of them"
        entry.fail(f"a recipe has exactly one of models, slices and modules; there is {named}")
    if "merge_method" not in found:
        entry.fail("a recipe needs the key merge_method")
    module = _read_module(found["modules"]) if given == ["modules"] else found
    return Recipe(
        merge_method=found["merge_method"].text("the name of a merge method"),
        models=_read_models(module),
        slices=_read_slices(module),
        base_model=_optional_reference(found, "base_model"),
        dtype=_read_dtype(found.get("dtype")),
        out_dtype=_read_dtype(found.get("out_dtype")),
        parameters=read_parameters(found.get("parameters")),
        module_parameters=read_parameters(module.get("parameters")) if module is not found else {},
        tokenizer=_read_tokenizer(found),
        chat_template=_read_chat_template(found.get("chat_template")),
        text=text,
    )


def _refuse_key(key: str, entry: Entry) -> None:
    if key == "name":
        entry.fail(
            "'name' is for several merges in a file (mergekit-multi), which is not supported: "
            "give each merge a file of its own, without a name"
        )
    if key in PARAMETER_NAMES:
        entry.fail(f"{key!r} is a parameter: write it under the key 'parameters'")
    Entry({key: entry}, entry.path, entry.line, entry.source).mapping("a recipe", KEYS)


def _read_module(entry: Entry) -> dict[str, Entry]:
    modules = entry.mapping("modules")
    for name, module in modules.items():
        if name != "default":
            module.fail(
                f"the module {name!r}: modules of models with several are not supported, only "
                "'default'; `models:` merges every module of such models alike"
            )
    found = modules["default"].mapping("a module", ("models", "slices", "parameters"))
    given = [key for key in ("models", "slices") if key in found and found[key].value]
    if len(given) != 1:
        modules["default"].fail("a module has exactly one of models and slices")
    return found


def _read_models(found: Mapping[str, Entry]) -> tuple[InputModel, ...]:
    if "models" not in found:
        return ()
    models = []
    for entry in found["models"].sequence("a list of models"):
        own = entry.mapping("an entry of models", ("model", "parameters"))
        if "model" not in own:
            entry.fail("an entry of models needs the key 'model'")
        models.append(
            InputModel(read_reference(own["model"]), read_parameters(own.get("parameters")))
        )
    return tuple(models)


def _read_slices(found: Mapping[str, Entry]) -> tuple[OutputSlice, ...]:
    if "slices" not in found:
        return ()
    slices = []
    for entry in found["slices"].sequence("a list of slices"):
        valid = ("sources", "base_model", "parameters")
        own = entry.mapping("a slice", valid)
        if "sources" not in own:
            entry.fail("a slice needs the key 'sources'")
        sources = tuple(
            _read_source(source) for source in own["sources"].sequence("a list of sources")
        )
        if not sources:
            own["sources"].fail("a slice needs at least one source")
        lengths = [source.layer_range[1] - source.layer_range[0] for source in sources]
        if len(set(lengths)) > 1:
            own["sources"].fail(f"all sources of a slice have as many layers; these have {lengths}")
        parameters = read_parameters(own.get("parameters"))
        slices.append(OutputSlice(sources, _optional_reference(own, "base_model"), parameters))
    return tuple(slices)


def _read_source(entry: Entry) -> InputSlice:
    own = entry.mapping("a source", ("model", "layer_range", "parameters"))
    for key in ("model", "layer_range"):
        if key not in own:
            entry.fail(f"a source needs the key {key!r}")
    layers = own["layer_range"]
    bounds = layers.sequence("a layer_range [start, end)")
    if len(bounds) != 2:
        layers.fail(f"expected a layer_range [start, end), found {len(bounds)} numbers")
    start, end = (bound.integer("a layer", 0) for bound in bounds)
    if not start < end <= MAX_LAYER:
        layers.fail(f"the layers [{start}, {end}) are none; the second number must be greater")
    return InputSlice(
        read_reference(own["model"]), (start, end), read_parameters(own.get("parameters"))
    )


def _read_dtype(entry: Entry | None) -> torch.dtype | None:
    if entry is None:
        return None
    name = entry.text("the name of a dtype").removeprefix("torch.")
    if name not in DTYPES:
        entry.fail(f"the dtype {name!r}; there are {', '.join(DTYPES)}")
    return DTYPES[name]


def _optional_reference(found: Mapping[str, Entry], key: str) -> ModelReference | None:
    return read_reference(found[key]) if key in found else None


def _read_tokenizer(found: Mapping[str, Entry]) -> TokenizerSettings | None:
    if "tokenizer_source" in found:
        if "tokenizer" in found:
            found["tokenizer"].fail("tokenizer and tokenizer_source exclude each other; keep one")
        return TokenizerSettings(_read_tokenizer_source(found["tokenizer_source"]))
    if "tokenizer" not in found:
        return None
    own = found["tokenizer"].mapping("tokenizer", ("source", "tokens", "pad_to_multiple_of"))
    tokens = own["tokens"].mapping("tokens") if "tokens" in own else {}
    multiple = own.get("pad_to_multiple_of")
    return TokenizerSettings(
        _read_tokenizer_source(own["source"]) if "source" in own else "union",
        {token: _read_token(rule) for token, rule in tokens.items()},
        None if multiple is None else multiple.integer("pad_to_multiple_of", 1),
    )


def _read_tokenizer_source(entry: Entry) -> str | ModelReference:
    if isinstance(entry.value, str) and entry.value in ("union", "base"):
        return entry.value
    return read_reference(entry)


def _read_token(entry: Entry) -> TokenRule:
    if entry.value is None:
        return TokenRule()
    own = entry.mapping("a token's rule", ("source", "force"))
    force = own["force"].boolean("force") if "force" in own else False
    if "source" not in own:
        if force:
            entry.fail("force needs a source: a model, {kind: zero} or {kind: model_token, …}")
        return TokenRule()
    source = own["source"]
    if not isinstance(source.value, dict) or "kind" not in source.value:
        return TokenRule(TokenSource("model", read_reference(source)), force)
    kind = source.value["kind"]
    if kind.value == "zero":
        source.mapping("a zero embedding", ("kind",))
        return TokenRule(TokenSource("zero"), force)
    if kind.value != "model_token":
        kind.expected("the kind 'zero' or 'model_token'")
    named = source.mapping("a model_token", ("kind", "model", "token", "token_id"))
    if "model" not in named or ("token" in named) == ("token_id" in named):
        source.fail("a model_token needs the key 'model' and either 'token' or 'token_id'")
    return TokenRule(
        TokenSource(
            "model_token",
            read_reference(named["model"]),
            named["token"].text("a token", blank=True) if "token" in named else None,
            named["token_id"].integer("a token_id", 0) if "token_id" in named else None,
        ),
        force,
    )


def _read_chat_template(entry: Entry | None) -> str | None:
    if entry is None:
        return None
    text = entry.text("a chat template")
    if text not in CHAT_TEMPLATES and (len(text) < SHORTEST_TEMPLATE or "{" not in text):
        entry.fail(
            f"expected {', '.join(CHAT_TEMPLATES)} or a Jinja template of at least "
            f"{SHORTEST_TEMPLATE} characters with a '{{', found {text[:40]!r}"
        )
    return text
