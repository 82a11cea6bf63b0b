"""`dare-adapters stats`: statistics of an adapter's own data, for methods that merge by them."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.markup import escape

__all__ = ["stats"]


class Kind(str, Enum):
    """Which statistics."""

    fisher = "fisher"
    gram = "gram"


class FisherEstimate(str, Enum):
    """How Fisher information is estimated."""

    auto = "auto"
    mergelm = "mergelm"
    exact = "exact"
    sampled = "sampled"
    labels = "labels"


class Dtype(str, Enum):
    """A float type."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def stats(  # noqa: PLR0917 (typer reads options from the signature)
    base: Annotated[str, typer.Argument(help="Base model: directory or hub id.")],
    adapter: Annotated[str, typer.Argument(help="Adapter: directory or hub id.")],
    data: Annotated[
        str, typer.Option(help="Data set: hub id, file, or directory (JSON lines, CSV, Parquet …).")
    ],
    config: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of the data set, such as sst2 of glue.")
    ] = None,
    split: Annotated[str, typer.Option(help="Of the data set.")] = "train",
    text_column: Annotated[str, typer.Option(help="Its column of texts.")] = "text",
    second_text_column: Annotated[
        str | None, typer.Option(help="Its column of second texts of pairs.")
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(help="For regression and --estimate labels (default: label).")
    ] = None,
    kind: Annotated[
        Kind, typer.Option(help="fisher (a number an entry) or gram (inputs x inputs a layer).")
    ] = Kind.fisher,
    examples: Annotated[int, typer.Option(min=1, help="How many, drawn at random.")] = 1000,
    batch_size: Annotated[
        int, typer.Option(min=1, help="MergeLM's Fisher information depends on it.")
    ] = 16,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens; longer texts are cut.")] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of examples.")] = 0,
    estimate: Annotated[
        FisherEstimate,
        typer.Option(help="auto: mergelm, of language models sampled."),
    ] = FisherEstimate.auto,
    mask_padding: Annotated[
        bool, typer.Option("--mask-padding", help="Leave padding out of Gram matrices.")
    ] = False,
    include: Annotated[list[str] | None, typer.Option(help="Only these (globs).")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Not these (globs).")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of stored Fisher information.")] = Dtype.float32,
    model_dtype: Annotated[
        Dtype, typer.Option(help="In which the base is loaded.")
    ] = Dtype.float32,
    revision: Annotated[str | None, typer.Option(help="Hub revision of the base.")] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1 …")] = "cpu",
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to write (default: ADAPTER).")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Measure what an adapter's own data says of its weights, for merging by fisher or regmean.

    Writes fisher.safetensors (the size of the model in --dtype) or gram.safetensors (4 bytes x
    inputs x inputs for each linear layer) into the adapter.
    """
    # cli imports this module to register the command.
    from dare_adapters.cli import _check_device, _plain_errors, _print_json, _say
    from dare_adapters.statistics import compute_statistics

    _check_device(device)
    with _plain_errors(as_json):
        file = compute_statistics(
            base,
            adapter,
            data,
            kind.value,
            config=config,
            split=split,
            text_column=text_column,
            second_text_column=second_text_column,
            label_column=label_column,
            examples=examples,
            batch_size=batch_size,
            max_length=max_length,
            seed=seed,
            estimate=estimate.value,
            mask_padding=mask_padding,
            include=include or ("*",),
            exclude=exclude or (),
            dtype=getattr(torch, dtype.value),
            model_dtype=getattr(torch, model_dtype.value),
            device=device,
            out=out,
            overwrite=force,
            revision=revision,
            progress=not as_json and sys.stderr.isatty(),
        )
    if as_json:
        _print_json(
            {
                "file": str(file.path),
                "kind": file.info.kind,
                "bytes": file.nbytes,
                "parameters": len(file),
                "examples": file.info.examples,
                "dataset": file.info.dataset,
            }
        )
    else:
        _say(
            f"[bold]{escape(str(file.path))}[/]: {file.nbytes / 1e6:.2f} MB, {len(file)} "
            f"parameters, from {file.info.examples} examples"
        )
