"""The tokenizer of a merge: one model's, or the union of all, and each model's ids in it.

With mergekit's rules, except that tokens are added in the order of their ids, so that a recipe
always gives the same tokenizer.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dare_adapters.companions import is_companion
from dare_adapters.errors import RecipeError
from dare_adapters.recipe import ModelReference, RecipeWarning, TokenizerSettings

__all__ = [
    "ModelTokenizer",
    "OutputTokenizer",
    "build_tokenizer",
    "has_tokenizer",
    "load_tokenizer",
    "move_token_ids",
    "shown",
]

# Any of these files makes a directory one with a tokenizer.
_HAVING = re.compile(r"(tokenizer\.json|vocab\.(json|txt)|.*\.(model|tiktoken))$")
_NO_TOKENIZER = {"generation_config.json", "preprocessor_config.json", "processor_config.json"}
_DOWNLOADED = ["tokenizer*", "*.model", "*.tiktoken", "vocab*", "merges.txt", "*.jinja"]
_DOWNLOADED += ["added_tokens.json", "special_tokens_map.json", "config.json"]
_ID_KEYS = re.compile(
    r".*_token_(id|ids|index)|suppress_tokens|begin_suppress_tokens|bad_words_ids"
)
LISTED = 8


@dataclass(frozen=True)
class ModelTokenizer:
    """A model's tokenizer.

    Attributes:
        model: whose.
        path: the directory that it lies in.
        rows: how many embeddings the model has; None: one for each token.
    """

    model: ModelReference
    path: Path
    rows: int | None

    def has(self, token_id: int) -> bool:
        """Whether the model has an embedding of that number."""
        return self.rows is None or token_id < self.rows


@dataclass(frozen=True)
class OutputTokenizer:
    """What the output's tokenizer is.

    Attributes:
        path: the directory of the tokenizer that it is, or was made from.
        vocabulary: token -> id; empty where nobody asked.
        models: model -> its own token -> id.
        changed: the tokenizer to save, where it is not the one at `path`.
        special: name, as "eos_token", -> token.
    """

    path: Path
    vocabulary: Mapping[str, int]
    models: Mapping[ModelReference, Mapping[str, int]]
    changed: Any = None
    special: Mapping[str, str] = field(default_factory=dict)

    def write(self, directory: Path) -> None:
        """Put it into a directory, in place of a tokenizer that is there."""
        for file in list(directory.iterdir()):
            if _is_tokenizer_file(file):
                file.unlink()
        if self.changed is not None:
            self.changed.save_pretrained(str(directory))
            return
        for file in self.path.iterdir():
            if _is_tokenizer_file(file):
                shutil.copyfile(file, directory / file.name)


def build_tokenizer(
    settings: TokenizerSettings,
    donor: ModelTokenizer,
    others: Sequence[ModelTokenizer],
    token: str | bool | None = None,
) -> OutputTokenizer:
    """Build the tokenizer that a recipe asks for.

    Args:
        settings: the recipe's.
        donor: whose tokenizer "base" is, and to whose ids "union" adds.
        others: the other models.
        token: hub access token.

    Raises:
        RecipeError: a tokenizer is missing or has no fast form, or cannot be saved.
    """
    own = load_tokenizer(donor.path, str(donor.model))
    if own is None:
        raise RecipeError(
            f"{donor.model} has no tokenizer (at {donor.path}), which the key tokenizer needs; put "
            "one there, or leave the key out"
        )
    vocabularies = {donor.model: _vocabulary(own)}
    loaded: list[tuple[ModelTokenizer, Any]] = []
    for model in others:
        found = load_tokenizer(model.path, str(model.model))
        if found is None:
            warnings.warn(
                f"{model.model} has no tokenizer (at {model.path}); its embeddings are taken to be "
                f"in the order of {donor.model}",
                RecipeWarning,
                stacklevel=5,
            )
            vocabularies[model.model] = vocabularies[donor.model]
        else:
            vocabularies[model.model] = _vocabulary(found)
            loaded.append((model, found))
    path = donor.path
    if isinstance(settings.source, ModelReference):
        path = _directory_of(settings.source, [donor, *others], token)
        made = load_tokenizer(path, str(settings.source))
        if made is None:
            raise RecipeError(f"tokenizer: {settings.source} has no tokenizer (at {path})")
        before = made.backend_tokenizer.to_str()
    else:
        # A tokenizer that is changed below; `own` stays as it is.
        made = load_tokenizer(path, str(donor.model))
        before = made.backend_tokenizer.to_str()
        _remove_beyond(made, donor)
        if settings.source == "union":
            _add_tokens(made, [(donor, own), *loaded])
    missing = [text for text in settings.tokens if text not in made.get_vocab()]
    if missing:
        made.add_tokens(missing)
    vocabulary = _vocabulary(made)
    impossible = [text for text in settings.tokens if text not in vocabulary]
    if impossible:
        raise RecipeError(f"tokenizer.tokens: {shown(impossible)} cannot be made a token")
    twice = len(vocabulary) - len(set(vocabulary.values()))
    if twice:
        raise RecipeError(f"tokenizer: {twice} tokens share an id with another one")
    same = made.backend_tokenizer.to_str() == before
    unchanged = same and (path / "tokenizer.json").is_file()
    if not unchanged:
        _check_saved(made, vocabulary)
    return OutputTokenizer(
        path,
        vocabulary,
        vocabularies,
        None if unchanged else made,
        {name: str(text) for name, text in made.special_tokens_map.items()},
    )


def load_tokenizer(path: Path, label: str) -> Any:
    """A directory's tokenizer as a fast one, or None: there is none.

    Raises:
        RecipeError: it has no fast form.
    """
    if not has_tokenizer(path):
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # of transformers, tokenizers, or a converter that is not installed
        reason = str(error).strip().split("\n")[0]
    else:
        if tokenizer.is_fast:
            return tokenizer
        reason = f"{type(tokenizer).__name__} is written in Python"
    raise RecipeError(
        f"the tokenizer of {label} (at {path}) cannot be opened as a fast one ({reason}); install "
        "the package that it is converted with (sentencepiece, tiktoken), or save it with a "
        "tokenizer.json"
    )


def has_tokenizer(path: Path) -> bool:
    """Whether a tokenizer lies in a directory."""
    return any(_HAVING.fullmatch(file.name) for file in path.iterdir())


def move_token_ids(
    config: dict[str, Any], move: Callable[[int], int | None], special: Mapping[str, int]
) -> list[str]:
    """Change every token id of a config, or of its text part, in place.

    Args:
        config: of a model or its generation.
        move: old id -> new one, or None: the token is gone.
        special: name, as "eos_token", -> id, for tokens that are gone.

    Returns:
        The keys of tokens that are gone and have no such substitute.
    """
    gone = []
    for key, value in config.items():
        if key == "text_config" and isinstance(value, dict):
            gone += [f"{key}.{inner}" for inner in move_token_ids(value, move, special)]
        elif _ID_KEYS.fullmatch(key):
            new, lost = _moved(value, move)
            substitute = special.get(key.removesuffix("_id"))
            if lost and substitute is not None and new in (None, []):
                new = substitute
            elif lost:
                gone.append(key)
            config[key] = new
    return gone


def shown(tokens: Sequence[str]) -> str:
    """Some of many tokens, for messages."""
    more = f" and {len(tokens) - LISTED} more" if len(tokens) > LISTED else ""
    return ", ".join(map(repr, tokens[:LISTED])) + more


def _moved(value: Any, move: Callable[[int], int | None]) -> tuple[Any, bool]:
    """A new value, and whether anything of it is gone."""
    if isinstance(value, list):
        pairs = [_moved(one, move) for one in value]
        # A sequence of tokens without one of them would be another sequence.
        kept = [new for new, lost in pairs if not lost]
        return kept, len(kept) < len(pairs)
    if isinstance(value, bool) or not isinstance(value, int):
        return value, False
    new = move(value)
    return new, new is None


def _vocabulary(tokenizer: Any) -> dict[str, int]:
    return dict(sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])))


def _directory_of(
    source: ModelReference, models: Sequence[ModelTokenizer], token: str | bool | None
) -> Path:
    for model in models:
        if model.model == source:
            return model.path
    path = Path(source.model.path)
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            source.model.path,
            revision=source.model.revision,
            token=token,
            allow_patterns=_DOWNLOADED,
        )
    except Exception as error:  # of the hub's client, its HTTP library, or the disk
        raise RecipeError(
            f"tokenizer: {source} is neither a directory nor a model that the hub can give: {error}"
        ) from error
    return Path(found)


def _add_tokens(tokenizer: Any, models: Sequence[tuple[ModelTokenizer, Any]]) -> None:
    """Add what the models have that it lacks: first their vocabularies, then their added tokens."""
    plain: dict[str, None] = {}
    added: dict[str, Any] = {}
    contradicting: dict[str, None] = {}
    for model, own in models:
        settings = {entry.content: entry for entry in own.added_tokens_decoder.values()}
        ids = _vocabulary(own)
        usable = [text for text, token_id in ids.items() if model.has(token_id)]
        plain.update(dict.fromkeys(text for text in usable if text not in settings))
        for text in usable:
            if text in settings and added.setdefault(text, settings[text]) != settings[text]:
                contradicting[text] = None
    present = tokenizer.get_vocab()
    tokenizer.add_tokens([text for text in plain if text not in present and text not in added])
    present = {entry.content for entry in tokenizer.added_tokens_decoder.values()}
    tokenizer.add_tokens([entry for text, entry in added.items() if text not in present])
    if contradicting:
        warnings.warn(
            f"models differ in how they match {shown(list(contradicting))}; the output's tokenizer "
            "does it as the first that has them, the base_model before all others",
            RecipeWarning,
            stacklevel=6,
        )


def _remove_beyond(tokenizer: Any, model: ModelTokenizer) -> None:
    """Take out the tokens for which the model has no embedding."""
    gone = {text for text, token_id in tokenizer.get_vocab().items() if not model.has(token_id)}
    if not gone:
        return
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [one for one in state["added_tokens"] if one["content"] not in gone]
    inner = state["model"]
    if isinstance(inner["vocab"], list):  # of Unigram: a token's id is its place
        inner["vocab"] = inner["vocab"][: model.rows]
    else:
        inner["vocab"] = {text: n for text, n in inner["vocab"].items() if text not in gone}
    if "merges" in inner:
        inner["merges"] = [one for one in inner["merges"] if not _parts(one) & gone]
    try:
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    except Exception as error:  # the bindings raise a bare Exception
        raise RecipeError(
            f"the tokenizer of {model.model} has tokens beyond its {model.rows} embeddings "
            f"({shown(sorted(gone))}), and cannot be had without them: {error}"
        ) from error
    for name, text in tokenizer.special_tokens_map.items():
        if str(text) in gone:
            setattr(tokenizer, name, None)
    kept = [one for one in tokenizer.extra_special_tokens if str(one) not in gone]
    tokenizer.extra_special_tokens = kept


def _parts(merge: str | list[str]) -> set[str]:
    """The tokens of a merge of BPE: what is merged, and what it makes."""
    pair = merge.split(" ") if isinstance(merge, str) else merge
    return {*pair, "".join(pair)}


def _check_saved(tokenizer: Any, vocabulary: Mapping[str, int]) -> None:
    """Save it, and see that it comes back with every token where its embedding will be.

    Raises:
        RecipeError: it does not.
    """
    with tempfile.TemporaryDirectory() as place:
        tokenizer.save_pretrained(place)
        found = load_tokenizer(Path(place), "the output").get_vocab()
    if found != vocabulary:
        strange = [
            text for text in {**vocabulary, **found} if found.get(text) != vocabulary.get(text)
        ]
        raise RecipeError(
            f"tokenizer: transformers does not read back what it saved of {shown(strange)}; take "
            "the tokenizer of one model (source: base)"
        )


def _is_tokenizer_file(file: Path) -> bool:
    return file.is_file() and is_companion(file.name) and file.name not in _NO_TOKENIZER
