"""Error and score against bits for each parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dare_eval.records import Record
from dare_eval.report.axes import (
    REFERENCES,
    distinguishing,
    grouped,
    plain,
    spread_of,
    title_of,
)
from dare_eval.report.style import COLOURS, MARKERS, panels
from dare_eval.report.table import Table, Value

__all__ = ["fidelity_figure", "fidelity_table"]

_AXES = ("method", "bits", "drop_rate", "size")


def fidelity_table(records: Sequence[Record], name: str, result: str) -> Table:
    """A row for each way to store a delta, a column for each task.

    Args:
        name: of the table.
        result: "error" or "score".
    """
    tasks = [task for (task,) in grouped(records, ["task"])]
    stored = [record for record in records if record.config["method"] not in REFERENCES]
    rows: list[list[Value]] = []
    if result == "score":
        for kind in REFERENCES:
            own = {
                r.config["task"]: float(r.result["score"])
                for r in records
                if r.config["method"] == kind
            }
            if own:
                rows.append([REFERENCES[kind], None, None, *(own.get(task) for task in tasks)])
    distinct = distinguishing(stored, [*_AXES], without=["task"])
    more = distinct[len(_AXES) :]
    rows = [[*row[:3], *(None for _ in more), *row[3:]] for row in rows]
    lines = []
    for values, found in grouped(stored, distinct).items():
        size = spread_of(found, lambda record: float(record.result["bits_per_parameter"])).mean
        by_task = grouped(found, ["task"])
        cells: list[Value] = [
            spread_of(by_task[(task,)], lambda record: float(record.result[result]))
            if (task,) in by_task
            else None
            for task in tasks
        ]
        rate = None if values[2] is None else f"{values[2]:g}"
        others = map(plain, values[len(_AXES) :])
        lines.append((-size, [_name(found[0]), rate, size, *others, *cells]))
    lines.sort(key=lambda line: line[0])
    rows += [row for _, row in lines]
    what = (
        "Squared change of the logits over the squared change that fine-tuning made"
        if result == "error"
        else "Scores"
    )
    title = f"{what}, by the size of the stored delta; mean ± deviation over mask seeds."
    header = ["method", "p", "bits a parameter", *more, *map(title_of, tasks)]
    return Table(name, title, header, rows, digits=4 if result == "error" else 3)


def fidelity_figure(records: Sequence[Record], result: str) -> Any:
    """A panel for each task: error or score against size, a line for each number of bits."""
    tasks = [task for (task,) in grouped(records, ["task"])]
    stored = [record for record in records if record.config["method"] not in REFERENCES]
    names = sorted({_name(record) for record in stored}, key=_order)
    figure, axes = panels(len(tasks))
    for task, place in zip(tasks, axes, strict=True):
        own = [record for record in stored if record.config["task"] == task]
        for number, name in enumerate(names):
            line = [record for record in own if _name(record) == name]
            points = []
            keys = distinguishing(line, ["drop_rate", "size"])
            for found in grouped(line, keys).values():
                size = spread_of(found, lambda record: float(record.result["bits_per_parameter"]))
                points.append(
                    (size.mean, spread_of(found, lambda record: float(record.result[result])))
                )
            points.sort(key=lambda point: point[0])
            place.errorbar(
                [size for size, _ in points],
                [spread.mean for _, spread in points],
                yerr=[spread.deviation or 0 for _, spread in points],
                color=COLOURS[number % len(COLOURS)],
                marker=MARKERS[number % len(MARKERS)],
                markersize=4,
                linewidth=1.2,
                capsize=2,
                label=name,
            )
        if result == "score":
            _references(place, [r for r in records if r.config["task"] == task])
        else:
            place.set_yscale("log")
        place.set_xscale("log")
        place.set_title(title_of(task), fontsize=10)
        place.set_xlabel("bits for each parameter", fontsize=8)
    figure.supylabel(
        "error of the logits / fine-tuning's change" if result == "error" else "score", fontsize=9
    )
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    return figure


def _references(place: Any, records: Sequence[Record]) -> None:
    for kind, style in (("finetuned", "--"), ("base_encoder", ":")):
        for record in records:
            if record.config["method"] == kind:
                score, label = record.result["score"], REFERENCES[kind]
                place.axhline(score, color="#555555", linestyle=style, linewidth=1, label=label)


def _name(record: Record) -> str:
    method, bits = record.config["method"], record.config.get("bits")
    if method == "bitdelta":
        return "sign, one scale (BitDelta)"
    if method == "lora":
        return "low rank, 16 bit"
    return "plain DARE, 16 bit" if bits == 16 else f"DARE, {bits} bit"


def _order(name: str) -> tuple[bool, int, str]:
    digits = "".join(character for character in name if character.isdigit())
    return not name.startswith(("plain", "DARE")), -int(digits or 0), name
