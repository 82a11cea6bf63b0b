"""`dare-eval report`: every table and figure that a directory of records has."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dare_adapters.errors import DareError
from dare_eval.errors import RecordError
from dare_eval.records import Record, Records
from dare_eval.report.axes import grouped, in_task_order
from dare_eval.report.delta import delta_figure, delta_table
from dare_eval.report.drop import drop_figure, drop_table
from dare_eval.report.fidelity import fidelity_figure, fidelity_table
from dare_eval.report.generic import generic_table
from dare_eval.report.lm_merge import lm_merge_figure, lm_merge_table
from dare_eval.report.merge import merge_figure, merge_table
from dare_eval.report.table import Table
from dare_eval.report.training import training_table

__all__ = ["REPORTS", "write_reports"]

Made = tuple[Sequence[Table], Mapping[str, Any]]
"""Tables, and figures by name."""


def _drop(records: Sequence[Record], name: str) -> Made:
    return [drop_table(records, name)], {name: drop_figure(records)}


def _merge(records: Sequence[Record], name: str) -> Made:
    # Shares are of single models that were scored on the same rows.
    parts = grouped(records, ["eval_rows", "max_length"])
    tables, figures = [], {}
    for (rows, length), own in parts.items():
        part = name if len(parts) == 1 else f"{name}-{rows or 'all'}-rows-{length}-tokens"
        tables.append(merge_table(own, part))
        figures[part] = merge_figure(own)
    return tables, figures


def _lm_merge(records: Sequence[Record], name: str) -> Made:
    merged = any(record.config["method"] != "single" for record in records)
    figures = {name: lm_merge_figure(records)} if merged else {}
    return [lm_merge_table(records, name)], figures


def _fidelity(records: Sequence[Record], name: str) -> Made:
    kinds = ("error", "score")
    return (
        [fidelity_table(records, f"{name}-{kind}", kind) for kind in kinds],
        {f"{name}-{kind}": fidelity_figure(records, kind) for kind in kinds},
    )


def _delta(records: Sequence[Record], name: str) -> Made:
    return [delta_table(records, name)], {name: delta_figure(records)}


def _training(records: Sequence[Record], name: str) -> Made:
    return [training_table(records, name)], {}


def _generic(records: Sequence[Record], name: str) -> Made:
    return [generic_table(records, name)], {}


def _nothing(records: Sequence[Record], name: str) -> Made:
    return [], {}


REPORTS: dict[str, Callable[[Sequence[Record], str], Made]] = {
    "glue-train": _training,
    "glue-drop": _drop,
    "glue-merge": _merge,
    "glue-merge-choice": _nothing,  # what it chose is in glue-merge
    "glue-fidelity": _fidelity,
    "lm-drop": _drop,
    "lm-merge": _lm_merge,
    "delta-stats": _delta,
}
"""By experiment; any other has a table of its scores."""


def write_reports(records: Records, out: Path) -> list[Path]:
    """Write NAME.md, .tex and .csv of every table, NAME.png and .pdf of every figure.

    Records over several bases have files of their own for each.

    Raises:
        RecordError: there are no records, or one is damaged.
        DareError: matplotlib is not installed.
    """
    found: dict[tuple[str, str], list[Record]] = {}
    for record in in_task_order(records):
        found.setdefault((record.config["experiment"], _base(record)), []).append(record)
    if not found:
        raise RecordError(f"{records.directory} holds no records; run an experiment first")
    written = []
    for (experiment, base), own in found.items():
        alone = sum(name == experiment for name, _ in found) == 1
        tables, figures = REPORTS.get(experiment, _generic)(
            own, experiment if alone else f"{experiment}-{base}"
        )
        for table in tables:
            for ending, text in (
                ("md", table.markdown()),
                ("tex", table.latex()),
                ("csv", table.csv()),
            ):
                path = out / f"{table.name}.{ending}"
                _replace(path, partial(_write_text, text))
                written.append(path)
        for name, figure in figures.items():
            written += _draw(out, name, figure)
    return written


def _draw(out: Path, name: str, figure: Any) -> list[Path]:
    # Without a date, so that the same records give the same bytes.
    kinds: dict[str, dict[str, Any]] = {
        "png": {"dpi": 150, "metadata": {"Software": None}},
        "pdf": {"metadata": {"CreationDate": None}},
    }
    paths = []
    for kind, how in kinds.items():
        path = out / f"{name}.{kind}"
        _replace(path, partial(figure.savefig, format=kind, **how))
        paths.append(path)
    return paths


def _write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place, then put it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        write(beside)
        beside.replace(path)
    except ImportError as error:
        raise DareError("figures need matplotlib: pip install 'dare-adapters[eval]'") from error
    finally:
        beside.unlink(missing_ok=True)


def _base(record: Record) -> str:
    base = record.config.get("base")
    if isinstance(base, dict):
        return f"{base.get('name', 'base')}-{str(base.get('content', ''))[:6]}"
    return str(base).replace("/", "_") if base else "base"
