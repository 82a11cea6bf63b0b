"""What fine-tunes are worth: beside the commonest label and the base encoder under their heads."""

from __future__ import annotations

from collections.abc import Sequence

from dare_eval.records import Record
from dare_eval.report.axes import distinguishing, grouped, plain, setting, spread_of, title_of
from dare_eval.report.table import Table, Value

__all__ = ["training_table"]


def training_table(records: Sequence[Record], name: str) -> Table:
    """A row for each task."""
    # What follows from the task, or is shown in a column of its own, tells nothing apart.
    shown = ["tasks", "epochs", "batch_size", "learning_rate", "train_rows"]
    keys = distinguishing(records, ["task", "method"], without=shown)
    rows: list[list[Value]] = []
    for values, own in grouped(records, [*keys, *shown]).items():
        first = own[0]
        reduced = first.result["reduced"]
        rows.append(
            [
                title_of(first.config["task"]),
                *map(plain, values[1 : len(keys)]),
                first.result["metric"],
                float(first.result["majority"]["score"]),
                float(first.result["base_encoder"]["score"]),
                spread_of(own, lambda record: float(record.result["score"])),
                first.result["rows"],
                first.result["train_rows"],
                plain(setting(first, "epochs")),
                plain(setting(first, "learning_rate")),
                plain(setting(first, "batch_size")),
                ", ".join(sorted(reduced)),
                round(first.result["cpu_seconds"]),
            ]
        )
    header = [
        *keys,
        "metric",
        "commonest label",
        "base encoder, fine-tune's head",
        "fine-tune",
        "dev rows",
        "training rows",
        "epochs",
        "learning rate",
        "batch",
        "not as MergeLM",
        "seconds",
    ]
    title = "Fine-tunes. Seconds are of CPU time, all threads together."
    return Table(name, title, header, rows)
