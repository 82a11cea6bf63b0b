"""How figures look: colours that colour-blind readers can tell apart, and never colour alone."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["COLOURS", "HATCHES", "MARKERS", "panels"]

# Paul Tol's bright scheme (https://personal.sron.nl/~pault/).
COLOURS = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#AA3377", "#66CCEE", "#BBBBBB")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "--")


def panels(count: int, width: float = 3.4, height: float = 2.7, columns: int = 3) -> Any:
    """A figure with `count` axes in a grid, and those axes."""
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = math.ceil(count / columns)
    size = (max(width * columns, 6.4), height * rows + 0.7)  # a legend takes its width
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for unused in axes[count:]:
        unused.set_axis_off()
    return figure, axes[:count]
