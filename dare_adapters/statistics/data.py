"""Rows of a data set, and the batches of model inputs that are made of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from dare_adapters.errors import DareError

__all__ = ["Batches", "Rows", "read_rows"]

Rows = Sequence[Mapping[str, Any]]

# What datasets calls the reader of a file.
_READERS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
_LABELS = ("label", "labels")


def read_rows(source: str | Path, config: str | None = None, split: str = "train") -> Rows:
    """A split of a data set, by the `datasets` library; local ones are read without the network.

    Args:
        source: a hub id; a file (JSON lines, CSV, TSV, Parquet, Arrow, text: one split of its
            own); a directory of such files, named for their splits; or what `save_to_disk` wrote.
        config: of a hub data set; of a directory, the folder inside it.
        split: such as "train" or "validation".

    Raises:
        DareError: `datasets` is not installed, or cannot read it.
    """
    try:
        datasets: Any = import_module("datasets")
    except ImportError as error:
        raise DareError(
            "reading a data set needs datasets: pip install 'dare-adapters[stats]'"
        ) from error
    path = Path(source)
    shown = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        if path.is_file():
            rows = _read_file(datasets, path)
        elif path.is_dir():
            rows = _read_directory(datasets, path / config if config else path, split)
        else:
            rows = datasets.load_dataset(str(source), config, split=split)
    except Exception as error:  # of datasets, its readers, the hub, or the disk
        what = f"{source} ({config})" if config else str(source)
        raise DareError(
            f"{what}: the split {split!r} of this data set cannot be read: {error}"
        ) from error
    finally:
        if not shown:
            datasets.enable_progress_bars()
    found: Rows = rows
    return found


def _read_file(datasets: Any, path: Path) -> Any:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DareError(f"its ending is {path.suffix!r}; there are {', '.join(_READERS)}")
    tabs = {"sep": "\t"} if path.suffix.lower() == ".tsv" else {}
    return datasets.load_dataset(reader, data_files=str(path.resolve()), split="train", **tabs)


def _read_directory(datasets: Any, path: Path, split: str) -> Any:
    if not path.is_dir():
        raise DareError(f"{path} is no directory")
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = datasets.load_from_disk(str(path))
        if not isinstance(saved, datasets.DatasetDict):
            return saved
        if split not in saved:
            raise DareError(f"there are {', '.join(saved)}")
        return saved[split]
    return datasets.load_dataset(str(path.resolve()), split=split)


class Batches:
    """Batches of tokenised rows, each padded to its longest; rows in a seeded random order.

    Args:
        rows: with a column of text, perhaps of a second text, perhaps of labels.
        tokenizer: of the model.
        text_column, second_text_column: of strings.
        label_column: of numbers; by default "label" or "labels" where there is one.
        with_labels: whether batches have `labels`.
        examples: at most; fewer where there are fewer rows.
        batch_size: the last batch may be smaller.
        max_length: longer texts are cut, in tokens.
        seed: of the order.

    Raises:
        DareError: there are no rows, or not those columns.
        ValueError: a count is not positive.
    """

    def __init__(
        self,
        rows: Rows,
        tokenizer: Any,
        *,
        text_column: str = "text",
        second_text_column: str | None = None,
        label_column: str | None = None,
        with_labels: bool = False,
        examples: int = 1000,
        batch_size: int = 16,
        max_length: int = 128,
        seed: int = 0,
    ) -> None:
        counts = {"examples": examples, "batch_size": batch_size, "max_length": max_length}
        for key, count in counts.items():
            if count < 1:
                raise ValueError(f"{key} is {count}; it must be at least 1")
        if not len(rows):
            raise DareError("the data set has no rows")
        columns = list(rows[0])
        self._text = [name for name in (text_column, second_text_column) if name is not None]
        for name in [*self._text, *([label_column] if label_column else [])]:
            if name not in columns:
                raise DareError(
                    f"the data set has no column {name!r}; it has {', '.join(columns)}: choose "
                    "with --text-column, --second-text-column, --label-column"
                )
        if label_column is None:
            label_column = next((name for name in _LABELS if name in columns), None)
        self._label = label_column if with_labels else None
        self._rows, self._tokenizer, self._max_length = rows, tokenizer, max_length
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        chosen = order[:examples]
        self.examples = len(chosen)
        self._batches = [chosen[i : i + batch_size] for i in range(0, len(chosen), batch_size)]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for numbers in self._batches:
            rows = [self._rows[number] for number in numbers]
            texts = [self._texts(n, row) for n, row in zip(numbers, rows, strict=True)]
            tokens = self._tokenizer(
                *(list(column) for column in zip(*texts, strict=True)),
                padding=True,
                truncation=True,
                max_length=self._max_length,
                return_tensors="pt",
            )
            batch: dict[str, torch.Tensor] = dict(tokens)
            if self._label is not None:
                labels = [
                    self._number(n, row[self._label]) for n, row in zip(numbers, rows, strict=True)
                ]
                batch["labels"] = torch.tensor(labels)
            yield batch

    def _texts(self, number: int, row: Mapping[str, Any]) -> list[str]:
        texts = [row[column] for column in self._text]
        for column, text in zip(self._text, texts, strict=True):
            if not isinstance(text, str):
                raise DareError(f"row {number}: {column} is {text!r:.60}, not a text")
        return texts

    def _number(self, number: int, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise DareError(f"row {number}: {self._label} is {value!r:.60}, not a number")
        return float(value)
