"""How a recipe names a model: `path[@revision][+lora[@revision]]`, or the same as a mapping."""

from __future__ import annotations

from dataclasses import dataclass

from dare_adapters.recipe.document import Entry

__all__ = ["ModelPath", "ModelReference", "read_reference"]

_AS_MAPPING = "{model: {path: …, revision: …}, lora: {path: …, revision: …}}"


@dataclass(frozen=True)
class ModelPath:
    """A directory, or a hub id and a revision.

    Attributes:
        path: as written, without a slash at its end.
        revision: branch, tag or commit of the hub; None: its default.
    """

    path: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.path if self.revision is None else f"{self.path}@{self.revision}"


@dataclass(frozen=True)
class ModelReference:
    """A model of a recipe; two are the same model if they are written alike.

    Attributes:
        model: a checkpoint, or a DARE adapter, which stands for its base with it attached.
        lora: an adapter over it.
        override_architecture: a class name in place of the config's.
    """

    model: ModelPath
    lora: ModelPath | None = None
    override_architecture: str | None = None

    def __str__(self) -> str:
        return str(self.model) if self.lora is None else f"{self.model}+{self.lora}"


def read_reference(entry: Entry) -> ModelReference:
    """The model that a value of a recipe names.

    Raises:
        RecipeError: it names none.
    """
    if isinstance(entry.value, dict):
        found = entry.mapping("a model", ("model", "lora", "override_architecture"))
        if "model" not in found:
            entry.fail(f"a model that is a mapping needs the key 'model': {_AS_MAPPING}")
        architecture = found.get("override_architecture")
        return ModelReference(
            _read_path(found["model"]),
            _read_path(found["lora"]) if "lora" in found else None,
            None if architecture is None else architecture.text("a class name"),
        )
    text = entry.text("a model: a directory or a hub id")
    parts = text.split("+")
    if len(parts) > 2:
        entry.fail(f"{text!r} has more than one '+'; a path with a '+' is written {_AS_MAPPING}")
    paths = [_split(part, entry) for part in parts]
    return ModelReference(paths[0], paths[1] if len(paths) == 2 else None)


def _read_path(entry: Entry) -> ModelPath:
    if not isinstance(entry.value, dict):
        return _split(entry.text("a directory or a hub id"), entry)
    found = entry.mapping("a model's path", ("path", "revision"))
    if "path" not in found:
        entry.fail("a model's path that is a mapping needs the key 'path'")
    revision = found.get("revision")
    return ModelPath(
        _tidy(found["path"].text("a directory or a hub id")),
        None if revision is None else revision.text("a branch, tag or commit"),
    )


def _split(text: str, entry: Entry) -> ModelPath:
    path, at, revision = text.partition("@")
    if "@" in revision:
        entry.fail(f"{text!r} has more than one '@'; a path with an '@' is written {_AS_MAPPING}")
    if not path.strip() or (at and not revision.strip()):
        entry.fail(f"{text!r} is no model; expected path[@revision][+lora[@revision]]")
    return ModelPath(_tidy(path), revision if at else None)


def _tidy(path: str) -> str:
    return path.strip().rstrip("/") or "/"
