"""Decoders go through every task and experiment; what was measured is not measured again."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from dare_eval.lm.cli import app
from dare_eval.lm.masked_weights import masked_weights
from dare_eval.records import Record, Records
from dare_eval.report.write import write_reports
from tests.eval.lm.decoders import Decoders
from tests.killed_process import forked

EVERY = "gsm8k,math,humaneval,mbpp,alpaca_eval"


def settings(data_dir: Path, records: Path, tasks: str) -> list[str]:
    return [
        *("--tasks", tasks, "--data-dir", str(data_dir), "--records", str(records)),
        *("--max-tokens", "8", "--model-args", "dtype=float32,batch_size=3"),
    ]


def invoke(*arguments: object) -> Result:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def found(records: Path, **config: object) -> list[Record]:
    return [r for r in Records(records) if config.items() <= r.config.items()]


@pytest.fixture(scope="session")
def ran(decoders: Decoders, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of `run` with a base, an adapter, a mix and a fine-tune on every task."""
    records = tmp_path_factory.mktemp("records")
    command = ["run", decoders.base, "--adapter", decoders.adapters[0], "--adapter", decoders.mix]
    command += ["--finetuned", decoders.finetuned[0], "--allow-code-execution"]
    assert invoke(*command, *settings(data_dir, records, EVERY)).exit_code == 0
    return records


def test_every_model_has_a_record_of_every_task(ran: Path) -> None:
    cells = [(r.config["task"], r.config["method"]) for r in Records(ran)]
    methods = ["adapter", "adapter", "base", "finetuned"]
    assert sorted(cells) == sorted((t, m) for t in EVERY.split(",") for m in methods)
    for record in Records(ran):
        assert record.result["documents"] == 3
        assert record.versions["lm_eval"]
        assert 0 <= record.result["score"] <= 1


def test_completions_are_kept_and_differ_between_models(ran: Path) -> None:
    wrote = {
        json.dumps(r.config.get("model", r.config["method"])): (
            ran / "lm-outputs" / "completions" / r.result["outputs"]
        ).read_text()
        for r in found(ran, task="gsm8k")
    }
    assert len(set(wrote.values())) == len(wrote) == 4


def test_alpaca_evals_outputs_are_in_its_format(ran: Path) -> None:
    (record,) = (r for r in found(ran, task="alpaca_eval") if r.config["method"] == "base")
    path = ran / "lm-outputs" / "completions" / record.result["outputs"]
    outputs = json.loads(path.read_text())
    assert [output["instruction"] for output in outputs] == ["Say 0.", "Say 1.", "Say 2."]
    assert {tuple(output) for output in outputs} == {
        ("dataset", "instruction", "output", "generator")
    }
    assert {output["generator"] for output in outputs} == {"base-base"}


def test_nothing_is_measured_twice(ran: Path, decoders: Decoders, data_dir: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in ran.rglob("*.json*")}
    assert invoke("run", decoders.base, *settings(data_dir, ran, "gsm8k,math")).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in ran.rglob("*.json*")} == before


def test_a_killed_run_goes_on_where_it_stopped(
    decoders: Decoders, data_dir: Path, tmp_path: Path
) -> None:
    command = ["run", str(decoders.base), "--adapter", str(decoders.adapters[0])]
    command += settings(data_dir, tmp_path, "gsm8k,math,alpaca_eval")
    with forked(lambda: app(command)) as process:
        while len(done := {p: p.stat().st_mtime_ns for p in tmp_path.glob("lm-run/*.json")}) < 2:
            assert process.is_alive()
            time.sleep(0.02)
    assert process.exitcode == -signal.SIGKILL
    assert 2 <= len(done) < 6
    assert invoke(*command).exit_code == 0
    after = {p: p.stat().st_mtime_ns for p in tmp_path.glob("lm-run/*.json")}
    assert len(after) == 6
    assert done.items() <= after.items()


def test_drop_has_a_cell_for_every_point(
    decoders: Decoders, data_dir: Path, tmp_path: Path
) -> None:
    command: list[Any] = ["drop", decoders.base, decoders.finetuned[0], "--work", tmp_path / "work"]
    command += ["--methods", "dare,magnitude,masked_weights", "--drop-rates", "0.5,0.9"]
    command += ["--bits", "4,32", "--seeds", "1,2"]
    records = tmp_path / "records"
    assert invoke(*command, *settings(data_dir, records, "gsm8k")).exit_code == 0
    counts = {
        method: len(found(records, method=method))
        for method in ("base", "finetuned", "dare", "magnitude", "masked_weights")
    }
    expected = {"base": 1, "finetuned": 1, "dare": 8, "magnitude": 4, "masked_weights": 4}
    assert counts == expected
    assert list((tmp_path / "work").iterdir()) == []


def test_dropping_nothing_is_the_fine_tune(
    decoders: Decoders, data_dir: Path, tmp_path: Path
) -> None:
    """Its delta over the base writes what the checkpoint itself, loaded by itself, writes."""
    command = ["drop", decoders.base, decoders.finetuned[1], "--drop-rates", "0"]
    command += ["--methods", "dare,magnitude,masked_weights"]
    assert invoke(*command, *settings(data_dir, tmp_path, "math")).exit_code == 0
    wrote = {
        r.config["method"]: (tmp_path / "lm-outputs/completions" / r.result["outputs"]).read_text()
        for r in Records(tmp_path)
    }
    assert wrote["dare"] == wrote["finetuned"] == wrote["magnitude"] == wrote["masked_weights"]
    assert wrote["base"] != wrote["finetuned"]


def test_masked_weights_are_weights_or_zero(decoders: Decoders, tmp_path: Path) -> None:
    out = masked_weights(decoders.finetuned[0], tmp_path / "masked", 0.5, seed=3)
    whole = load_file(decoders.finetuned[0] / "model.safetensors")
    masked = load_file(out / "model.safetensors")
    assert set(masked) == set(whole)
    kept = 0
    for name, tensor in masked.items():
        survivors = tensor != 0
        torch.testing.assert_close(tensor[survivors], 2 * whole[name][survivors])
        kept += int(survivors.sum())
    assert 0.45 < kept / sum(t.numel() for t in whole.values()) < 0.55


def test_merge_has_every_method_with_and_without_dare(
    decoders: Decoders, data_dir: Path, tmp_path: Path
) -> None:
    command: list[Any] = ["merge", decoders.base, *decoders.finetuned, decoders.adapters[1]]
    command += ["--pairs", "--combination-types", "average,ties", "--option", "density=0.3"]
    command += ["--drop-rates", "0,0.5"]
    assert invoke(*command, *settings(data_dir, tmp_path, "gsm8k")).exit_code == 0
    assert len(found(tmp_path, method="single")) == 3
    for method in ("average", "ties"):
        for dare in (False, True):
            assert len(found(tmp_path, method=method, dare=dare)) == 3

    written = {path.name: path for path in write_reports(Records(tmp_path), tmp_path / "report")}
    assert {"lm-merge.md", "lm-merge.tex", "lm-merge.csv"} <= set(written)
    assert {"lm-merge.png", "lm-merge.pdf"} <= set(written)
    rows = written["lm-merge.csv"].read_text().splitlines()
    assert len(rows) == 1 + 3 + 3 * 4
    assert any(row.startswith("math + chat,TIES,p = 0.5") for row in rows)


def test_the_commands_are_dare_evals() -> None:
    from dare_eval.cli import app as dare_eval

    shown = CliRunner().invoke(dare_eval, ["lm", "--help"]).output
    for command in ("run", "drop", "merge", "check-scoring", "harness", "hook"):
        assert f" {command} " in shown


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--tasks", "humaneval"], "--allow-code-execution"),
        (["--backend", "abacus"], "transformers, vllm"),
        (["--model-args", "dtype"], "name=value"),
    ],
)
def test_calls_that_cannot_be_done_are_refused_at_once(
    decoders: Decoders, arguments: list[str], told: str
) -> None:
    done = invoke("run", decoders.base, *arguments)
    assert done.exit_code == 2
    assert told in done.output
