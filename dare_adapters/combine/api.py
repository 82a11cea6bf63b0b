"""`dare_adapters.combine`: adapter directories to an adapter, or to a mix of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dare_adapters.adapter import Adapter
from dare_adapters.checkpoint import Checkpoint, open_checkpoint
from dare_adapters.combine.align import align_names
from dare_adapters.combine.combination import Combination, Statistics
from dare_adapters.combine.mix import Mix, write_mix
from dare_adapters.combine.registry import get_method
from dare_adapters.errors import CheckpointMismatchError, CombinationError
from dare_adapters.open_source import open_source
from dare_adapters.source import BaseReader, DeltaSource, Renamed
from dare_adapters.store import save_source

__all__ = ["combination_of", "combine", "open_adapters"]


def combine(
    adapters: Sequence[str | Path | DeltaSource],
    out: str | Path,
    weights: Sequence[float] | None = None,
    *,
    combination_type: str = "linear",
    as_mix: bool = False,
    base: str | Path | None = None,
    bits: int | None = None,
    seed: int = 0,
    mask: str = "auto",
    prune: str | None = None,
    drop_rate: float | None = None,
    statistics: Sequence[Statistics] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
    **options: Any,
) -> Adapter | Mix:
    """Make one adapter of several over the same base.

    Args:
        adapters: directories or hub ids of DARE or LoRA adapters, or opened ones.
        out: directory to write.
        weights: one for each; default: 1.
        combination_type: "linear", "ties", "dare_ties", …: `dare_adapters.method_names()`.
        as_mix: write only the recipe, a few hundred bytes; it is computed when it is loaded.
        base: directory or hub id of the base, for methods that work on whole parameters; default:
            the one that the first adapter names.
        bits: for each entry that is stored; default: those of the finest adapter.
        seed: of random choices; with it the same adapters give the same result in any order.
        mask: "auto", "blocked" or "bernoulli": how entries are dropped at random.
        prune: "dare", "drop_only" or "magnitude", done to every delta before the method.
        drop_rate: of that.
        statistics: for "fisher" and "regmean", one mapping for each adapter; default: those that
            lie in its directory.
        revision: hub revision of `base`.
        token: for hub ids.
        workers: threads; they never change the result.
        overwrite: replace `out` if it exists.
        progress: show a bar.
        **options: of the combination type: `density`, `majority_sign_method`, ….

    Returns:
        What was written, opened.

    Raises:
        CombinationError: an unknown method or option, a value out of range, no base.
        BaseMismatchError: the adapters are of different bases.
        AdapterNotFoundError, AdapterFormatError, AdapterExistsError, DareError: as they say.
    """
    if adapters:  # before anything is downloaded
        get_method(combination_type).check(options, len(adapters))
    sources = open_adapters(adapters, token)
    combination = combination_of(
        sources,
        weights,
        combination_type=combination_type,
        seed=seed,
        mask=mask,
        prune=prune,
        drop_rate=drop_rate,
        statistics=statistics,
        **options,
    )
    if as_mix:
        return write_mix(combination, sources, out, overwrite=overwrite)
    reader: BaseReader | None = None
    if _needs_base(combination):
        where = base if base is not None else combination.base_model_name_or_path
        if where is None:
            raise CombinationError(
                f"{combination.label} works on whole parameters, and no adapter says what its "
                "base is: pass base="
            )
        reader = _reader(open_checkpoint(where, revision or combination.revision, token))
    description = {"combination": combination.describe()}
    return save_source(
        combination,
        out,
        base=reader,
        bits=bits,
        description=description,
        workers=workers,
        overwrite=overwrite,
        progress=progress,
    )


def open_adapters(
    adapters: Sequence[str | Path | DeltaSource], token: str | bool | None = None
) -> list[DeltaSource]:
    """Directories and hub ids opened, what is open already as it is.

    Raises:
        CombinationError: there are none.
        AdapterNotFoundError, AdapterFormatError, DareError: as `open_source` says.
    """
    if not adapters:
        raise CombinationError("there is no adapter in an empty list")
    return [
        item if isinstance(item, DeltaSource) else open_source(item, token=token)
        for item in adapters
    ]


def combination_of(
    sources: Sequence[DeltaSource],
    weights: Sequence[float] | None = None,
    *,
    combination_type: str = "linear",
    seed: int = 0,
    mask: str = "auto",
    prune: str | None = None,
    drop_rate: float | None = None,
    statistics: Sequence[Statistics] | None = None,
    **options: Any,
) -> Combination:
    """Opened adapters as one source, computed as it is read; arguments as those of `combine`.

    Raises:
        CombinationError: an unknown method or option, a value out of range, no statistics.
        BaseMismatchError: the adapters are of different bases.
    """
    weights = [1.0] * len(sources) if weights is None else [_number(w) for w in weights]
    method = get_method(combination_type)
    method.check(options, len(sources))
    if method.statistics and statistics is None:
        statistics = [_own_statistics(source, method.statistics) for source in sources]
    return Combination(
        align_names(sources),
        weights,
        combination_type,
        options,
        seed=seed,
        mask=mask,
        prune=prune,
        drop_rate=drop_rate,
        statistics=statistics,
    )


def _needs_base(source: DeltaSource) -> bool:
    """Whether a method on whole parameters is anywhere in it."""
    if isinstance(source, Renamed):
        return _needs_base(source.source)
    if not isinstance(source, Combination):
        return False
    return source.method.on_parameters or any(_needs_base(part) for part in source.sources)


def _reader(checkpoint: Checkpoint) -> BaseReader:
    def read(name: str) -> torch.Tensor:
        if name not in checkpoint:
            raise CheckpointMismatchError(
                f"{checkpoint.path} has no {name}, which an adapter changes; pass the base= that "
                "the adapters were extracted over"
            )
        return checkpoint[name]

    return read


def _number(weight: float) -> float:
    if isinstance(weight, bool) or not abs(float(weight)) < float("inf"):
        raise CombinationError(f"a weight is {weight!r}; it must be a finite number")
    return float(weight)


def _own_statistics(source: DeltaSource, kind: str) -> Statistics:
    from dare_adapters.statistics import open_statistics

    if not isinstance(source, Adapter):
        raise CombinationError(f"{source.label} has no {kind} statistics; pass statistics=")
    return open_statistics(source, kind)
