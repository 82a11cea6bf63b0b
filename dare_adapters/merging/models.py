"""The models of a recipe, opened: checkpoints, and checkpoints with adapters on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dare_adapters.adapter import Adapter, resolve_adapter
from dare_adapters.checkpoint import Checkpoint, ParameterInfo, open_checkpoint, read_json
from dare_adapters.combine.align import align_to
from dare_adapters.combine.linear import linear
from dare_adapters.companions import FINETUNED_CONFIG
from dare_adapters.config import CONFIG_NAME
from dare_adapters.delta import Delta, DenseDelta, NewParameter, NoChange
from dare_adapters.difference import ParameterDifference
from dare_adapters.errors import AdapterFormatError, CheckpointMismatchError
from dare_adapters.export import check_base_checkpoint
from dare_adapters.merging.damage import check_input
from dare_adapters.open_source import open_source
from dare_adapters.source import DeltaSource

__all__ = ["MergeModel", "delta_between", "is_adapter_directory", "open_model"]


@dataclass
class MergeModel:
    """A checkpoint with any number of adapters on it.

    Attributes:
        checkpoint: what the adapters are over.
        sources: the adapters, under the checkpoint's names.
        path: where its tokenizer and the like lie.
        config: its config.json.
        info: shape and dtype of every tensor, by checkpoint name.
        identity: seed of random choices about it; depends on its content alone.
    """

    checkpoint: Checkpoint
    sources: list[DeltaSource] = field(default_factory=list)
    path: Path = Path()
    config: Mapping[str, Any] = field(default_factory=dict)
    info: Mapping[str, ParameterInfo] = field(default_factory=dict)

    def parameter(self, name: str) -> torch.Tensor:
        """A tensor, whole: memory-mapped where no adapter changes it."""
        changes = [source[name] for source in self.sources if name in source]
        for change in changes:
            if isinstance(change, NewParameter):
                return change.value
        tensor = self.checkpoint[name]
        deltas = [change for change in changes if isinstance(change, Delta)]
        if not deltas:
            return tensor
        total = tensor.to(torch.float32, copy=True)
        for delta in deltas:
            total.add_(delta.dense())
        rows = next((d.added_rows for d in deltas if d.added_rows is not None), None)
        merged = total.to(tensor.dtype)
        return merged if rows is None else torch.cat([merged, rows.to(merged.dtype)])

    def deltas(self, name: str) -> list[Delta]:
        """What its adapters change of a tensor."""
        found = [source[name] for source in self.sources if name in source]
        return [delta for delta in found if isinstance(delta, Delta)]

    def replaces(self, name: str) -> bool:
        """Whether an adapter brings the tensor, or rows of it, that the checkpoint lacks."""
        for source in self.sources:
            if name in source:
                change = source[name]
                if isinstance(change, NewParameter) or change.added_rows is not None:
                    return True
        return False

    def release(self, name: str) -> None:
        """Let go of what reading a tensor brought into memory."""
        if name in self.checkpoint:
            self.checkpoint.release(name)


def delta_between(base: MergeModel, base_name: str, model: MergeModel, name: str) -> Delta:
    """A model's tensor minus the base's, read lazily wherever both allow it.

    Raises:
        CheckpointMismatchError: they have different shapes.
    """
    plain_base = not base.deltas(base_name) and not base.replaces(base_name)
    if plain_base and not model.replaces(name):
        own = model.deltas(name)
        terms: list[Delta] = list(own)
        if model.checkpoint.path != base.checkpoint.path or name != base_name:
            terms.insert(0, _difference(base, base_name, model.checkpoint, name))
        if not terms:
            return NoChange(tuple(base.checkpoint[base_name].shape))
        return linear(terms, [1.0] * len(terms))
    one, other = base.parameter(base_name), model.parameter(name)
    if one.shape != other.shape:
        raise CheckpointMismatchError(
            f"{name} has the shape {list(other.shape)} in {model.path}, {base_name} of "
            f"{base.path} {list(one.shape)}"
        )
    return DenseDelta(other.to(torch.float32) - one.to(torch.float32))


def _difference(base: MergeModel, base_name: str, other: Checkpoint, name: str) -> Delta:
    one, two = base.checkpoint[base_name], other[name]
    if one.shape != two.shape:
        raise CheckpointMismatchError(
            f"{name} has the shape {list(two.shape)} in {other.path}, {base_name} of "
            f"{base.path} {list(one.shape)}"
        )

    def release() -> None:
        base.checkpoint.release(base_name)
        other.release(name)

    def damaged() -> None:
        check_input(base.checkpoint, base_name)
        check_input(other, name)

    flat, shape = (one.reshape(-1), two.reshape(-1)), tuple(one.shape)
    return ParameterDifference(base_name, shape, *flat, release=release, damaged=damaged)


def open_model(
    path: str,
    revision: str | None,
    lora: tuple[str, str | None] | None,
    base: Callable[[], Checkpoint],
    token: str | bool | None = None,
) -> MergeModel:
    """Open a model of a recipe.

    Args:
        path, revision: a checkpoint, or a DARE or LoRA adapter, which stands for its base with it
            attached.
        lora: path and revision of an adapter over it.
        base: opens the base of an adapter.
        token: hub access token.

    Raises:
        CheckpointError, AdapterNotFoundError, AdapterFormatError: it cannot be opened.
        BaseMismatchError: an adapter is not over that base.
    """
    sources: list[DeltaSource] = []
    if is_adapter_directory(path):
        checkpoint = base()
        sources.append(open_source(path, token=token))
    else:
        checkpoint = open_checkpoint(path, revision, token)
    if lora is not None:
        sources.append(open_source(resolve_adapter(lora[0], lora[1], token), token=token))
    named = [align_to(source, set(checkpoint)) for source in sources]
    where, config, info = checkpoint.path, dict(checkpoint.config), dict(checkpoint.info)
    for source, renamed in zip(sources, named, strict=True):
        if isinstance(source, Adapter):
            check_base_checkpoint(checkpoint, source)
            where = source.path if (source.path / "tokenizer_config.json").is_file() else where
            own = source.path / FINETUNED_CONFIG
            config = read_json(own, AdapterFormatError) if own.is_file() else config
        _update(info, checkpoint, renamed)
    return MergeModel(checkpoint, named, where, config, info)


def is_adapter_directory(path: str) -> bool:
    """Whether a local directory holds an adapter and no model."""
    place = Path(path)
    return (place / CONFIG_NAME).is_file() and not (place / "config.json").is_file()


def _update(info: dict[str, ParameterInfo], base: Checkpoint, source: DeltaSource) -> None:
    for name in source:
        change = source[name]
        if isinstance(change, NewParameter):
            info[name] = ParameterInfo(change.shape, change.value.dtype)
            continue
        if name not in base:
            raise CheckpointMismatchError(
                f"{source.label} changes {name}, which {base.path} does not have; it is over "
                f"another base ({source.base_model_name_or_path!r})"
            )
        if change.shape != base.info[name].shape:
            raise CheckpointMismatchError(
                f"{source.label} changes {name} as {list(change.shape)}, {base.path} has it as "
                f"{list(base.info[name].shape)}"
            )
        if change.added_rows is not None:
            shape = (change.shape[0] + len(change.added_rows), *change.shape[1:])
            info[name] = ParameterInfo(shape, base.info[name].dtype)
