"""Base and adapter to a full checkpoint, a tensor at a time, sharded like the base."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import torch
from tqdm.auto import tqdm

from dare_adapters.adapter import Adapter
from dare_adapters.checkpoint import Checkpoint, open_checkpoint, read_json
from dare_adapters.checkpoint_writer import OutputTensor, sum_parts, whole_parts, write_checkpoint
from dare_adapters.companions import FINETUNED_CONFIG, is_companion
from dare_adapters.delta import NewParameter, WeightedDelta
from dare_adapters.errors import (
    AdapterFormatError,
    BaseMismatchError,
    CheckpointMismatchError,
)
from dare_adapters.output import complete_directory, require_space
from dare_adapters.parallel import worker_pool
from dare_adapters.source import DeltaSource
from dare_adapters.witness import decode_witness, matches

__all__ = ["check_base_checkpoint", "export", "main_dtype"]


def export(
    base: str | Path,
    adapter: str | Path | Adapter,
    out: str | Path,
    *,
    weight: float = 1.0,
    check_base: bool = True,
    revision: str | None = None,
    adapter_revision: str | None = None,
    token: str | bool | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Write the full checkpoint that base and adapter make, for `from_pretrained`.

    Its weights are those of a live base with the adapter active, bit for bit: float32 sums,
    rounded once to the base's dtype. It has the fine-tune's config, tokenizer and names.

    Args:
        base: directory or hub id.
        adapter: directory, hub id, or an opened adapter.
        out: directory to write.
        weight: factor of the delta.
        check_base: compare sampled values with those of the adapter's base.
        revision, adapter_revision, token: for hub ids.
        workers: threads.
        overwrite: replace `out` if it exists.
        progress: show a bar.

    Returns:
        `out`.

    Raises:
        BaseMismatchError: `base` is not the adapter's base.
        CheckpointMismatchError: `base` lacks parameters that the adapter changes.
        AdapterFormatError, CheckpointError, AdapterExistsError, DareError: as they say.
        ValueError: the weight is no finite number.
    """
    if isinstance(weight, bool) or not abs(weight) < float("inf"):
        raise ValueError(f"weight is {weight!r}; it must be a finite number")
    if not isinstance(adapter, Adapter):
        adapter = Adapter.from_pretrained(adapter, revision=adapter_revision, token=token)
    checkpoint = open_checkpoint(base, revision, token)
    _check_names(checkpoint, adapter)
    if check_base:
        check_base_checkpoint(checkpoint, adapter)
    names = _exported_names(checkpoint, adapter)
    with complete_directory(Path(out), overwrite) as directory:
        require_space(directory, checkpoint.nbytes)
        bar = tqdm(
            total=checkpoint.nbytes, unit="B", unit_scale=True, desc="export", disable=not progress
        )
        with bar, worker_pool(workers) as pool:
            write_checkpoint(directory, _shards(checkpoint, adapter, names, weight), pool, bar)
        _write_companions(directory, checkpoint, adapter)
    return Path(out)


def check_base_checkpoint(
    base: Checkpoint, source: DeltaSource, *, allow_cast: bool = False
) -> None:
    """Compare a checkpoint's sampled values with the witness of an adapter.

    Args:
        base: the checkpoint.
        source: the adapter, or several combined.
        allow_cast: take values that were rounded to another dtype for the same.

    Raises:
        BaseMismatchError: which parameters differ, and how far.
    """
    wrong: list[tuple[float, str]] = []
    witness, made_over = source.witness, source.base_model_name_or_path
    lacking = [name for name in witness if name not in base]
    if lacking:
        raise BaseMismatchError(
            f"{base.path} is not the base of {source.label}: it lacks {len(lacking)} of its "
            f"{len(witness)} parameters ({', '.join(lacking[:6])}). It was extracted over "
            f"{made_over!r}"
        )
    for name, text in witness.items():
        positions, expected = decode_witness(name, text)
        value = base[name].reshape(-1)
        if len(positions) and int(positions.max()) >= len(value):
            wrong.append((float("inf"), name))
            continue
        found = value[positions]
        same = torch.equal(found.to(torch.float64), expected.to(torch.float64))
        if not same and not (allow_cast and bool(matches(expected, found).all())):
            wrong.append((float((found.double() - expected.double()).abs().max()), name))
    if wrong:
        wrong.sort(reverse=True)
        worst = ", ".join(f"{name} (off by {off:.2g})" for off, name in wrong[:6])
        raise BaseMismatchError(
            f"{base.path} is not the base of {source.label}: {len(wrong)} of {len(witness)} "
            f"sampled parameters differ, most of all {worst}. It was extracted over {made_over!r}"
        )


def _check_names(base: Checkpoint, adapter: Adapter) -> None:
    entries = adapter.config.parameters
    needed = {name: entry for name, entry in entries.items() if entry.kind != "new"}
    missing = [name for name in needed if name not in base]
    wrong = [n for n, e in needed.items() if n in base and base.info[n].shape != e.shape]
    if missing or wrong:
        raise CheckpointMismatchError(
            f"{base.path} does not fit {adapter.path}: it lacks {len(missing)} of its parameters "
            f"({', '.join(missing[:6])}) and has {len(wrong)} in other shapes "
            f"({', '.join(wrong[:6])})"
        )


def _exported_names(base: Checkpoint, adapter: Adapter) -> dict[str, str]:
    """Base name -> the fine-tune's name of it, without what the fine-tune left out."""
    config = adapter.config
    prefix, left_out = config.finetuned_prefix, set(config.ignored_base_parameters)
    replaced = {name for name, entry in config.parameters.items() if entry.kind == "new"}

    def rename(name: str) -> str:
        if prefix.startswith("-"):
            return name.removeprefix(prefix[1:])
        return prefix + name

    names = {name: rename(name) for name in base if name not in left_out | replaced}
    new = [
        entry.finetuned_name or name
        for name, entry in config.parameters.items()
        if entry.kind == "new"
    ]
    written = [*names.values(), *new]
    if len(set(written)) < len(written):
        twice = sorted(name for name, count in Counter(written).items() if count > 1)
        raise CheckpointMismatchError(
            f"{adapter.path} over {base.path} would write {', '.join(twice[:6])} twice"
        )
    return names


def _shards(
    base: Checkpoint, adapter: Adapter, names: dict[str, str], weight: float
) -> list[list[OutputTensor]]:
    """The base's shards, patched; what only the fine-tune has in the last one."""
    shards = [
        [_patched(base, adapter, name, names[name], weight) for name in own if name in names]
        for _, own in sorted(base.shards.items())
    ]
    shards = [tensors for tensors in shards if tensors] or [[]]
    dtype = main_dtype(base)
    for name, entry in adapter.config.parameters.items():
        if entry.kind == "new":
            value = _new(adapter, name, dtype)
            shape = tuple(value.shape)
            own_name = entry.finetuned_name or name
            shards[-1].append(OutputTensor(own_name, value.dtype, shape, whole_parts(value)))
    return shards


def _patched(
    base: Checkpoint, adapter: Adapter, name: str, new_name: str, weight: float
) -> OutputTensor:
    tensor, delta = base[name], adapter.get(name)
    shape = tuple(tensor.shape)
    if delta is None or isinstance(delta, NewParameter):
        return OutputTensor(new_name, tensor.dtype, shape, whole_parts(tensor))
    if delta.added_rows is not None:
        shape = (shape[0] + len(delta.added_rows), *shape[1:])
    parts = sum_parts(tensor, [WeightedDelta(delta, weight)])
    return OutputTensor(new_name, tensor.dtype, shape, parts)


def _new(adapter: Adapter, name: str, dtype: torch.dtype) -> torch.Tensor:
    parameter = adapter[name]
    assert isinstance(parameter, NewParameter)
    value = parameter.value
    return value.to(dtype) if value.is_floating_point() else value


def main_dtype(base: Checkpoint) -> torch.dtype:
    """The dtype that most of the base's numbers have."""
    sizes: Counter[torch.dtype] = Counter()
    for info in base.info.values():
        if info.dtype.is_floating_point:
            sizes[info.dtype] += info.numel
    return sizes.most_common(1)[0][0] if sizes else torch.float32


def _write_companions(directory: Path, base: Checkpoint, adapter: Adapter) -> None:
    """Config, tokenizer and the rest: the adapter's own, else the base's."""
    for source in (base.path, adapter.path):
        for file in source.iterdir():
            if is_companion(file.name):
                shutil.copyfile(file, directory / file.name)
    config_file = adapter.path / FINETUNED_CONFIG
    stored = config_file.is_file()
    config = read_json(config_file, AdapterFormatError) if stored else dict(base.config)
    if not config:
        return
    config["dtype"] = str(main_dtype(base)).removeprefix("torch.")
    config.pop("torch_dtype", None)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
