"""A recipe's text as values that know their place, so that every complaint can name its line."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from dare_adapters.errors import DareWarning, RecipeError

__all__ = ["Entry", "RecipeWarning", "Scalar", "nearest", "read_document"]

MAX_BYTES = 1 << 20
MAX_VALUES = 20_000
MAX_DEPTH = 32
MAX_INTEGER = 1 << 63
SHOWN = 60
MERGE_KEY = "tag:yaml.org,2002:merge"

Scalar = bool | int | float | str


class RecipeWarning(DareWarning):
    """A recipe can be run, but something it says has no effect or is not what it may seem."""


@dataclass(frozen=True)
class Entry:
    """A value of a recipe.

    Attributes:
        value: a mapping or list of entries, or a scalar, or None.
        path: the keys that lead to it, as in "models[1].parameters.weight".
        line: of the file, from 1; None where the recipe was no text.
        source: the file, or "".
    """

    value: dict[str, Entry] | list[Entry] | Scalar | None
    path: str = ""
    line: int | None = None
    source: str = ""

    @property
    def place(self) -> str:
        """Where it is, for messages."""
        line = "" if self.line is None else f"line {self.line}"
        return ", ".join(part for part in (self.source, line, self.path or "the recipe") if part)

    def fail(self, problem: str) -> NoReturn:
        """Refuse the recipe because of this value."""
        raise RecipeError(f"{self.place}: {problem}")

    def expected(self, what: str) -> NoReturn:
        """Refuse it because it is of another kind."""
        self.fail(f"expected {what}, found {_shown(self.value)}")

    def mapping(self, what: str, valid: Sequence[str] | None = None) -> dict[str, Entry]:
        """Key -> value; keys that are null count as absent.

        Raises:
            RecipeError: it is no mapping, or has a key that is not among the `valid` ones.
        """
        if not isinstance(self.value, dict):
            self.expected(what)
        for key, entry in self.value.items():
            if valid is not None and key not in valid:
                hint = nearest(key, valid)
                entry.fail(f"{key!r} is no key of {what}{hint}; its keys are {', '.join(valid)}")
        if valid is None:
            return self.value
        return {key: entry for key, entry in self.value.items() if entry.value is not None}

    def sequence(self, what: str) -> list[Entry]:
        """The entries of a list.

        Raises:
            RecipeError: it is something else.
        """
        if not isinstance(self.value, list):
            self.expected(what)
        return self.value

    def text(self, what: str, *, blank: bool = False) -> str:
        """A string that is not empty, nor, unless it may be `blank`, white space.

        Raises:
            RecipeError: it is something else.
        """
        if isinstance(self.value, (bool, int, float)):
            self.expected(f"{what} (put quotes around it)")
        if not isinstance(self.value, str) or not (self.value if blank else self.value.strip()):
            self.expected(what)
        return self.value

    def integer(self, what: str, low: int) -> int:
        """A whole number of at least `low`.

        Raises:
            RecipeError: it is something else.
        """
        value = self.value
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            self.expected(f"{what}, a whole number of at least {low}")
        return value

    def boolean(self, what: str) -> bool:
        """True or false.

        Raises:
            RecipeError: it is something else.
        """
        if not isinstance(self.value, bool):
            self.expected(f"{what}, true or false")
        return self.value


def read_document(source: str | Path | Mapping[str, Any]) -> tuple[Entry, str]:
    """A recipe's values, and its text.

    Args:
        source: a path, a text (it has more than one line, or starts with a brace), or a mapping.

    Raises:
        RecipeError: it cannot be read, is no YAML, or is larger than any recipe.
    """
    if isinstance(source, Mapping):
        entry = _PlainReader().entry(source, "", 0)
        return entry, yaml.safe_dump(_plain(entry), sort_keys=False, allow_unicode=True)
    if isinstance(source, str) and ("\n" in source or source.lstrip().startswith("{")):
        return _read_text(source, ""), source
    if not isinstance(source, (str, os.PathLike)):
        raise RecipeError(f"a recipe is a path, a text or a mapping, not {type(source).__name__}")
    text = _read_file(Path(source))
    return _read_text(text, str(source)), text


def nearest(word: str, valid: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" where one of the valid words is much like it, otherwise ""."""
    found = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.7)
    return f" (did you mean {found[0]!r}?)" if found else ""


def _read_file(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise RecipeError(f"{path}: {size} bytes, more than the {MAX_BYTES} of a recipe")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"{path}: the recipe cannot be read ({error})") from error


def _read_text(text: str, source: str) -> Entry:
    if len(text) > MAX_BYTES:
        raise RecipeError(f"{len(text)} characters, more than the {MAX_BYTES} of a recipe")
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            raise RecipeError(f"{source or 'the recipe'} is empty")
        return _YamlReader(loader, source).entry(node, "", 0)
    except RecipeError:
        raise
    except yaml.YAMLError as error:
        where = source or "the recipe"
        mark = getattr(error, "problem_mark", None)
        where += f", line {mark.line + 1}" if mark is not None else ""
        if "single document" in str(getattr(error, "context", "")):
            raise RecipeError(
                f"{where}: a second YAML document; several merges in a file (mergekit-multi) are "
                "not supported: give each a file of its own"
            ) from error
        raise RecipeError(f"{where}: not YAML ({getattr(error, 'problem', error)})") from error
    except Exception as error:
        # PyYAML's constructors raise whatever int(), float() and datetime() do, and recurse.
        kind = type(error).__name__
        raise RecipeError(f"{source or 'the recipe'}: not YAML ({kind}: {error})") from error


class _Reader:
    """Makes entries and counts them: aliases can make a short text stand for endless values."""

    source = ""

    def __init__(self) -> None:
        self._count = 0

    def _made(
        self, value: dict[str, Entry] | list[Entry] | object, path: str, line: int | None = None
    ) -> Entry:
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        entry = Entry(value, path, line, self.source)  # type: ignore[arg-type]
        if not isinstance(value, (dict, list, bool, int, float, str, type(None))):
            entry.fail(
                f"a recipe holds text, numbers, lists and mappings, not {type(value).__name__}; "
                "if it is meant as text, put quotes around it"
            )
        if isinstance(value, int) and abs(value) >= MAX_INTEGER:
            entry.fail(f"a number of more than {MAX_INTEGER.bit_length() - 1} bits")
        return entry

    def _check(self, path: str, depth: int, line: int | None = None) -> None:
        self._count += 1
        if depth > MAX_DEPTH or self._count > MAX_VALUES:
            limit = f"{MAX_DEPTH} levels" if depth > MAX_DEPTH else f"{MAX_VALUES} values"
            Entry(None, path[:SHOWN], line, self.source).fail(f"a recipe of more than {limit}")

    def _key(self, key: object, path: str, line: int | None = None) -> str:
        if not isinstance(key, str):
            shown = repr(key)[:SHOWN] if isinstance(key, (bool, float)) else type(key).__name__
            Entry(None, path, line, self.source).fail(
                f"a key that is {shown}, not text; put quotes around it"
            )
        return f"{path}.{key}" if path else key


class _PlainReader(_Reader):
    """Entries of Python's own values."""

    def entry(self, value: object, path: str, depth: int) -> Entry:
        self._check(path, depth)
        if isinstance(value, Mapping):
            mapping = {
                key: self.entry(item, self._key(key, path), depth + 1)
                for key, item in value.items()
            }
            return self._made(mapping, path)
        if isinstance(value, (list, tuple)):
            items = [
                self.entry(item, f"{path}[{number}]", depth + 1)
                for number, item in enumerate(value)
            ]
            return self._made(items, path)
        return self._made(value, path)


class _YamlReader(_Reader):
    """Entries of YAML nodes; unlike `yaml.safe_load` it refuses a key that comes twice."""

    def __init__(self, loader: Any, source: str) -> None:
        super().__init__()
        self._loader, self.source = loader, source

    def entry(self, node: Any, path: str, depth: int) -> Entry:
        line = node.start_mark.line + 1
        self._check(path, depth, line)
        if isinstance(node, yaml.MappingNode) and node.tag.endswith(":map"):
            return self._made(self._mapping(node, path, depth), path, line)
        if isinstance(node, yaml.SequenceNode) and node.tag.endswith(":seq"):
            items = [
                self.entry(item, f"{path}[{number}]", depth + 1)
                for number, item in enumerate(node.value)
            ]
            return self._made(items, path, line)
        if not isinstance(node, yaml.ScalarNode):
            Entry(None, path, line, self.source).fail(f"the YAML tag {node.tag} has no place here")
        return self._made(self._loader.construct_object(node), path, line)

    def _mapping(self, node: Any, path: str, depth: int) -> dict[str, Entry]:
        own: dict[str, Entry] = {}
        merged: dict[str, Entry] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag == MERGE_KEY:
                several = isinstance(value_node, yaml.SequenceNode)
                for given in value_node.value if several else [value_node]:
                    entry = self.entry(given, path, depth + 1)
                    for name, value in entry.mapping("a mapping to merge").items():
                        merged.setdefault(name, value)
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                self._key(None, path, line)
            key = self._loader.construct_object(key_node)
            inner = self._key(key, path, line)
            if key in own:
                Entry(None, inner, line, self.source).fail(f"the key {key!r} comes twice")
            own[key] = self.entry(value_node, inner, depth + 1)
        return {**merged, **own}


def _plain(entry: Entry) -> Any:
    if isinstance(entry.value, dict):
        return {key: _plain(item) for key, item in entry.value.items()}
    if isinstance(entry.value, list):
        return [_plain(item) for item in entry.value]
    return entry.value


def _shown(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return f"a mapping of {', '.join(value)}"[:SHOWN] if value else "an empty mapping"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return repr(value)[:SHOWN]
