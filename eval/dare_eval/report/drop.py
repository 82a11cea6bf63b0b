"""Scores against the drop rate: a table, and a panel for each task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dare_eval.records import Record
from dare_eval.report.axes import (
    REFERENCES,
    distinguishing,
    grouped,
    plain,
    setting,
    spread_of,
    title_of,
)
from dare_eval.report.style import COLOURS, MARKERS, panels
from dare_eval.report.table import Spread, Table, Value

__all__ = ["drop_figure", "drop_table"]

NAMES = {
    "dare": "DARE",
    "drop_only": "drop only",
    "magnitude": "magnitude",
    "masked_weights": "fine-tuned weights masked",
}


def drop_table(records: Sequence[Record], name: str) -> Table:
    """A row for each task and method, a column for each drop rate."""
    lines, references = _split(records)
    rates = sorted({setting(record, "drop_rate") for record in lines})
    keys = distinguishing(lines, ["task", "method"], without=["drop_rate"])
    shown = [kind for kind in REFERENCES if any(kind in of for of in references.values())]
    rows: list[list[Value]] = []
    for values, own in grouped(lines, keys).items():
        task = values[0]
        at = {rate: _score(found) for (rate,), found in grouped(own, ["drop_rate"]).items()}
        named = [title_of(task), NAMES.get(values[1], values[1]), *map(plain, values[2:])]
        reference = [references.get(task, {}).get(kind) for kind in shown]
        rows.append([*named, *reference, *(at.get(rate) for rate in rates)])
    header = [*keys, *(REFERENCES[kind] for kind in shown), *(f"p = {rate:g}" for rate in rates)]
    seeds = max(
        (value.count for row in rows for value in row if isinstance(value, Spread)), default=1
    )
    title = f"Score against the drop rate p; mean ± deviation over up to {seeds} mask seeds."
    return Table(name, title, header, rows)


def drop_figure(records: Sequence[Record]) -> Any:
    """Lines of the methods, bars of deviation, the references as grey lines."""
    lines, references = _split(records)
    tasks = list(grouped(lines, ["task"]))
    keys = distinguishing(lines, ["method"], without=["task", "drop_rate", "finetuned"])
    methods = list(grouped(lines, keys))
    figure, axes = panels(len(tasks))
    for (task,), place in zip(tasks, axes, strict=True):
        own = [record for record in lines if record.config["task"] == task]
        for number, (values, found) in enumerate((v, grouped(own, keys).get(v)) for v in methods):
            if not found:
                continue
            points = sorted(grouped(found, ["drop_rate"]).items())
            scores = [_score(at) for _, at in points]
            place.errorbar(
                [rate for (rate,), _ in points],
                [score.mean for score in scores],
                yerr=[score.deviation or 0 for score in scores],
                color=COLOURS[number % len(COLOURS)],
                marker=MARKERS[number % len(MARKERS)],
                markersize=4,
                linewidth=1.3,
                capsize=2,
                label=", ".join([NAMES.get(values[0], values[0]), *map(str, values[1:])]),
            )
        for kind, style in (("finetuned", "--"), ("base_encoder", ":"), ("base", ":")):
            if (score := references.get(task, {}).get(kind)) is not None:
                label = REFERENCES[kind]
                place.axhline(
                    score.mean, color="#555555", linestyle=style, linewidth=1, label=label
                )
        place.set_title(title_of(task), fontsize=10)
        place.set_xlabel("drop rate")
        place.set_ylabel(own[0].result.get("metric", "score"), fontsize=8)
    handles: dict[str, Any] = {}
    for place in axes:
        handles.update(zip(*place.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _split(records: Sequence[Record]) -> tuple[list[Record], dict[str, dict[str, Spread]]]:
    """Those with a drop rate; and of each task the references' scores."""
    lines = [record for record in records if record.config.get("drop_rate") is not None]
    references: dict[str, dict[str, Spread]] = {}
    for (task, method), own in grouped(records, ["task", "method"]).items():
        if method in REFERENCES:
            references.setdefault(task, {})[method] = _score(own)
    return lines, references


def _score(records: Sequence[Record]) -> Spread:
    return spread_of(records, lambda record: float(record.result["score"]))
