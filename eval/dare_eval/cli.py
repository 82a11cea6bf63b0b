"""The command line: `dare-eval glue …`, `dare-eval lm …`, `dare-eval report`.

Exit codes: 0 done; 1 the input is at fault (the message says how); 2 the call is (usage).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from dare_adapters.errors import DareError
from dare_eval.glue.cli import app as glue
from dare_eval.lm.cli import app as lm

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


@app.command(name="delta-stats")
def delta_stats(
    base: Annotated[str, typer.Argument(help="Base model: directory or hub id.")],
    finetuned: Annotated[list[str], typer.Argument(help="Full fine-tunes of it.")],
    records: Annotated[Path, typer.Option(help="Directory of records.")] = Path("records"),
) -> None:
    """Measure how far fine-tunes moved from their base, and whether DARE applies to them."""
    from dare_eval.delta_stats import run_delta_stats
    from dare_eval.records import Records

    run_delta_stats(base, finetuned, Records(records))


@app.command()
def report(
    records: Annotated[Path, typer.Argument(help="Directory of records.")],
    out: Annotated[Path, typer.Option(help="Where tables and figures go.")] = Path("report"),
) -> None:
    """Make tables (Markdown, LaTeX, CSV) and figures (PNG, PDF) of records."""
    from dare_eval.records import Records
    from dare_eval.report.write import write_reports

    for path in write_reports(Records(records), out):
        typer.echo(path)


app.add_typer(glue, name="glue")
app.add_typer(lm, name="lm", help="Decoder experiments.")


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
