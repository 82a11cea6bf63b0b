"""Scoring gives every benchmark's own answers full marks, and others' what chance gives."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from dare_eval.lm.check_scoring import check_scoring
from dare_eval.lm.cli import app
from tests.development_data import shared

COUNTS = {"gsm8k": 1319, "math": 5000, "humaneval": 164, "mbpp": 500}


@pytest.mark.parametrize("task", ["gsm8k", "math"])
def test_all_reference_answers_are_right_and_others_are_by_chance(task: str) -> None:
    found = check_scoring(task, str(shared("data")))
    assert found.problems == COUNTS[task]
    assert found.own == 1
    assert abs(found.others - found.chance) < 0.006  # three deviations


@pytest.mark.parametrize("task", ["humaneval", "mbpp"])
def test_some_canonical_programs_pass_and_others_do_not(task: str) -> None:
    found = check_scoring(task, str(shared("data")), limit=12)
    assert (found.problems, found.own, found.others) == (12, 1, 0)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["humaneval", "mbpp"])
def test_all_canonical_programs_pass_and_others_do_not(task: str) -> None:
    found = check_scoring(task, str(shared("data")))
    assert (found.problems, found.own, found.others) == (COUNTS[task], 1, 0)


def test_the_command_runs_no_program_unless_it_is_allowed() -> None:
    refused = CliRunner().invoke(app, ["check-scoring", "--data-dir", "nowhere"])
    assert refused.exit_code == 2
    assert "--allow-code-execution" in refused.output


def test_the_command_prints_the_shares(data_dir: str) -> None:
    arguments = ["check-scoring", "--data-dir", str(data_dir), "--allow-code-execution"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    for task in COUNTS:
        assert task in done.output
    assert done.output.count("100.00%") == 4


def test_missing_data_is_named(tmp_path: object) -> None:
    done = CliRunner().invoke(
        app, ["check-scoring", "--tasks", "gsm8k", "--data-dir", str(tmp_path)]
    )
    assert "gsm8k/test.jsonl" in str(done.exception)
