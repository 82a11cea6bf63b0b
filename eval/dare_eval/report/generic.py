"""A table of an experiment that has no report of its own: every setting that varies, the score."""

from __future__ import annotations

from collections.abc import Sequence

from dare_eval.records import Record
from dare_eval.report.axes import distinguishing, grouped, plain, spread_of, title_of
from dare_eval.report.table import Table, Value

__all__ = ["generic_table"]


def generic_table(records: Sequence[Record], name: str) -> Table:
    """A row for each cell, seeds together."""
    first = [key for key in ("task", "tasks", "method") if any(key in r.config for r in records)]
    keys = distinguishing(records, first)
    rows: list[list[Value]] = []
    for values, own in grouped(records, keys).items():
        named = [
            title_of(v) if key == "task" else plain(v) for key, v in zip(keys, values, strict=True)
        ]
        score = spread_of(own, lambda record: float(record.result["score"]))
        rows.append([*named, own[0].result.get("metric"), score])
    return Table(name, f"{name}; ± deviation over seeds.", [*keys, "metric", "score"], rows)
