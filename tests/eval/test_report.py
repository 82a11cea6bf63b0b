"""Tables and figures, from records that were written by hand."""

from __future__ import annotations

import csv
import io
import statistics
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dare_eval.errors import RecordError
from dare_eval.records import Records
from dare_eval.report.table import Spread, Table
from dare_eval.report.write import write_reports

BASE = {"name": "tiny", "content": "123456789"}
DROP = {"experiment": "glue-drop", "task": "sst2", "base": BASE, "finetuned": BASE}


def put(records: Records, config: dict[str, Any], **result: Any) -> None:
    records.run(config, lambda: {"metric": "accuracy", **result})


def drop_records(root: Path) -> Records:
    records = Records(root)
    put(records, {**DROP, "method": "finetuned"}, score=0.9)
    put(records, {**DROP, "method": "base_encoder"}, score=0.5)
    for method, scores in {"dare": (0.88, 0.9, 0.86), "drop_only": (0.6, 0.7, 0.65)}.items():
        for seed, score in enumerate(scores):
            for rate, less in ((0.5, 0.0), (0.9, 0.01)):
                config = {**DROP, "method": method, "drop_rate": rate, "bits": 32, "seed": seed}
                put(records, config, score=score - less)
    put(
        records,
        {**DROP, "method": "magnitude", "drop_rate": 0.9, "bits": 32, "seed": None},
        score=0.8,
    )
    return records


def rows_of(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_a_drop_table_has_mean_and_deviation_over_seeds(tmp_path: Path):
    write_reports(drop_records(tmp_path / "records"), tmp_path / "out")
    header, _, *rows = rows_of((tmp_path / "out" / "glue-drop.md").read_text())
    assert header == ["task", "method", "fine-tune", "base encoder", "p = 0.5", "p = 0.9"]
    by_method = {row[1]: row for row in rows}
    deviation = statistics.stdev([0.88, 0.9, 0.86])
    assert by_method["DARE"][2:] == [
        "0.900",
        "0.500",
        f"0.880 ± {deviation:.3f}",
        f"0.870 ± {deviation:.3f}",
    ]
    assert by_method["magnitude"][4:] == ["", "0.800"]
    assert set(by_method) == {"DARE", "drop only", "magnitude"}


def test_csv_has_every_digit_and_latex_compiles_to_the_same_cells(tmp_path: Path):
    write_reports(drop_records(tmp_path / "records"), tmp_path / "out")
    table = list(csv.DictReader(io.StringIO((tmp_path / "out" / "glue-drop.csv").read_text())))
    dare = next(row for row in table if row["method"] == "DARE")
    assert float(dare["p = 0.5"]) == statistics.fmean([0.88, 0.9, 0.86])
    assert float(dare["p = 0.5 deviation"]) == statistics.stdev([0.88, 0.9, 0.86])
    assert dare["p = 0.5 seeds"] == "3"
    latex = (tmp_path / "out" / "glue-drop.tex").read_text()
    body = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert all(line.count("&") == 5 for line in body)
    assert r"0.880 $\pm$ 0.020" in latex


def test_what_latex_and_markdown_would_misread_is_escaped():
    table = Table("t", "A table.", ["a_b", "50 %"], [["x|y & z", 1.5], ["#1", None]])
    assert r"a\_b & 50 \%" in table.latex()
    assert r"x|y \& z & 1.500" in table.latex()
    assert r"| x\|y & z | 1.500 |" in table.markdown()


def test_one_value_has_no_deviation():
    assert Spread.of([0.5]) == Spread(0.5, None, 1)
    assert Table("t", "", ["a"], [[Spread.of([0.5])]]).markdown().endswith("| 0.500 |\n")


def test_a_setting_that_differs_gets_a_column_and_is_never_averaged_over(tmp_path: Path):
    records = drop_records(tmp_path / "records")
    for seed in range(3):
        config = {**DROP, "method": "dare", "drop_rate": 0.9, "bits": 4, "seed": seed}
        put(records, config, score=0.1)
    write_reports(records, tmp_path / "out")
    header, _, *rows = rows_of((tmp_path / "out" / "glue-drop.md").read_text())
    assert header[:3] == ["task", "method", "bits"]
    dare = {row[2]: row[-1] for row in rows if row[1] == "DARE"}
    assert dare["4"].startswith("0.100")
    assert dare["32"].startswith("0.870")


def test_figures_are_pictures_and_the_same_records_give_the_same_bytes(tmp_path: Path):
    records = drop_records(tmp_path / "records")
    first = write_reports(records, tmp_path / "one")
    second = write_reports(records, tmp_path / "two")
    assert {path.suffix for path in first} == {".md", ".tex", ".csv", ".png", ".pdf"}
    for one, two in zip(first, second, strict=True):
        assert one.read_bytes() == two.read_bytes(), one.name
    with Image.open(tmp_path / "one" / "glue-drop.png") as picture:
        assert min(picture.size) > 300
    assert (tmp_path / "one" / "glue-drop.pdf").read_bytes().startswith(b"%PDF")
    assert not list((tmp_path / "one").glob(".*"))


def test_merges_are_shown_as_parts_of_the_single_models(tmp_path: Path):
    records = Records(tmp_path / "records")
    common = {"experiment": "glue-merge", "base": BASE}
    for task, own, head in (("sst2", 0.8, 0.5), ("rte", 0.6, 0.5)):
        for method, score in (("finetuned", own), ("base_encoder", head)):
            put(records, {**common, "task": task, "tasks": [task], "method": method}, score=score)
    merge = {**common, "tasks": ["sst2", "rte"], "method": "ties"}
    put(
        records,
        {**merge, "dare": False, "options": {"lambda_": 1.0}, "seed": None},
        score=0.5,
        scores={"sst2": 0.4, "rte": 0.6},
    )
    for seed, scores in enumerate(({"sst2": 0.8, "rte": 0.3}, {"sst2": 0.6, "rte": 0.3})):
        options = {"lambda_": 1.0, "prune": "dare", "drop_rate": 0.9}
        config = {**merge, "dare": True, "options": options, "seed": seed}
        put(records, config, score=0.5, scores=scores)
    write_reports(records, tmp_path / "out")
    header, _, *rows = rows_of((tmp_path / "out" / "glue-merge.md").read_text())
    assert header == ["merged", "method", "DARE", "SST-2", "RTE", "share"]
    assert rows[0][1:] == ["fine-tunes", "", "0.800", "0.600", ""]
    assert rows[2] == ["SST-2 + RTE", "TIES", "no", "0.400", "0.600", "0.750"]
    # (1 + 1/2) / 2 and (3/4 + 1/2) / 2
    deviation = statistics.stdev([0.75, 0.625])
    assert rows[3][2:4] == ["p = 0.9", f"0.700 ± {statistics.stdev([0.8, 0.6]):.3f}"]
    assert rows[3][5] == f"{(0.75 + 0.625) / 2:.3f} ± {deviation:.3f}"
    assert (tmp_path / "out" / "glue-merge.png").is_file()


def test_fidelity_is_ordered_by_size(tmp_path: Path):
    records = Records(tmp_path / "records")
    common = {"experiment": "glue-fidelity", "task": "sst2", "base": BASE}
    put(records, {**common, "method": "finetuned"}, score=0.9, error=0.0)
    put(records, {**common, "method": "bitdelta"}, score=0.85, error=0.02, bits_per_parameter=1.001)
    put(
        records,
        {**common, "method": "lora", "size": 0.5},
        score=0.7,
        error=0.3,
        bits_per_parameter=0.52,
    )
    for seed, error in enumerate((0.004, 0.006)):
        config = {**common, "method": "dare", "bits": 4, "drop_rate": 0.9, "seed": seed}
        put(records, config, score=0.89, error=error, bits_per_parameter=0.43)
    write_reports(records, tmp_path / "out")
    rows = rows_of((tmp_path / "out" / "glue-fidelity-error.md").read_text())[2:]
    assert [row[0] for row in rows] == [
        "sign, one scale (BitDelta)",
        "low rank, 16 bit",
        "DARE, 4 bit",
    ]
    assert rows[2][1:] == ["0.9", "0.4300", f"0.0050 ± {statistics.stdev((0.004, 0.006)):.4f}"]
    scores = rows_of((tmp_path / "out" / "glue-fidelity-score.md").read_text())[2:]
    assert scores[0][0] == "fine-tune"
    assert (tmp_path / "out" / "glue-fidelity-error.png").is_file()


def test_an_experiment_without_a_report_of_its_own_has_its_scores(tmp_path: Path):
    records = Records(tmp_path / "records")
    for seed, score in enumerate((0.5, 0.7)):
        put(
            records,
            {"experiment": "lm-run", "task": "gsm8k", "method": "adapter", "seed": seed},
            score=score,
        )
    put(records, {"experiment": "lm-run", "task": "gsm8k", "method": "base"}, score=0.1)
    write_reports(records, tmp_path / "out")
    rows = rows_of((tmp_path / "out" / "lm-run.md").read_text())
    assert rows[0] == ["task", "method", "metric", "score"]
    assert sorted(row[1:] for row in rows[2:]) == [
        ["adapter", "accuracy", f"0.600 ± {statistics.stdev((0.5, 0.7)):.3f}"],
        ["base", "accuracy", "0.100"],
    ]


def test_bases_are_not_mixed(tmp_path: Path):
    records = drop_records(tmp_path / "records")
    other = {"name": "other", "content": "987654321"}
    config = {**DROP, "base": other, "method": "dare", "drop_rate": 0.5, "bits": 32, "seed": 0}
    put(records, config, score=0.2)
    written = {path.name for path in write_reports(records, tmp_path / "out")}
    assert {"glue-drop-tiny-123456.md", "glue-drop-other-987654.md"} <= written
    assert "0.200" not in (tmp_path / "out" / "glue-drop-tiny-123456.md").read_text()


def test_no_records_are_no_report(tmp_path: Path):
    with pytest.raises(RecordError, match="no records"):
        write_reports(Records(tmp_path), tmp_path / "out")
