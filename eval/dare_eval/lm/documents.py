"""The benchmarks' problems: from the hub, or from a directory without a network.

Each function is a `custom_dataset` of a harness task: it is called with the task's metadata, of
which it heeds `data_dir`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dare_eval.errors import DataNotFoundError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["alpaca_eval", "gsm8k", "humaneval", "math", "mbpp"]

_MATH_SUBJECTS = (
    *("algebra", "counting_and_probability", "geometry", "intermediate_algebra"),
    *("number_theory", "prealgebra", "precalculus"),
)
_MBPP_TEST = range(11, 511)  # task ids

Splits = dict[str, "Dataset"]


def gsm8k(data_dir: str | None = None, **_: Any) -> Splits:
    """1319 problems: question, answer (which ends in "#### number")."""
    return _load(
        data_dir,
        ["gsm8k/test.jsonl"],
        lambda: _hub("openai/gsm8k", "main", "test"),
        ["question", "answer"],
    )


def math(data_dir: str | None = None, **_: Any) -> Splits:
    r"""5000 problems: problem, solution (its answer in \boxed or \fbox), level, type."""

    def from_hub() -> Dataset:
        from datasets import concatenate_datasets

        parts = [_hub("EleutherAI/hendrycks_math", name, "test") for name in _MATH_SUBJECTS]
        return concatenate_datasets(parts)

    return _load(data_dir, ["math/test.jsonl"], from_hub, ["problem", "solution", "level", "type"])


def humaneval(data_dir: str | None = None, **_: Any) -> Splits:
    """164 problems: prompt, canonical_solution (a body), test, entry_point, task_id."""
    return _load(
        data_dir,
        ["humaneval/HumanEval.jsonl.gz", "humaneval/HumanEval.jsonl"],
        lambda: _hub("openai/openai_humaneval", None, "test"),
        ["task_id", "prompt", "canonical_solution", "test", "entry_point"],
    )


def mbpp(data_dir: str | None = None, **_: Any) -> Splits:
    """The 500 problems with task ids from 11 to 510: text, code, test_list, test_setup_code."""
    splits = _load(
        data_dir,
        ["mbpp/mergelm_test.jsonl", "mbpp/mbpp_full.jsonl"],
        lambda: _hub("google-research-datasets/mbpp", "full", "test"),
        ["task_id", "text", "code", "test_list", "test_setup_code"],
    )
    return {"test": splits["test"].filter(lambda document: document["task_id"] in _MBPP_TEST)}


def alpaca_eval(data_dir: str | None = None, **_: Any) -> Splits:
    """805 instructions: instruction, dataset (the one it was taken from)."""

    def from_hub() -> Dataset:
        from datasets import Dataset
        from huggingface_hub import hf_hub_download

        # The hub's repository has a loading script, which datasets no longer runs, and this.
        path = hf_hub_download("tatsu-lab/alpaca_eval", "alpaca_eval.json", repo_type="dataset")
        return Dataset.from_list(json.loads(Path(path).read_text(encoding="utf-8")))

    names = ["instructions.jsonl", "alpaca_eval.json"]
    files = [f"alpaca_eval/{name}" for name in names]
    return _load(data_dir, files, from_hub, ["instruction", "dataset"])


def _hub(path: str, name: str | None, split: str) -> Dataset:
    from datasets import load_dataset

    return load_dataset(path, name, split=split)


def _load(
    data_dir: str | None, files: Iterable[str], hub: Callable[[], Dataset], columns: list[str]
) -> Splits:
    """One split, "test", with these columns.

    Args:
        data_dir: where one of `files` is; None for the hub.
        files: JSON lines, gzipped or not, by preference.
        hub: what loads it from there.
        columns: what each document has.

    Raises:
        DataNotFoundError: none of the files is there, or the hub has it not or cannot be reached.
    """
    if data_dir is None:
        try:
            found = hub()
        except (OSError, ValueError, RuntimeError) as error:
            raise DataNotFoundError(
                f"the hub's data cannot be had ({error}); with a copy, use --data-dir"
            ) from error
    else:
        found = _from_files([Path(data_dir).expanduser() / file for file in files])
    if missing := set(columns) - set(found.column_names):
        raise DataNotFoundError(f"{next(iter(files))} has no {', '.join(sorted(missing))}")
    return {"test": found.select_columns(columns)}


def _from_files(paths: list[Path]) -> Dataset:
    from datasets import load_dataset

    for path in paths:
        if path.is_file():
            return load_dataset("json", data_files=str(path), split="train")
    raise DataNotFoundError(f"{' and '.join(map(str, paths))} not found in the data directory")
