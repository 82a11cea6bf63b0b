"""A table of numbers as Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Spread", "Table", "Value"]


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds.

    Attributes:
        deviation: None where there is one value.
    """

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one value or more."""
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), deviation, len(values))


Value = Spread | str | float | int | None


@dataclass(frozen=True)
class Table:
    """Rows under a header.

    Attributes:
        name: of its files.
        title: a sentence.
        header: names of the columns.
        rows: values; None is an empty cell.
        digits: of numbers, after the point (CSV has all).
    """

    name: str
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Value]]
    digits: int = 3

    def markdown(self) -> str:
        """With mean ± deviation in a cell."""
        cells = [[self._text(value, " ± ").replace("|", "\\|") for value in r] for r in self.rows]
        lines = [self.title, "", _line(self.header), _line(["---"] * len(self.header))]
        return "\n".join([*lines, *map(_line, cells)]) + "\n"

    def latex(self) -> str:
        """A `tabular` with rules of the package booktabs, its title as a comment."""
        numbers = "".join("l" if self._is_text(place) else "r" for place in range(len(self.header)))
        cells = [[_latex(self._text(value, " ± ")) for value in row] for row in self.rows]
        lines = [
            f"% {self.title}",
            rf"\begin{{tabular}}{{{numbers}}}",
            r"\toprule",
            " & ".join(map(_latex, self.header)) + r" \\",
            r"\midrule",
            *(" & ".join(row) + r" \\" for row in cells),
            r"\bottomrule",
            r"\end{tabular}",
        ]
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """With mean, deviation and number of seeds in columns of their own, in full precision."""
        spread = [
            any(isinstance(row[p], Spread) for row in self.rows) for p in range(len(self.header))
        ]
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        header = []
        for name, wide in zip(self.header, spread, strict=True):
            header += [name, f"{name} deviation", f"{name} seeds"] if wide else [name]
        writer.writerow(header)
        for row in self.rows:
            cells: list[object] = []
            for value, wide in zip(row, spread, strict=True):
                if isinstance(value, Spread):
                    cells += [value.mean, value.deviation, value.count]
                else:
                    cells += [value, None, None] if wide else [value]
            writer.writerow(cells)
        return out.getvalue()

    def _text(self, value: Value, sign: str) -> str:
        if value is None:
            return ""
        if isinstance(value, Spread):
            mean = self._text(value.mean, sign)
            return (
                mean if value.deviation is None else mean + sign + self._text(value.deviation, "")
            )
        if isinstance(value, float):
            small = value != 0 and abs(value) < 10**-self.digits
            return f"{value:.2g}" if small else f"{value:.{self.digits}f}"
        return str(value)

    def _is_text(self, place: int) -> bool:
        return any(isinstance(row[place], str) for row in self.rows)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _latex(text: str) -> str:
    escaped = re.sub(r"([&%$#_{}])", r"\\\1", text)
    return escaped.replace(" ± ", r" $\pm$ ").replace("…", r"\ldots{}")
