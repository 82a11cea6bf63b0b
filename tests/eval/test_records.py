"""A record for each cell, complete or absent, and never made twice."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dare_eval.errors import RecordError
from dare_eval.records import Records
from tests.killed_process import forked

CONFIG = {"experiment": "glue-drop", "task": "sst2", "method": "dare", "drop_rate": 0.9, "seed": 0}
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def never() -> dict[str, float]:
    raise AssertionError("a recorded cell was run again")


def test_a_finished_cell_is_not_run_again(tmp_path: Path):
    first = Records(tmp_path).run(CONFIG, lambda: {"score": 0.5, "metric": "accuracy"})
    again = Records(tmp_path).run(CONFIG, never)
    assert first == again
    assert again.result == {"score": 0.5, "metric": "accuracy"}


@pytest.mark.parametrize(("key", "value"), [("seed", 1), ("drop_rate", 0.90001), ("bits", 4)])
def test_a_config_that_changed_is_another_cell(tmp_path: Path, key: str, value: object):
    records = Records(tmp_path)
    records.run(CONFIG, lambda: {"score": 0.5})
    changed = {**CONFIG, key: value}
    assert records.cell(changed) is None
    assert records.run(changed, lambda: {"score": 0.7}).result == {"score": 0.7}
    assert records.cell(CONFIG).result == {"score": 0.5}  # type: ignore[union-attr]
    assert len(list(records)) == 2


def test_the_order_of_settings_does_not_make_another_cell(tmp_path: Path):
    records = Records(tmp_path)
    records.run(CONFIG, lambda: {"score": 0.5})
    assert records.cell(dict(reversed(CONFIG.items()))) is not None


@settings(max_examples=30, deadline=None)
@given(extra=st.dictionaries(st.text(), PLAIN, max_size=3), result=PLAIN)
def test_a_record_reads_as_it_was_written(
    extra: dict[str, object], result: object, tmp_path_factory: pytest.TempPathFactory
):
    records = Records(tmp_path_factory.mktemp("records"))
    config = {**extra, "experiment": "any", "task": "x", "tasks": [], "method": "y"}
    written = records.run(config, lambda: {"score": result})
    assert records.cell(config) == written
    assert written.config == config
    assert written.result == {"score": result}


def test_a_record_says_versions_and_time(tmp_path: Path):
    record = Records(tmp_path).run(CONFIG, dict)
    assert record.versions["torch"] == torch.__version__.split("+")[0] or torch.__version__
    assert record.versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert record.started.endswith("+00:00")
    assert record.seconds >= 0


def test_a_cell_that_failed_leaves_nothing(tmp_path: Path):
    records = Records(tmp_path)
    with pytest.raises(ZeroDivisionError):
        records.run(CONFIG, lambda: {"score": 1 / 0})
    assert records.cell(CONFIG) is None
    with pytest.raises(ValueError, match="not plain JSON"):
        records.run(CONFIG, lambda: {"score": math.nan})
    with pytest.raises(ValueError, match="not plain JSON"):
        records.run(CONFIG, lambda: {"score": object()})
    assert list(tmp_path.rglob("*.*")) == []


def test_a_damaged_record_is_named(tmp_path: Path):
    records = Records(tmp_path)
    records.run(CONFIG, dict)
    path = records.path(CONFIG)
    whole = path.read_text()
    path.write_text(whole[:40])
    with pytest.raises(RecordError, match=path.name):
        records.cell(CONFIG)
    with pytest.raises(RecordError, match="remove it"):
        list(records)
    path.write_text(json.dumps({**json.loads(whole), "config": {**CONFIG, "seed": 5}}))
    with pytest.raises(RecordError, match="another cell"):
        records.cell(CONFIG)


@pytest.mark.parametrize("experiment", [None, "", "../outside", "a/b", 3])
def test_an_experiment_needs_a_name_that_is_one_folder(tmp_path: Path, experiment: object):
    with pytest.raises(ValueError, match="experiment is"):
        Records(tmp_path).path({**CONFIG, "experiment": experiment})


def test_no_task_or_method_leaves_the_folder(tmp_path: Path):
    path = Records(tmp_path).path({"experiment": "x", "task": "../../etc/passwd", "method": "/a"})
    assert path.parent == tmp_path / "x"


def test_a_killed_run_keeps_what_was_finished(tmp_path: Path):
    """The process kills itself, as kill -9 would, while it computes its third cell."""
    begun, root = tmp_path / "begun", tmp_path / "records"

    def run(dies: bool) -> tuple[int | None, list[str]]:
        def cell(seed: int) -> tuple[dict[str, object], Callable[[], dict[str, object]]]:
            def compute() -> dict[str, object]:
                with begun.open("a") as file:
                    print(seed, file=file)
                if seed == 2 and dies:
                    os.kill(os.getpid(), signal.SIGKILL)
                return {"score": seed}

            return {"experiment": "x", "seed": seed}, compute

        begun.write_text("")
        with forked(lambda: Records(root).run_all(map(cell, range(4)), "x")) as process:
            process.join()
        return process.exitcode, begun.read_text().split()

    assert run(dies=True) == (-signal.SIGKILL, ["0", "1", "2"])
    assert run(dies=False) == (0, ["2", "3"])
    assert [
        record.result["score"]
        for record in Records(root).run_all(
            [({"experiment": "x", "seed": seed}, never) for seed in range(4)], "x"
        )
    ] == [0, 1, 2, 3]
