"""Merged decoders: every task's score by method, without and with DARE, beside each model alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dare_eval.records import Record
from dare_eval.report.axes import distinguishing, grouped, plain, spread_of
from dare_eval.report.merge import NAMES
from dare_eval.report.style import COLOURS, HATCHES, panels
from dare_eval.report.table import Table, Value

__all__ = ["lm_merge_figure", "lm_merge_table"]

_SHOWN = ("models", "method", "drop_rate")


def lm_merge_table(records: Sequence[Record], name: str) -> Table:
    """A row for each set of models and way to merge them, a column for each task."""
    records = _in_order(records)
    tasks = sorted({record.config["task"] for record in records})
    keys = distinguishing(records, _SHOWN, without=("task", "dare"))
    rows: list[list[Value]] = []
    for values, own in grouped(records, keys).items():
        config = own[0].config
        others = [plain(value) for value in values[len(_SHOWN) :]]
        scores: list[Value] = []
        for task in tasks:
            found = [record for record in own if record.config["task"] == task]
            scores.append(spread_of(found, _score) if found else None)
        rows.append([_models(own[0]), _method(own[0]), _dare(config), *others, *scores])
    header = ["models", "method", "DARE", *keys[len(_SHOWN) :], *tasks]
    return Table(name, "Scores of merged decoders; ± deviation over mask seeds.", header, rows)


def lm_merge_figure(records: Sequence[Record]) -> Any:
    """A panel for each set of models and task: bars of every method, without and with DARE."""
    records = _in_order(records)
    merges = [record for record in records if record.config["method"] != "single"]
    groups = grouped(merges, ["models", "task"])
    rates = sorted({float(record.config["drop_rate"]) for record in merges})
    figure, axes = panels(len(groups), width=3.6, height=2.4)
    width = 0.8 / max(len(rates), 1)
    for found, place in zip(groups.values(), axes, strict=True):
        methods = list(dict.fromkeys(record.config["method"] for record in found))
        for number, rate in enumerate(rates):
            own = [record for record in found if record.config["drop_rate"] == rate]
            bars = {
                key: spread_of(same, _score) for (key,), same in grouped(own, ["method"]).items()
            }
            place.bar(
                [
                    methods.index(method) + (number - (len(rates) - 1) / 2) * width
                    for method in bars
                ],
                [spread.mean for spread in bars.values()],
                width * 0.95,
                yerr=[spread.deviation or 0 for spread in bars.values()],
                label=f"DARE, p = {rate:g}" if rate else "without DARE",
                color=COLOURS[number % len(COLOURS)],
                hatch=HATCHES[number % len(HATCHES)],
                edgecolor="white",
                error_kw={"linewidth": 1},
            )
        names = {model["name"] for model in found[0].config["models"]}
        task = found[0].config["task"]
        for record in records:
            config = record.config
            if config["method"] != "single" or config["task"] != task:
                continue
            if config["models"][0]["name"] in names:
                place.axhline(_score(record), color="#555555", linestyle="--", linewidth=1)
        labels = [NAMES.get(method, method) for method in methods]
        place.set_xticks(range(len(methods)), labels, rotation=25, fontsize=7)
        place.set_title(f"{_models(found[0])}: {task}", fontsize=9)
        place.set_ylim(bottom=0)
    figure.supylabel("score (dashed: single models)", fontsize=9)
    if axes:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    return figure


def _in_order(records: Sequence[Record]) -> list[Record]:
    """Single models first, then few models before many."""
    return sorted(
        records,
        key=lambda r: (
            len(r.config["models"]),
            _models(r),
            _method(r),
            r.config.get("drop_rate", 0),
        ),
    )


def _score(record: Record) -> float:
    return float(record.result["score"])


def _models(record: Record) -> str:
    return " + ".join(model["name"] for model in record.config["models"])


def _method(record: Record) -> str:
    method = str(record.config["method"])
    return "single model" if method == "single" else NAMES.get(method, method)


def _dare(config: Any) -> str:
    rate = config.get("drop_rate")
    return "" if rate is None else f"p = {rate:g}" if rate else "no"
