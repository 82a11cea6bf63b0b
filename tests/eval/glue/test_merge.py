"""Merges: what they are chosen on, and what they score."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dare_eval.glue.merge import METHODS, MergeAxes, MergeBench, mean_share, run_merge
from dare_eval.records import Records
from tests.eval.glue.conftest import Lab

SETTINGS = {"drop_rates": (0.5,), "selection_rows": 24, "statistics_rows": 16}
FEW = MergeAxes(sizes=(None,), seeds=(0, 1), **SETTINGS)  # type: ignore[arg-type]
PAIRED = MergeAxes(
    methods={name: METHODS[name] for name in ("task_arithmetic", "fisher")},
    sizes=(2,),
    seeds=(0,),
    **SETTINGS,  # type: ignore[arg-type]
)


ALL, PAIR = ("sst2", "mrpc", "stsb"), ("sst2", "stsb")


def bench(lab: Lab, tasks: tuple[str, ...] = ALL, data: Path | None = None) -> MergeBench:
    return MergeBench(lab.base, lab.of(*tasks), data_dir=data or lab.data, max_length=24)


@pytest.fixture(scope="module")
def paired(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Records:
    records = Records(tmp_path_factory.mktemp("paired"))
    run_merge(bench(lab, PAIR), records, PAIRED)
    return records


@pytest.fixture(scope="module")
def merged(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Records:
    records = Records(tmp_path_factory.mktemp("merged"))
    run_merge(bench(lab), records, FEW)
    return records


def chosen(records: Records) -> dict[str, object]:
    return {
        json.dumps(r.config, sort_keys=True): r.result
        for r in records
        if r.config["experiment"] == "glue-merge-choice"
    }


def test_the_tasks_are_merged_by_every_method_with_and_without_dare(merged: Records):
    cells = [r.config for r in merged if r.config["experiment"] == "glue-merge"]
    merges = [config for config in cells if "dare" in config]
    assert {tuple(config["tasks"]) for config in merges} == {("sst2", "mrpc", "stsb")}
    assert {config["method"] for config in merges} == {*METHODS}
    assert set(METHODS) == {"average", "task_arithmetic", "fisher", "regmean", "ties"}
    assert len(merges) == len(METHODS) * (1 + len(FEW.seeds))
    assert len(cells) - len(merges) == 6  # of each task the fine-tune and the base encoder
    for record in merged:
        if record.config.get("dare"):
            options = record.result.get("chosen") or record.config["options"]
            assert (options["prune"], options["drop_rate"]) == ("dare", 0.5)


def test_pairs_and_all_are_merged_once_each():
    tasks = ["a", "b", "c"]
    pairs = [("a", "b"), ("a", "c"), ("b", "c")]
    assert MergeAxes().groups(tasks) == [*pairs, ("a", "b", "c")]
    assert MergeAxes().groups(tasks[:2]) == [("a", "b")]


def test_a_method_takes_the_options_that_were_best_on_training_rows(merged: Records):
    choices = [r for r in merged if r.config["experiment"] == "glue-merge-choice"]
    for record in choices:
        shares, candidates = record.result["shares"], record.config["candidates"]
        assert len(shares) == (len(candidates) if len(candidates) > 1 else 0)
        best = candidates[shares.index(max(shares))] if shares else candidates[0]
        assert record.result["chosen"] == best
    scales = {r.config["method"]: len(r.config["candidates"]) for r in choices}
    assert scales["task_arithmetic"] == 4
    assert scales["average"] == 1


def test_dev_labels_do_not_change_what_is_chosen(lab: Lab, paired: Records, tmp_path: Path):
    """All dev labels are turned round: scores change, no choice does."""
    poisoned = shutil.copytree(lab.data, tmp_path / "data")
    for file in poisoned.glob("glue/*/dev.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        top = 5.0 if file.parent.name == "stsb" else 1
        lines = [json.dumps({**row, "label": top - row["label"]}) for row in rows]
        file.write_text("\n".join(lines))
    records = Records(tmp_path / "records")
    run_merge(bench(lab, PAIR, poisoned), records, PAIRED)
    assert len(chosen(paired)) == 2 * 2
    assert chosen(records) == chosen(paired)
    scores = {r.config["task"]: r.result["score"] for r in records if "task" in r.config}
    before = {r.config["task"]: r.result["score"] for r in paired if "task" in r.config}
    assert all(scores[task] != before[task] for task in before)


def test_dev_rows_are_not_even_there_while_options_are_chosen(
    lab: Lab, paired: Records, tmp_path: Path
):
    without = shutil.copytree(lab.data, tmp_path / "data")
    own = bench(lab, PAIR, without)
    singles = Records(tmp_path / "records")
    for record in paired:
        if "task" in record.config:  # scores of single models are known
            singles.run(record.config, lambda record=record: record.result)
    for file in without.glob("glue/*/dev.jsonl"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"dev\.jsonl"):
        run_merge(own, singles, PAIRED)  # it gets as far as the first merge that is scored on dev
    assert chosen(singles) == chosen(paired)


def test_what_is_recorded_is_not_merged_again(
    lab: Lab, merged: Records, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(MergeBench, "encoder", None)
    monkeypatch.setattr(MergeBench, "score", None)
    before = len(list(merged))
    run_merge(bench(lab), merged, FEW)
    assert len(list(merged)) == before


def test_shares_are_of_the_single_models_scores():
    assert mean_share({"a": 0.4, "b": 0.9}, {"a": 0.8, "b": 0.9}) == pytest.approx(0.75)
    assert mean_share({"a": 0.3}, {"a": -0.1}) == pytest.approx(0.3)  # no unit
