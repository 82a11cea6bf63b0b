"""Base, adapter and data to a statistics file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from dare_adapters.adapter import Adapter
from dare_adapters.statistics.data import Batches, Rows, read_rows
from dare_adapters.statistics.file import (
    StatisticsFile,
    StatisticsInfo,
    check_storable,
    open_statistics,
    prepare_to_write,
    write_statistics,
)
from dare_adapters.statistics.fisher import (
    Estimate,
    diagonal_fisher,
    is_language_model,
    resolve_estimate,
)
from dare_adapters.statistics.gram import gram_matrices, linear_weights
from dare_adapters.statistics.places import find_places
from dare_adapters.statistics.task_model import adapter_active, load_task_model, load_tokenizer
from dare_adapters.tensor_file import DTYPE_NAMES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["compute_statistics"]


def compute_statistics(
    base: str | Path | PreTrainedModel,
    adapter: str | Path | Adapter,
    dataset: str | Path | Rows,
    kind: str = "fisher",
    *,
    config: str | None = None,
    split: str = "train",
    text_column: str = "text",
    second_text_column: str | None = None,
    label_column: str | None = None,
    tokenizer: Any = None,
    examples: int = 1000,
    batch_size: int = 16,
    max_length: int = 128,
    seed: int = 0,
    estimate: Estimate = "auto",
    mask_padding: bool = False,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    model_dtype: torch.dtype | str = torch.float32,
    device: str | torch.device = "cpu",
    out: str | Path | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    progress: bool = True,
) -> StatisticsFile:
    """Compute an adapter's statistics, for methods that merge by them, and store them beside it.

    They are of every parameter that the adapter's base has (what only the fine-tune has, as a
    task head, is not merged). Defaults are MergeLM's for GLUE.

    Args:
        base: directory or hub id, loaded as the class of the adapter's finetuned_config.json; or
            a live model of it, left as it was.
        adapter: directory, hub id, or opened; alone active meanwhile.
        dataset: what :func:`read_rows` reads, or rows: a `datasets.Dataset`, a list of dicts.
        kind: "fisher" (:func:`diagonal_fisher`; the file has the size of the model in `dtype`) or
            "gram" (:func:`gram_matrices`; 4 · inputs² bytes for each linear layer).
        config, split: of the data set.
        text_column, second_text_column: which of its columns are the input.
        label_column: for regression, and the estimate "labels"; by default "label" or "labels".
        tokenizer: by default the adapter's, else the base's.
        examples: at most, drawn from all rows.
        batch_size: examples a batch; Fisher information by MergeLM's formula depends on it.
        max_length: texts are cut to that many tokens.
        seed: of that draw and of the estimate's.
        estimate: of Fisher information.
        mask_padding: leave padding out of Gram matrices.
        include, exclude: glob patterns of checkpoint names.
        dtype: of the stored Fisher information, float32 or bfloat16.
        model_dtype: in which a base is loaded; bfloat16 halves its memory, and is less exact.
        device: to which a base is loaded.
        out: directory to write to; by default the adapter's.
        overwrite: replace the file if it exists.
        revision, token: for a base on the hub.
        progress: show a bar.

    Returns:
        The file, opened.

    Raises:
        AdapterExistsError: the file exists and `overwrite` is not set.
        AdapterFormatError, ArchitectureMismatchError, BaseMismatchError, CheckpointError: the base
            or the adapter is not what it should be.
        DareError: the data cannot be read, memory or disk are too small, or the model or the data
            are not what `kind` is computed from.
        ValueError: an option is out of range.
    """
    stored = DTYPE_NAMES.get(dtype, str(dtype))
    check_storable(kind, stored)
    if not isinstance(adapter, Adapter):
        source, adapter = adapter, Adapter.from_pretrained(adapter, token=token)
        if out is None and adapter.path != Path(source):
            raise ValueError(f"{source} is on the hub: choose where to write with out (--out DIR)")
    directory = adapter.path if out is None else Path(out)
    prepare_to_write(directory, kind, 0, overwrite)
    named = str(dataset) if isinstance(dataset, (str, Path)) else type(dataset).__name__
    if isinstance(dataset, (str, Path)):
        dataset = read_rows(dataset, config, split)
    if isinstance(base, (str, Path)):
        model = load_task_model(
            base, adapter, dtype=model_dtype, device=device, revision=revision, token=token
        )
        hub = {"revision": revision, "token": token}
    else:
        model, hub = base, {}
        base = model.name_or_path
    if tokenizer is None:
        tokenizer = load_tokenizer(base, adapter, model.config, **hub)
    estimate = resolve_estimate(model, estimate)
    with_labels = kind == "fisher" and (model.config.num_labels == 1 or estimate == "labels")
    with_labels &= not is_language_model(model)  # whose labels are its tokens
    batches = Batches(
        dataset,
        tokenizer,
        text_column=text_column,
        second_text_column=second_text_column,
        label_column=label_column,
        with_labels=with_labels,
        examples=examples,
        batch_size=batch_size,
        max_length=max_length,
        seed=seed,
    )
    names = _base_names(adapter)
    with adapter_active(model, adapter):
        _check_space(directory, kind, stored, model, names, include, exclude, overwrite)
        bar = tqdm(batches, desc=kind, unit="batch", disable=not progress)
        if kind == "fisher":
            tensors = diagonal_fisher(
                model,
                bar,
                names=names,
                include=include,
                exclude=exclude,
                estimate=estimate,
                seed=seed,
            )
            tensors = {name: _base_rows(adapter, name, value) for name, value in tensors.items()}
        else:
            tensors = gram_matrices(
                model, bar, names=names, include=include, exclude=exclude, mask_padding=mask_padding
            )
    info = StatisticsInfo(
        kind=kind,
        adapter_sha256=adapter.config.sha256,
        examples=batches.examples,
        dataset=named,
        dtype=stored,
        settings={
            "config": config,
            "split": split,
            "batch_size": batch_size,
            "max_length": max_length,
            "seed": seed,
            **({"estimate": estimate} if kind == "fisher" else {"mask_padding": mask_padding}),
        },
    )
    write_statistics(directory, info, tensors, overwrite=overwrite)
    return open_statistics(adapter, kind, directory)


def _base_names(adapter: Adapter) -> list[str]:
    """Every parameter of the adapter's base, changed or not."""
    changed = (name for name in adapter if not adapter.is_new(name))
    return list(dict.fromkeys([*changed, *adapter.config.witness]))


def _base_rows(adapter: Adapter, name: str, value: torch.Tensor) -> torch.Tensor:
    """Without vocabulary rows that only the fine-tune has."""
    entry = adapter.config.parameters.get(name)
    return value if entry is None or not entry.shape else value[: entry.shape[0]]


def _check_space(
    directory: Path,
    kind: str,
    dtype: str,
    model: PreTrainedModel,
    names: Iterable[str],
    include: Sequence[str],
    exclude: Sequence[str],
    overwrite: bool,
) -> None:
    if kind == "fisher":
        places = find_places(model, names, include, exclude).values()
        entries = sum(torch.Size(place.shape).numel() for place in places)
    else:
        weights = linear_weights(model, names, include, exclude).values()
        entries = sum(weight.inputs**2 for weight in weights)
    prepare_to_write(directory, kind, entries * (2 if dtype == "BF16" else 4), overwrite)
