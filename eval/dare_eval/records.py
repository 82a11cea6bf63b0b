"""One JSON record for each cell of an experiment: what is recorded is not run again.

A cell is its config, every setting that its result depends on, so a setting that changes makes
another cell. By convention a config has

    experiment   what was run, such as "glue-drop"; records of one lie in one folder
    task, tasks  what was scored
    method       and drop_rate, bits, mask, seed, …: the axes of a table
    model        an identity of the weights that depends on their content, not on where they lie

and a result has `score`, the task's one number, and `metric`, its name. Tables and plots are made
of these (:mod:`dare_eval.report`), never while an experiment runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from dare_adapters.versions import library_versions
from dare_eval.errors import RecordError

__all__ = ["Cell", "Record", "Records"]

Cell = tuple[Mapping[str, Any], Callable[[], Mapping[str, Any]]]
"""A config, and what computes its result."""

_LIBRARIES = ("accelerate", "datasets", "evaluate", "lm_eval", "peft", "scikit-learn", "vllm")


@dataclass(frozen=True)
class Record:
    """A finished cell.

    Attributes:
        config: what the cell is.
        result: what was measured.
        versions: of Python and of the libraries that are installed.
        started: UTC, ISO 8601.
        seconds: wall-clock time that the result took.
    """

    config: dict[str, Any]
    result: dict[str, Any]
    versions: dict[str, str]
    started: str
    seconds: float


class Records:
    """The records in a directory.

    Args:
        directory: made when the first record is written.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)

    def cell(self, config: Mapping[str, Any]) -> Record | None:
        """The record of a cell, None where it has not been run.

        Raises:
            RecordError: its file is damaged.
            ValueError: the config is not plain JSON or names no experiment.
        """
        path = self.path(config)
        if not path.is_file():
            return None
        found = _read(path)
        if found.config != _plain(config, "the config"):
            raise RecordError(f"{path} is of another cell: its config was edited; remove it")
        return found

    def run(self, config: Mapping[str, Any], function: Callable[[], Mapping[str, Any]]) -> Record:
        """A cell's record; `function` gives its result where there is none yet.

        The record appears complete or not at all, whenever the process is killed.

        Raises:
            RecordError, ValueError: as :meth:`cell`; or the result is not plain JSON.
        """
        found = self.cell(config)
        if found is not None:
            return found
        started, clock = datetime.now(timezone.utc), time.perf_counter()
        result = function()
        record = Record(
            config=_plain(config, "the config"),
            result=_plain(result, f"the result of {dict(config)}"),
            versions=_versions(),
            started=started.isoformat(timespec="seconds"),
            seconds=round(time.perf_counter() - clock, 3),
        )
        _write(self.path(config), record)
        return record

    def run_all(self, cells: Iterable[Cell], description: str) -> list[Record]:
        """Every cell's record, in order, with a bar over those that have none yet."""
        planned = list(cells)
        waiting = sum(self.cell(config) is None for config, _ in planned)
        found = []
        with tqdm(total=waiting, desc=description, unit="cell") as bar:
            for config, function in planned:
                is_new = self.cell(config) is None
                found.append(self.run(config, function))
                bar.update(is_new)
        return found

    def __iter__(self) -> Iterator[Record]:
        """All records, by experiment and file name.

        Raises:
            RecordError: a file is damaged.
        """
        for path in sorted(self.directory.glob("*/*.json")):
            yield _read(path)

    def path(self, config: Mapping[str, Any]) -> Path:
        """Where a cell's record is, or would be."""
        plain = _plain(config, "the config")
        experiment = plain.get("experiment")
        if not isinstance(experiment, str) or not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", experiment):
            raise ValueError(f"experiment is {experiment!r}; it must be a name such as glue-drop")
        digest = hashlib.sha256(_canonical(plain).encode()).hexdigest()[:16]
        words = [plain.get("task") or "+".join(plain.get("tasks") or []), plain.get("method")]
        name = "-".join(re.sub(r"[^A-Za-z0-9_+.]+", "_", str(word)) for word in words if word)
        return self.directory / experiment / f"{f'{name}-' if name else ''}{digest}.json"


def _read(path: Path) -> Record:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return Record(**{name: fields[name] for name in Record.__dataclass_fields__})
    except (ValueError, TypeError, KeyError) as error:
        raise RecordError(
            f"{path} is no record ({error}); remove it, and its cell is run again"
        ) from error


def _write(path: Path, record: Record) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            json.dump(asdict(record), file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _plain(value: Mapping[str, Any], what: str) -> dict[str, Any]:
    """As it will be read again: tuples are lists, keys are text."""
    try:
        plain: dict[str, Any] = json.loads(_canonical(value))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} is not plain JSON: {error}") from error
    return plain


def _canonical(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), **library_versions()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
