"""Any source of deltas to an adapter directory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from dare_adapters import codec
from dare_adapters.adapter import Adapter
from dare_adapters.adapter_writer import AdapterWriter
from dare_adapters.combine.combination import Combination
from dare_adapters.companions import copy_present_companions
from dare_adapters.config import AdapterConfig
from dare_adapters.delta import Delta, DenseDelta, NewParameter
from dare_adapters.encode import encode_delta, encode_new, encode_whole
from dare_adapters.errors import CombinationError
from dare_adapters.model_card import write_model_card
from dare_adapters.output import complete_directory
from dare_adapters.parallel import worker_pool
from dare_adapters.source import WHOLE, BaseReader, DeltaSource, Renamed
from dare_adapters.sparse_delta import SparseDelta
from dare_adapters.versions import library_versions

__all__ = ["save_source"]


def save_source(
    source: DeltaSource,
    out: str | Path,
    *,
    base: BaseReader | None = None,
    bits: int | None = None,
    description: dict[str, Any] | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Adapter:
    """Compute a source's deltas, a parameter at a time, and write them as an adapter.

    One adapter that nothing was done to is copied bit for bit. Where all survivors lie on one
    seed's mask the mask is not stored; elsewhere positions are, or every entry where that is
    smaller.

    Args:
        source: what to write.
        out: directory to create.
        base: the base's parameters, for methods that need them.
        bits: for each entry of pruned parameters; default: those of the finest input. 32 leaves
            nothing rounded. What an input kept whole stays whole.
        description: what to say of its origin in the config.
        workers: threads.
        overwrite: replace `out` if it exists.
        progress: show a bar.

    Raises:
        CombinationError: a method needs a base and there is none.
        AdapterExistsError, DareError: as `complete_directory` says.
        ValueError: bits is out of range.
    """
    if bits is not None and (type(bits) is not int or bits not in codec.BITS):
        raise CombinationError(f"bits is {bits}; there are {', '.join(map(str, codec.BITS))}")
    adapters = list(_adapters(source))
    if bits is None and len(adapters) == 1 and _is_copy(source, adapters[0], base):
        adapters[0].save(out, overwrite=overwrite)
        return Adapter.open(out, verify=False)
    config = _describe(source, adapters, bits, description)
    with complete_directory(Path(out), overwrite) as directory:
        bar = tqdm(total=len(source), unit="parameter", desc="combine", disable=not progress)
        with AdapterWriter(directory, config) as writer, bar, worker_pool(workers) as pool:
            for name in source:
                value = _read(source, name, base)
                if isinstance(value, NewParameter):
                    writer.add(encode_new(name, value.value, _finetuned_name(adapters, name)))
                else:
                    own = source.stored_bits(name)
                    if own == WHOLE or len(value.shape) < 2:
                        encoded = encode_whole(name, value)
                    else:
                        encoded = encode_delta(pool, name, value, bits or own, seed=config.seed)
                    if not encoded.empty:
                        writer.add(encoded)
                bar.update()
        config.drop_rate = _drop_rate(config)
        if adapters:  # of several tokenizers one, whole
            copy_present_companions(adapters[0].path, directory)
        config.save(directory)
        write_model_card(directory, config, 2 * config.base_parameter_count)
    return Adapter.open(out, verify=False)


def _adapters(source: DeltaSource) -> Iterator[Adapter]:
    """The adapters that a source is made of, in order."""
    if isinstance(source, Adapter):
        yield source
    elif isinstance(source, Renamed):
        yield from _adapters(source.source)
    elif isinstance(source, Combination):
        for part in source.sources:
            yield from _adapters(part)


def _is_copy(source: DeltaSource, adapter: Adapter, base: BaseReader | None) -> bool:
    """Whether a source gives just what one adapter does, stored parameter for parameter."""
    stored = (SparseDelta, DenseDelta, NewParameter)
    names = list(source)
    if isinstance(source, Combination) and len(source.sources) > 1:
        return False
    values = (_read(source, name, base) for name in names)
    return names == sorted(adapter) and all(isinstance(value, stored) for value in values)


def _read(source: DeltaSource, name: str, base: BaseReader | None) -> Delta | NewParameter:
    return source[name] if base is None else source.parameter(name, base)


def _describe(
    source: DeltaSource,
    adapters: list[Adapter],
    bits: int | None,
    description: dict[str, Any] | None,
) -> AdapterConfig:
    first = adapters[0].config if adapters else AdapterConfig()
    own = [source.stored_bits(name) for name in source if not source.is_new(name)]
    pruned = [one for one in own if one != WHOLE] or [32 if own else 16]
    return AdapterConfig(
        base_model_name_or_path=source.base_model_name_or_path,
        revision=source.revision,
        base_architectures=list(source.base_architectures),
        task_type=first.task_type,
        method="combined",
        mask="stored",
        bits=bits or max(pruned),
        seed=first.seed,
        rescale=False,
        finetuned_model={"name_or_path": source.label, **(description or {})},
        finetuned_prefix=first.finetuned_prefix,
        ignored_base_parameters=list(first.ignored_base_parameters),
        base_parameter_count=source.base_parameter_count,
        library_versions=library_versions(),
        witness=dict(source.witness),
    )


def _drop_rate(config: AdapterConfig) -> float:
    """The share of all pruned entries that is not stored."""
    entries = [e for e in config.parameters.values() if e.kind == "sparse"]
    total = sum(math.prod(e.shape) for e in entries)
    kept = sum(math.prod(e.shape) * (1 - (e.drop_rate or 0.0)) for e in entries)
    return round(1 - kept / total, 6) if total else 0.0


def _finetuned_name(adapters: list[Adapter], name: str) -> str | None:
    for adapter in adapters:
        if name in adapter:
            return adapter.config.parameters[name].finetuned_name
    return None
