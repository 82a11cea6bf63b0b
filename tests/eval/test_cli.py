"""The command line: what it says of wrong calls and of what is not there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from dare_adapters.errors import DareError
from dare_eval.cli import app, main
from dare_eval.errors import DataNotFoundError

WRONG = {
    ("glue", "train", "base", "--out", "o", "--tasks", "squad"): "no task",
    ("glue", "train", "base", "--out", "o", "--tasks", "rte,rte"): "comes twice",
    ("glue", "drop", "base", "rte=model", "--drop-rates", "1"): "below 1",
    ("glue", "drop", "base", "rte=model", "--drop-rates", "much"): "much",
    ("glue", "drop", "base", "rte=model", "--methods", "all"): "magnitude",
    ("glue", "drop", "base", "rte=model", "--bits", "3"): "16",
    ("glue", "drop", "base", "squad=model"): "TASK=MODEL",
    ("glue", "drop", "base", "rte=model", "--tasks", "sst2"): "no fine-tune of sst2",
    ("glue", "fidelity", "base", "rte=model", "--point", "4"): "BITS:P",
    ("glue", "merge", "base", "rte=model"): "two tasks",
    ("glue", "merge", "base", "rte=a", "cola=b", "--sizes", "1"): "no merge",
    ("glue", "merge", "base", "rte=a", "cola=b", "--dare", "maybe"): "both",
}


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "300"})


@pytest.mark.parametrize("arguments", WRONG, ids=lambda a: " ".join(a[1:]))
def test_a_wrong_call_says_what_would_be_right(arguments: tuple[str, ...]):
    result = call(*arguments)
    assert result.exit_code == 2
    assert WRONG[arguments] in result.output


def test_every_command_has_help():
    for command in ([], ["glue"], ["report"], ["delta-stats"]):
        assert call(*command, "--help").exit_code == 0
    for command in ("train", "drop", "merge", "fidelity"):
        assert "--data-dir" in call("glue", command, "--help").output


def test_a_directory_without_fine_tunes_is_named(tmp_path: Path):
    result = call("glue", "drop", "base", tmp_path)
    assert isinstance(result.exception, DataNotFoundError)
    assert str(tmp_path) in str(result.exception)


def test_a_base_that_is_none_is_named(tmp_path: Path):
    result = call("glue", "drop", tmp_path / "nothing", "rte=model")
    assert isinstance(result.exception, DareError)
    assert "nothing" in str(result.exception)


def test_what_fails_ends_in_a_sentence_and_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", ["dare-eval", "report", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("RecordError: ")
    assert str(tmp_path) in line
