"""`dare-adapters combine` and `dare-adapters merge`."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.markup import escape
from rich.table import Table

__all__ = ["combine", "merge", "methods"]


class Mask(str, Enum):
    """How entries are dropped at random."""

    auto = "auto"
    blocked = "blocked"
    bernoulli = "bernoulli"


class Prune(str, Enum):
    """What is done to every delta before the method."""

    dare = "dare"
    drop_only = "drop_only"
    magnitude = "magnitude"


Seed = Annotated[int, typer.Option(min=0, help="Of random choices.")]
MaskOption = Annotated[Mask, typer.Option(help="How entries are dropped at random.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Threads (default: cores, at most 8).")]
Force = Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def combine(  # noqa: PLR0917 (typer reads options from the signature)
    paths: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER... OUT", help="DARE or LoRA adapters, and where to write."),
    ],
    weights: Annotated[
        list[float] | None,
        typer.Option("--weights", "-w", help="One for each: --weights 1.0 0.5 (default: 1)."),
    ] = None,
    combination_type: Annotated[
        str, typer.Option(help="linear, ties, dare_ties, …; see `methods`.")
    ] = "linear",
    density: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of entries each adapter keeps.")
    ] = None,
    majority_sign_method: Annotated[str | None, typer.Option(help="total or frequency.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", metavar="NAME=VALUE", help="Any option of the method."),
    ] = None,
    mix: Annotated[bool, typer.Option("--mix", help="Write only the recipe.")] = False,
    base: Annotated[
        str | None, typer.Option(help="For methods on whole parameters (default: as named).")
    ] = None,
    bits: Annotated[int | None, typer.Option(help="Of each entry (default: the finest's).")] = None,
    prune: Annotated[
        Prune | None, typer.Option(help="Done to every delta first, with --drop-rate.")
    ] = None,
    drop_rate: Annotated[float | None, typer.Option(help="Of --prune.")] = None,
    seed: Seed = 0,
    mask: MaskOption = Mask.auto,
    workers: Workers = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Make one adapter of several over the same base.

    dare-adapters combine math chat --weights 1.0 0.5 --combination-type ties --density 0.2 mixed
    """
    # cli imports this module to register the commands.
    from dare_adapters.cli import _plain_errors, _print_json, _say
    from dare_adapters.combine.api import combine as combine_adapters

    if weights:  # those after the first look like arguments to the parser
        weights += [float(item) for item in paths if _is_weight(item)]
        paths = [item for item in paths if not _is_weight(item)]
    unknown = [item for item in paths if item.startswith("-")]
    if unknown:
        raise typer.BadParameter(f"no such option: {unknown[0]}")
    if len(paths) < 2:
        raise typer.BadParameter("at least one adapter and OUT are needed")
    *adapters, out = paths
    options = _options(option or [])
    if density is not None:
        options["density"] = density
    if majority_sign_method is not None:
        options["majority_sign_method"] = majority_sign_method
    with _plain_errors(as_json):
        made = combine_adapters(
            adapters,
            out,
            weights,
            combination_type=combination_type,
            as_mix=mix,
            base=base,
            bits=bits,
            seed=seed,
            mask=mask.value,
            prune=None if prune is None else prune.value,
            drop_rate=drop_rate,
            workers=workers,
            overwrite=force,
            progress=not as_json and sys.stderr.isatty(),
            **options,
        )
    size = sum(file.stat().st_size for file in made.path.iterdir() if file.is_file())
    if as_json:
        _print_json({"adapter": out, "bytes": size, "parameters": len(made), "mix": mix})
    else:
        kind = "a mix of" if mix else f"{size / 1e6:.2f} MB,"
        _say(f"[bold]{escape(out)}[/]: {kind} {len(made)} parameters")


def methods(as_json: Json = False) -> None:
    """List the combination types and their options."""
    from inspect import Parameter, getdoc

    from dare_adapters.cli import _print_json, out
    from dare_adapters.combine import get_method, method_names

    found = {name: get_method(name) for name in method_names()}
    if as_json:
        _print_json({name: list(method.options) for name, method in found.items()})
        return
    table = Table("combination type", "options", "what it is")
    for name, method in found.items():
        options = [
            key if default is Parameter.empty else f"{key}={default}"
            for key, default in method.options.items()
        ]
        summary = (getdoc(method.function) or "").split("\n\n")[0].replace("\n", " ")
        table.add_row(name, escape(", ".join(options)), escape(summary))
    out.print(table)


def merge(
    recipe: Annotated[Path, typer.Argument(help="Merge recipe in mergekit's grammar (YAML).")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write.")],
    as_adapter: Annotated[
        bool, typer.Option("--as-adapter", help="Write an adapter over base_model.")
    ] = False,
    bits: Annotated[int, typer.Option(help="Of each entry of an adapter.")] = 4,
    shard_size: Annotated[
        float, typer.Option(min=0.001, help="Of the checkpoint's files, in GB.")
    ] = 5.0,
    seed: Seed = 0,
    mask: MaskOption = Mask.auto,
    workers: Workers = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Run a merge recipe; a model in it may be an adapter's directory."""
    from dare_adapters.cli import _plain_errors, _print_json, _say
    from dare_adapters.merging.api import merge as run_recipe

    with _plain_errors(as_json):
        run_recipe(
            recipe,
            out,
            as_adapter=as_adapter,
            bits=bits,
            seed=seed,
            mask=mask.value,
            max_shard_bytes=int(shard_size * 1e9),
            workers=workers,
            overwrite=force,
            progress=not as_json and sys.stderr.isatty(),
        )
    kind = "adapter" if as_adapter else "checkpoint"
    if as_json:
        _print_json({kind: str(out)})
    else:
        _say(f"[bold]{escape(str(out))}[/]: the merged {kind}")


def _is_weight(item: str) -> bool:
    try:
        float(item)
    except ValueError:
        return False
    return not Path(item).exists()


def _options(items: list[str]) -> dict[str, Any]:
    """NAME=VALUE, the value read as YAML: numbers, true, false, [lists], text."""
    found = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"{item!r} is not NAME=VALUE", param_hint="--option")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise typer.BadParameter(f"{item!r}: {error}", param_hint="--option") from error
        found["lambda_" if name == "lambda" else name] = value
    return found
