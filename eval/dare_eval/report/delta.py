"""Ranges of deltas (the paper's figure 9)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dare_adapters.difference import PAPER_FAILS, PAPER_SAFE
from dare_eval.delta_stats import QUANTILES
from dare_eval.records import Record
from dare_eval.report.style import COLOURS
from dare_eval.report.table import Table, Value

__all__ = ["delta_figure", "delta_table"]


def delta_table(records: Sequence[Record], name: str) -> Table:
    """A row for each fine-tune."""
    rows: list[list[Value]] = []
    for record in records:
        found = record.result
        rows.append(
            [
                record.config["finetuned"]["name"],
                found["entries"],
                f"{found['changed']:.1%}",
                f"{found['rms']:.2g}",
                *(f"{value:.2g}" for value in found["magnitudes"][1:]),
                *(f"{found['within'][str(bound)]:.2%}" for bound in (PAPER_SAFE, PAPER_FAILS)),
                found["verdict"],
            ]
        )
    quantiles = ["largest" if q == 1 else f"{100 * q:g} %" for q in QUANTILES[1:]]
    within = [f"within {bound:g}" for bound in (PAPER_SAFE, PAPER_FAILS)]
    header = ["fine-tune", "entries", "changed", "rms", *quantiles, *within, "DARE"]
    return Table(name, "Quantiles of |fine-tune - base|, and whether DARE applies.", header, rows)


def delta_figure(records: Sequence[Record]) -> Any:
    """Of each fine-tune a line from 1 % of |delta| to the largest, a bar from 10 % to 90 %."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.4 + 0.35 * len(records)), layout="constrained")
    axes = figure.subplots()
    for place, record in enumerate(records):
        at = dict(zip(QUANTILES, record.result["magnitudes"], strict=True))
        floor = max(at[0.01], 1e-9)  # a logarithmic axis has no zero
        axes.plot([floor, max(at[1.0], floor)], [place, place], color=COLOURS[0], linewidth=1)
        bar = [max(at[0.1], floor), max(at[0.9], floor)]
        axes.plot(bar, [place, place], color=COLOURS[0], linewidth=6, solid_capstyle="butt")
        axes.plot([max(at[0.5], floor)], [place], marker="|", color="white", markersize=7)
    for bound, style in ((PAPER_SAFE, "--"), (PAPER_FAILS, ":")):
        axes.axvline(bound, color=COLOURS[1], linestyle=style, linewidth=1.2)
    axes.set_yticks(range(len(records)), [record.config["finetuned"]["name"] for record in records])
    axes.set_ylim(len(records) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.set_xlabel(
        "|fine-tune − base|: 1 % … largest, bar 10 % … 90 %, tick median; "
        f"DARE holds to {PAPER_SAFE} (- -), fails at {PAPER_FAILS} (···)",
        fontsize=7,
    )
    return figure
