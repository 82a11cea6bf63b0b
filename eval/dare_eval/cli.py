"""The command line: `dare-eval glue …`, `dare-eval lm …`, `dare-eval report`.

Exit codes: 0 done; 1 the input is at fault (the message says how); 2 the call is (usage).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys

import typer
from rich.console import Console
from rich.markup import escape

from dare_adapters.errors import DareError
from dare_eval.glue.cli import app as glue

__all__ = ["app", "main"]

app = typer.Typer(
    name="dare-eval",
    help="The experiments of the DARE paper (arXiv 2311.03099) on your own models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _root() -> None:
    """Every run writes a record for each cell, and goes on where it stopped."""


app.add_typer(glue, name="glue")
if importlib.util.find_spec("dare_eval.lm") is not None:
    app.add_typer(
        importlib.import_module("dare_eval.lm.cli").app, name="lm", help="Decoder experiments."
    )


def main() -> None:
    """Entry point of the console script: errors as one sentence on stderr, no traceback."""
    try:
        app()
    except (DareError, OSError) as error:
        text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
        Console(stderr=True).print(
            f"[red]{type(error).__name__}:[/] {escape(text)}", highlight=False, soft_wrap=True
        )
        sys.exit(1)
