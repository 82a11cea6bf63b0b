"""The command line: extract, inspect, verify, export, combine, merge, stats, serve.

Exit codes: 0 done; 1 the input is at fault (the message says how); 2 the call is (usage).
"""

from __future__ import annotations

import gc
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from dare_adapters._version import __version__
from dare_adapters.adapter import Adapter
from dare_adapters.checkpoint import open_checkpoint
from dare_adapters.cli_combine import combine, merge, methods
from dare_adapters.cli_serve import serve
from dare_adapters.cli_stats import stats
from dare_adapters.errors import DareError, DareWarning
from dare_adapters.export import check_base_checkpoint
from dare_adapters.export import export as export_checkpoint
from dare_adapters.extract import extract as extract_adapter
from dare_adapters.inspection import Inspection, inspect_adapter, plot_histogram

__all__ = ["app", "main"]

app = typer.Typer(
    name="dare-adapters",
    help="Full fine-tunes as compact adapters over a shared base (DARE, arXiv 2311.03099).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out, err = Console(), Console(stderr=True)


class Method(str, Enum):
    """How a delta is pruned."""

    dare = "dare"
    drop_only = "drop_only"
    magnitude = "magnitude"


class Mask(str, Enum):
    """Which random mask is drawn."""

    auto = "auto"
    blocked = "blocked"
    bernoulli = "bernoulli"


class OnLargeDelta(str, Enum):
    """What to do about a delta that DARE is not known to survive."""

    warn = "warn"
    error = "error"
    ignore = "ignore"


Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Force = Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Threads (default: cores, at most 8).")]
Revision = Annotated[str | None, typer.Option(help="Hub revision of the base.")]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        out.print(__version__)
        raise typer.Exit


@app.command()
def extract(  # noqa: PLR0917 (typer reads options from the signature)
    base: Annotated[str, typer.Argument(help="Base model: directory or hub id.")],
    finetuned: Annotated[str, typer.Argument(help="Its full fine-tune: directory or hub id.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Adapter directory to write.")],
    drop_rate: Annotated[float, typer.Option(help="Share of the delta that is dropped.")] = 0.9,
    bits: Annotated[int, typer.Option(help="Bits a survivor: 32, 16, 8, 4, 2, 1.")] = 4,
    method: Annotated[Method, typer.Option(help="How to prune.")] = Method.dare,
    mask: Annotated[Mask, typer.Option(help="Which random mask.")] = Mask.auto,
    rescale: Annotated[bool, typer.Option(help="Survivors times 1/(1-p).")] = True,
    seed: Annotated[int | None, typer.Option(help="Default: from the fine-tune itself.")] = None,
    include: Annotated[list[str] | None, typer.Option(help="Prune only these (globs).")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Keep these whole (globs).")] = None,
    drop_rate_for: Annotated[
        list[str] | None, typer.Option(metavar="GLOB=P", help="Another drop rate for these.")
    ] = None,
    ignore_missing: Annotated[
        list[str] | None, typer.Option(help="Base parameters the fine-tune may lack (globs).")
    ] = None,
    on_large_delta: Annotated[OnLargeDelta, typer.Option()] = OnLargeDelta.warn,
    revision: Revision = None,
    finetuned_revision: Annotated[str | None, typer.Option()] = None,
    workers: Workers = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1 …")] = "cpu",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Turn a full fine-tune into an adapter over its base."""
    rates = _drop_rates(drop_rate_for or [])
    _check_device(device)
    with _plain_errors(as_json):
        adapter = extract_adapter(
            base,
            finetuned,
            output,
            drop_rate=drop_rate,
            bits=bits,
            method=method.value,
            mask=mask.value,
            rescale=rescale,
            seed=seed,
            include=include or ("*",),
            exclude=exclude or (),
            drop_rates=rates,
            ignore_missing=ignore_missing or (),
            on_large_delta=on_large_delta.value,
            revision=revision,
            finetuned_revision=finetuned_revision,
            workers=workers,
            device=device,
            overwrite=force,
            progress=not as_json and sys.stderr.isatty(),
        )
        full = open_checkpoint(finetuned, finetuned_revision).nbytes
        result = {
            "adapter": str(output),
            "bytes": adapter.nbytes,
            "finetuned_bytes": full,
            "times_smaller": full / adapter.nbytes,
            "seed": adapter.config.seed,
        }
    if as_json:
        _print_json(result)
    else:
        _say(
            f"[bold]{escape(str(output))}[/]: {adapter.nbytes / 1e6:.2f} MB, "
            f"{full / adapter.nbytes:.1f} times smaller than {full / 1e6:.1f} MB"
        )


@app.command()
def inspect(
    adapter: Annotated[str, typer.Argument(help="Adapter: directory or hub id.")],
    plot: Annotated[Path | None, typer.Option(help="Write the histogram as a picture.")] = None,
    as_json: Json = False,
) -> None:
    """Show what an adapter holds: config, sizes, errors by group, a histogram of |delta|."""
    with _plain_errors(as_json):
        inspection = inspect_adapter(Adapter.from_pretrained(adapter))
        if plot is not None:
            plot_histogram(inspection, plot, adapter)
    if as_json:
        _print_json(inspection.to_json())
    else:
        _show(inspection)


@app.command()
def verify(
    adapter: Annotated[str, typer.Argument(help="Adapter: directory or hub id.")],
    base: Annotated[str | None, typer.Option(help="Compare it with this base too.")] = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Check an adapter: digest, every shape, every number; with --base, that it fits a base."""
    with _plain_errors(as_json):
        opened = Adapter.from_pretrained(adapter)
        for _, delta in opened.deltas():
            for start, stop in delta.row_ranges():
                delta.read(start, stop)
        if base is not None:
            check_base_checkpoint(open_checkpoint(base, revision), opened)
    result = {"adapter": adapter, "valid": True, "parameters": len(opened), "base": base}
    if as_json:
        _print_json(result)
    else:
        fits = f", and {base} is its base" if base else ""
        _say(escape(f"{adapter}: sound, {len(opened)} parameters{fits}"))


@app.command()
def export(
    base: Annotated[str, typer.Argument(help="Base model: directory or hub id.")],
    adapter: Annotated[str, typer.Argument(help="Adapter: directory or hub id.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Checkpoint to write.")],
    weight: Annotated[float, typer.Option(help="Factor of the delta.")] = 1.0,
    check_base: Annotated[bool, typer.Option(help="Refuse another base.")] = True,
    revision: Revision = None,
    workers: Workers = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write the full checkpoint that a base and an adapter make."""
    with _plain_errors(as_json):
        export_checkpoint(
            base,
            adapter,
            output,
            weight=weight,
            check_base=check_base,
            revision=revision,
            workers=workers,
            overwrite=force,
            progress=not as_json and sys.stderr.isatty(),
        )
    if as_json:
        _print_json({"checkpoint": str(output)})
    else:
        _say(f"[bold]{escape(str(output))}[/]: written; AutoModel….from_pretrained loads it")


# So that a negative weight is no option.
app.command(context_settings={"ignore_unknown_options": True})(combine)
app.command()(merge)
app.command()(methods)
app.command()(stats)
app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "allow_interspersed_args": False,
    }
)(serve)


def _drop_rates(items: list[str]) -> dict[str, float]:
    rates = {}
    for item in items:
        pattern, _, rate = item.rpartition("=")
        try:
            rates[pattern] = float(rate)
        except ValueError:
            pattern = ""
        if not pattern:
            raise typer.BadParameter(f"{item!r} is not GLOB=P", param_hint="--drop-rate-for")
    return rates


def _check_device(device: str) -> None:
    """Refuse a device that this machine or this build of torch does not have."""
    try:
        usable = torch.zeros(1, device=device).device.type != "meta"
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise typer.BadParameter(f"{device!r}: {reason}", param_hint="--device") from error
    if not usable:
        raise typer.BadParameter("'meta' computes nothing", param_hint="--device")


@contextmanager
def _plain_errors(as_json: bool) -> Iterator[None]:
    """Errors and warnings as sentences on stderr, and exit code 1, never a traceback."""
    plain = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, DareWarning):
            _complain("[yellow]warning:[/]", message)
        else:
            plain(message, category, *place, **more)

    with warnings.catch_warnings():
        warnings.simplefilter("always", DareWarning)
        warnings.showwarning = show
        try:
            yield
        except (DareError, ValueError, OSError) as error:
            if as_json:
                _print_json({"error": type(error).__name__, "message": str(error)})
            else:
                _complain(f"[red]{type(error).__name__}:[/]", error)
            # A plain ValueError speaks of an option, everything else of what it was given.
            usage = isinstance(error, ValueError) and not isinstance(error, DareError)
            raise typer.Exit(2 if usage else 1) from None


def _say(line: str) -> None:
    """One line, however long: a path that is broken over two cannot be copied."""
    out.print(line, soft_wrap=True)


def _complain(kind: str, message: object) -> None:
    """One line on stderr, also of messages of other libraries that have several."""
    lines = (line.strip() for line in str(message).splitlines())
    text = escape(" ".join(line for line in lines if line))
    err.print(f"{kind} {text}", highlight=False, soft_wrap=True)


def _print_json(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value, indent=1) + "\n")


def _show(inspection: Inspection) -> None:
    table = Table("field", "value", title="config")
    for key, value in inspection.summary.items():
        if value not in (None, [], ""):
            table.add_row(key, escape(str(value)))
    out.print(table)
    table = Table("part", "bytes", title="sizes")
    for key, size in inspection.bytes_by_part.items():
        table.add_row(key, f"{size:,}")
    for kind, count in inspection.kinds.items():
        table.add_row(f"parameters: {kind}", str(count))
    table.add_row("bits for each pruned entry", f"{inspection.bits_per_pruned_parameter:.3f}")
    out.print(table)
    table = Table(
        Column("parameters", overflow="fold"),
        "entries",
        "rms of delta",
        "drop error",
        "rounding error",
        title="squared error over squared delta",
    )
    for name, group in inspection.groups.items():
        table.add_row(
            escape(name),
            _number(group, "entries", ",.0f"),
            _number(group, "delta_rms", ".3g"),
            _number(group, "drop_error", ".3g"),
            _number(group, "rounding_error", ".3g"),
        )
    out.print(table)
    _show_histogram(inspection)


def _number(group: Any, key: str, style: str) -> str:
    """A measurement, as far as the config has it: these fields are anyone's to edit."""
    value = group.get(key) if isinstance(group, dict) else None
    return format(value, style) if isinstance(value, (int, float)) else "?"


def _show_histogram(inspection: Inspection) -> None:
    table = Table("|delta| up to", "share", "", title="histogram of |delta|, of what was kept")
    total, largest = sum(inspection.counts), max([*inspection.counts, 1])
    filled = [number for number, count in enumerate(inspection.counts) if count]
    for number in range(min(filled, default=0), max(filled, default=-1) + 1):
        count = inspection.counts[number]
        bar = "█" * round(40 * count / largest)
        table.add_row(f"{inspection.edges[number + 1]:.2g}", f"{count / max(total, 1):.2%}", bar)
    out.print(table)


def main() -> None:
    """Entry point of the console script."""
    gc.freeze()  # what was imported stays: let no collection look through it again
    app()
