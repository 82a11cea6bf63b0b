"""Merges: each task's score, and all of them as a part of the single models'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from dare_eval.report.style import COLOURS, panels
from dare_eval.report.table import Spread, Table, Value

__all__ = ["merge_figure", "merge_table", "share"]

NAMES = {
    "average": "average",
    "task_arithmetic": "task arithmetic",
    "fisher": "Fisher",
    "regmean": "RegMean",
    "ties": "TIES",
    "breadcrumbs": "Breadcrumbs",
    "breadcrumbs_ties": "Breadcrumbs TIES",
    "magnitude_prune": "magnitude",
    "della": "DELLA",
    "della_linear": "MAGPRUNE",
    "sce": "SCE",
    "slerp": "SLERP",
    "nuslerp": "NuSLERP",
    "karcher": "Karcher",
    "model_stock": "Model Stock",
    "widen": "WIDEN",
}
_CROWDED = 8


def merge_table(records: Sequence[Record], name: str) -> Table:
    """A row for each set of tasks, method, with or without DARE; the single models above them.

    Args:
        records: that were all scored on the same rows.
        name: of the table.
    """
    merges, singles = _split(records)
    tasks = list(dict.fromkeys(task for record in records for task in record.config["tasks"]))
    keys = distinguishing(merges, ["tasks", "method", "dare"])
    more = keys[3:]
    rows: list[list[Value]] = []
    for kind in singles:
        own: list[Value] = [singles[kind].get(task) for task in tasks]
        called = f"{REFERENCES[kind]}s" if kind == "finetuned" else REFERENCES[kind]
        rows.append(["", called, "", *(None for _ in more), *own, None])
    for (_, method, dare, *others), found in grouped(merges, keys).items():
        group = found[0].config["tasks"]
        scores: list[Value] = [_task_score(found, task) for task in tasks]
        shares = spread_of(found, lambda record: share(record, singles["finetuned"]))
        rate = setting(found[0], "options") and found[0].config["options"].get("drop_rate")
        names = " + ".join(map(title_of, group))
        with_dare = f"p = {rate:g}" if dare else "no"
        named = [names, NAMES.get(method, method), with_dare, *map(plain, others)]
        rows.append([*named, *scores, shares])
    header = ["merged", "method", "DARE", *more, *map(title_of, tasks), "share"]
    title = (
        "Scores of merged encoders under each task's own head; share is the mean of the scores, "
        "each as a part of the single model's; ± deviation over mask seeds."
    )
    return Table(name, title, header, rows)


def merge_figure(records: Sequence[Record]) -> Any:
    """A panel for each set of tasks: bars of every method's share, without and with DARE."""
    merges, singles = _split(records)
    groups = grouped(merges, ["tasks"])
    figure, axes = panels(len(groups), width=3.6, height=2.4)
    kinds = {False: ("without DARE", COLOURS[0], ""), True: ("with DARE", COLOURS[1], "//")}
    for found, place in zip(groups.values(), axes, strict=True):
        group = found[0].config["tasks"]
        methods = [method for (method,) in grouped(found, ["method"])]
        for dare, (label, colour, hatch) in kinds.items():
            bars = {
                method: spread_of(own, lambda record: share(record, singles["finetuned"]))
                for (method, kind), own in grouped(found, ["method", "dare"]).items()
                if kind == dare
            }
            place.bar(
                [methods.index(method) + (0.2 if dare else -0.2) for method in bars],
                [spread.mean for spread in bars.values()],
                0.38,
                yerr=[spread.deviation or 0 for spread in bars.values()],
                label=label,
                color=colour,
                hatch=hatch,
                edgecolor="white",
                error_kw={"linewidth": 1},
            )
        of_base = {task: singles["base_encoder"][task] for task in group}
        place.axhline(1, color="#555555", linestyle="--", linewidth=1, label="single models")
        base = _mean_share(of_base, singles["finetuned"])
        place.axhline(base, color="#555555", linestyle=":", linewidth=1, label="base encoder")
        labels = [NAMES.get(method, method) for method in methods]
        turn = 25 if len(methods) < _CROWDED else 90
        place.set_xticks(range(len(methods)), labels, rotation=turn, fontsize=7)
        place.set_title(" + ".join(map(title_of, group)), fontsize=9)
        place.set_ylim(min(0.0, base), 1.15)
    figure.supylabel("score / single model's", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    return figure


def _task_score(records: Sequence[Record], task: str) -> Spread | None:
    if task not in records[0].config["tasks"]:
        return None
    return spread_of(records, lambda record: float(record.result["scores"][task]))


def share(record: Record, singles: Mapping[str, float]) -> float:
    """Mean of a merge's scores, each as a part of the single model's."""
    return _mean_share(record.result["scores"], singles)


def _mean_share(scores: Mapping[str, float], singles: Mapping[str, float]) -> float:
    from dare_eval.glue.merge import mean_share

    return mean_share(scores, singles)


def _split(records: Sequence[Record]) -> tuple[list[Record], dict[str, dict[str, float]]]:
    """Merges in order; and of the fine-tunes and the base encoder each task's score."""
    merges = [record for record in records if record.config["method"] not in REFERENCES]
    order = list(NAMES)
    merges.sort(
        key=lambda r: (
            len(r.config["tasks"]),
            setting(r, "tasks"),
            order.index(r.config["method"]) if r.config["method"] in order else len(order),
            r.config["dare"],
        )
    )
    singles: dict[str, dict[str, float]] = {}
    for record in records:
        if record.config["method"] in REFERENCES:
            own = singles.setdefault(record.config["method"], {})
            own[record.config["task"]] = float(record.result["score"])
    return merges, dict(sorted(singles.items(), reverse=True))
