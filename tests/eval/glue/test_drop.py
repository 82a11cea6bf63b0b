"""Scores against the drop rate, and runs that are killed."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from dare_eval.cli import app
from dare_eval.errors import DataNotFoundError
from dare_eval.glue.bench import TaskBench, find_finetuned
from dare_eval.glue.drop import DropAxes, run_drop
from dare_eval.glue.tasks import TASKS
from dare_eval.records import Records
from tests.eval.glue.conftest import Lab
from tests.killed_process import forked


def bench(lab: Lab, task: str = "sst2") -> TaskBench:
    return TaskBench(lab.base, TASKS[task], str(lab.finetuned / task), data_dir=lab.data)


def test_every_combination_is_a_cell_and_none_comes_twice():
    axes = DropAxes(
        drop_rates=(0.1, 0.9), masks=("blocked", "bernoulli"), bits=(32, 4), seeds=(0, 1)
    )
    points = list(axes.points())
    assert len({str(point) for point in points}) == len(points)
    count = {m: sum(p["method"] == m for p in points) for m in axes.methods}
    # p = 0.1 has no blocked mask; magnitude has no seeds; masked weights have no bits.
    assert count == {"dare": 12, "drop_only": 12, "magnitude": 4, "masked_weights": 6}


def test_dare_keeps_what_the_others_lose(lab: Lab, tmp_path: Path):
    records = Records(tmp_path)
    axes = DropAxes(drop_rates=(0.5,), bits=(32, 8))
    run_drop([bench(lab)], records, axes)
    found = [(r.config, r.result) for r in records]

    def error(method: str, rate: float, bits: int = 32) -> float:
        own = [
            r["error"]
            for c, r in found
            if (c["method"], c.get("drop_rate"), c.get("bits")) == (method, rate, bits)
        ]
        assert len(own) == (1 if method == "magnitude" else 3)
        return sum(own) / len(own)

    single = {c["method"]: r for c, r in found if "drop_rate" not in c}
    assert single["finetuned"]["error"] == 0
    assert single["base_encoder"]["error"] == pytest.approx(1)
    trained = next(r.result for r in lab.records if r.config["task"] == "sst2")
    assert single["finetuned"]["scores"] == trained["scores"]
    assert single["base_encoder"]["scores"] == trained["base_encoder"]
    assert error("dare", 0.5) < error("drop_only", 0.5)
    assert error("dare", 0.5) < error("masked_weights", 0.5)
    # The way through an adapter on disk, of the same accuracy.
    assert error("dare", 0.5, 8) < error("drop_only", 0.5)


def test_a_run_that_was_killed_goes_on_where_it_was(lab: Lab, tmp_path: Path):
    """`kill -9` while cells are computed; those that were finished are left as they were."""
    command = ["glue", "drop", lab.base, f"sst2={lab.finetuned / 'sst2'}"]
    command += ["--data-dir", str(lab.data), "--records", str(tmp_path)]
    command += ["--methods", "dare,drop_only", "--drop-rates", "0.9"]
    command += ["--seeds", ",".join(map(str, range(10)))]
    with forked(lambda: app(command)) as running:
        while len(list(Records(tmp_path))) < 5:
            assert running.is_alive()
            time.sleep(0.01)
    assert running.exitcode == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    total = 2 + 2 * 10
    assert 5 <= len(before) < total

    axes = DropAxes(methods=("dare", "drop_only"), drop_rates=(0.9,), seeds=range(10))
    run_drop([bench(lab)], Records(tmp_path), axes)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    assert len(after) == total
    assert {path: after[path] for path in before} == before


def test_another_fine_tune_at_the_same_path_is_another_cell(lab: Lab, tmp_path: Path):
    link = tmp_path / "model"
    link.symlink_to(lab.finetuned / "sst2")
    records = Records(tmp_path / "records")
    few = DropAxes(methods=("dare",), drop_rates=(0.9,), seeds=(0,))

    def run() -> int:
        run_drop([TaskBench(lab.base, TASKS["sst2"], str(link), data_dir=lab.data)], records, few)
        return len(list(records))

    assert (run(), run()) == (3, 3)
    link.unlink()
    link.symlink_to(lab.finetuned / "mrpc")
    assert run() == 6


def test_fine_tunes_are_found_by_folder_or_by_name(lab: Lab, tmp_path: Path):
    found = find_finetuned(["rte=some/model", str(lab.finetuned)])
    assert [task.name for task in found] == ["sst2", "mrpc", "stsb", "rte"]  # as in TASKS
    assert found[TASKS["rte"]] == "some/model"
    with pytest.raises(DataNotFoundError, match="glue train"):
        find_finetuned([str(tmp_path)])
    with pytest.raises(ValueError, match="two fine-tunes"):
        find_finetuned([str(lab.finetuned), "sst2=other"])
    with pytest.raises(ValueError, match="TASK=MODEL"):
        find_finetuned(["squad=other"])
