"""Rows from a data directory, and which of them are kept out of training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dare_adapters.errors import DareError
from dare_eval.errors import DataNotFoundError
from dare_eval.glue.data import Row, hold_out, limited, read_rows
from dare_eval.glue.tasks import TASKS
from tests.development_data import shared

ROWS = [Row((f"text {n}",), n % 2) for n in range(50)]


def write(root: Path, task: str, *rows: object, name: str = "train") -> None:
    folder = root / "glue" / task
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_rows_are_read_in_order(tmp_path: Path):
    write(tmp_path, "rte", {"sentence1": "a", "sentence2": "b", "label": 1, "idx": 7})
    assert read_rows(TASKS["rte"], "train", tmp_path) == [Row(("a", "b"), 1)]


def test_mnli_is_scored_on_its_matched_rows(tmp_path: Path):
    row = {"sentence1": "a", "sentence2": "b", "label": 2}
    write(tmp_path, "mnli", row, name="dev_matched")
    assert read_rows(TASKS["mnli"], "dev", tmp_path) == [Row(("a", "b"), 2)]


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(DataNotFoundError, match=r"glue/qqp/dev\.jsonl does not exist.*--data-dir"):
        read_rows(TASKS["qqp"], "dev", tmp_path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"sentence1": "a", "label": 1}, "sentence2"),
        ({"sentence1": "a", "sentence2": None, "label": 1}, "None"),
        ({"sentence1": "a", "sentence2": "b", "label": 2}, "labels 0 … 1"),
        ({"sentence1": "a", "sentence2": "b", "label": -1}, "labels 0 … 1"),  # GLUE's hidden ones
        ({"sentence1": "a", "sentence2": "b", "label": "yes"}, "labels 0 … 1"),
    ],
)
def test_a_row_that_is_none_is_named(tmp_path: Path, row: dict[str, object], message: str):
    write(tmp_path, "rte", {"sentence1": "a", "sentence2": "b", "label": 0}, row)
    with pytest.raises(DareError, match=f"row 2.*{message}"):
        read_rows(TASKS["rte"], "train", tmp_path)


@given(st.permutations(ROWS), st.integers(0, 12))
def test_what_is_held_out_depends_on_the_texts_alone(rows: list[Row], count: int):
    held_out, rest = hold_out(rows, count)
    assert set(held_out) == set(hold_out(ROWS, count)[0])
    assert len(held_out) == count
    assert set(held_out) | set(rest) == set(ROWS)
    assert not set(held_out) & set(rest)


def test_at_most_a_quarter_is_held_out():
    assert len(hold_out(ROWS, 256)[0]) == 12


def test_fewer_rows_are_a_random_part_that_stays_the_same():
    assert limited(ROWS, None) == limited(ROWS, 99) == ROWS
    few = limited(ROWS, 10)
    assert few == limited(ROWS, 10)
    assert len(set(few)) == 10
    assert few != ROWS[:10]
    assert few != limited(ROWS, 10, seed=1)


@pytest.mark.parametrize(
    ("task", "train", "dev"),
    [("cola", 8551, 1043), ("mrpc", 3668, 408), ("stsb", 5749, 1500), ("rte", 2490, 277)],
)
def test_the_real_files_have_all_their_rows(task: str, train: int, dev: int):
    root = shared("data")
    assert len(read_rows(TASKS[task], "train", root)) == train
    assert len(read_rows(TASKS[task], "dev", root)) == dev
