"""Records by the settings that tell them apart; those that differ in the seed alone are one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dare_eval.records import Record
from dare_eval.report.table import Spread, Value

__all__ = [
    "REFERENCES",
    "distinguishing",
    "grouped",
    "in_task_order",
    "plain",
    "setting",
    "spread_of",
    "title_of",
]

REFERENCES = {"finetuned": "fine-tune", "base_encoder": "base encoder", "base": "base"}
"""Methods that are no method: what others are compared with."""

_NO_AXES = ("experiment", "seed")


def setting(record: Record, key: str) -> Any:
    """A setting in a form that can be compared and shown; models by their names, tasks joined."""
    value = record.config.get(key)
    if isinstance(value, dict) and "content" in value:
        return f"{value.get('name', '')} {value['content']}"
    if key == "tasks" and isinstance(value, list):
        return " + ".join(map(str, value))
    if isinstance(value, (dict, list)):
        return json.dumps(value, sort_keys=True)
    return value


def plain(value: Any) -> Value:
    """A setting as a table shows it."""
    if value is None or (isinstance(value, (str, int)) and not isinstance(value, bool)):
        return value
    return f"{value:g}" if isinstance(value, float) else str(value)


def distinguishing(
    records: Sequence[Record], leading: Sequence[str], without: Sequence[str] = ()
) -> list[str]:
    """The settings that it takes to tell records apart, but for their seeds.

    Args:
        records: of one experiment.
        leading: settings that come first and are always shown.
        without: settings that other columns show.
    """
    chosen = list(leading)
    others = {key for record in records for key in record.config} - {*chosen, *_NO_AXES, *without}
    count = len(grouped(records, [*chosen, *without]))
    for key in sorted(others):
        finer = len(grouped(records, [*chosen, *without, key]))
        if finer > count:
            chosen.append(key)
            count = finer
    return chosen


def grouped(records: Sequence[Record], keys: Sequence[str]) -> dict[tuple[Any, ...], list[Record]]:
    """Records by some settings, in the order of the records."""
    found: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        found.setdefault(tuple(setting(record, key) for key in keys), []).append(record)
    return found


def spread_of(records: Sequence[Record], value: Callable[[Record], float]) -> Spread:
    """Mean and deviation over the seeds of one group."""
    return Spread.of([value(record) for record in records])


def in_task_order(records: Iterable[Record]) -> list[Record]:
    """Records with GLUE's tasks in the order of the paper, other tasks by name."""
    from dare_eval.glue.tasks import TASKS

    order = {name: f"{place}" for place, name in enumerate(TASKS)}

    def place(record: Record) -> str:
        task = str(record.config.get("task", ""))
        return order.get(task, task)

    return sorted(records, key=place)


def title_of(task: str) -> str:
    """A task as papers write it."""
    from dare_eval.glue.tasks import TASKS

    return TASKS[task].title if task in TASKS else task
