"""The base witness against the weights that an engine runs on, whatever form it keeps them in.

vLLM packs weights for its kernels (oneDNN leaves nothing of `layer.weight` on a CPU). So a layer
is asked for single entries the way the model asks it: the product of a unit vector is a column.
That also proves, value by value, that a parameter is where changes of it will be added. Where a
mixture is in the weights, the witness is compared with the base's checkpoint on disk, and the
weights with what base and mixture make at its positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from dare_adapters.errors import BaseMismatchError
from dare_adapters.export import check_base_checkpoint
from dare_adapters.source import DeltaSource
from dare_adapters.witness import decode_witness, matches
from dare_vllm.merged_weights import MergedWeights
from dare_vllm.per_request.experts_site import ExpertsSite, expert_entries
from dare_vllm.per_request.model_sites import ModelSites, NoPlaceError, Place
from dare_vllm.per_request.refusal import listed
from dare_vllm.per_request.sites import EmbeddingSite, LinearSite

__all__ = ["check_base"]


def check_base(
    source: DeltaSource,
    sites: ModelSites,
    known: dict[str, str],
    mixture: Callable[[], MergedWeights | None] = lambda: None,
) -> None:
    """Compare the witness of an adapter with the live weights of this rank.

    Weights that vLLM holds quantised are not compared; the others of such a model are.

    Args:
        source: an adapter.
        sites: of the model.
        known: witnesses that were found to be those of the served base, by name; gains these.
        mixture: opens what the live weights are where a mixture is in them; None: they are the
            base's.

    Raises:
        BaseMismatchError: parameters that differ, by name, or one that an adapter changes and of
            which it has no witness.
        CheckpointError: a mixture is active, and its base's checkpoint is gone.
    """
    unknown = [name for name in source if name not in source.witness and not source.is_new(name)]
    if unknown:
        raise BaseMismatchError(
            f"{source.label} has no witness of its base for {listed(unknown)}: nothing tells "
            "whether the served model is the base it was made for"
        )
    if source.witness.items() <= known.items():
        return
    merged = mixture()
    if merged is not None:
        check_base_checkpoint(merged.base, source, allow_cast=True)
    wrong: list[tuple[float, str]] = []
    for name, text in source.witness.items():
        try:
            places = sites.places(name)
        except NoPlaceError:
            continue  # refused elsewhere if it is changed
        positions, expected = decode_witness(name, text)
        if merged is not None:
            if not merged.keeps(name):
                continue  # the mixture has another in its place
            expected = merged.sample(name, positions)
        off = _distance(positions, expected, int(text.split(":")[1]), places)
        if off:
            wrong.append((off, name))
    if wrong:
        wrong.sort(reverse=True)
        names = listed([f"{name} (off by {off:.2g})" for off, name in wrong])
        if merged is not None:
            raise BaseMismatchError(
                f"the served model is not what {merged.base.path} and the mixture in it make: "
                f"{names}; {source.label} cannot be added to it"
            )
        raise BaseMismatchError(
            f"the served model is not the base of {source.label}: {len(wrong)} of "
            f"{len(source.witness)} sampled parameters differ, most of all {names}; it was "
            f"extracted over {source.base_model_name_or_path!r}"
            + (f" at revision {source.revision}" if source.revision else "")
            + ": serve that"
        )
    known.update(source.witness)


def _distance(
    positions: torch.Tensor, expected: torch.Tensor, numel: int, places: list[Place]
) -> float:
    """The largest difference at some positions; 0: all are equal or not held here."""
    largest = 0.0
    for place in places[:1] if _same_tensor(places) else places:
        shape = place.shard.shape
        if math.prod(shape) != numel:
            return math.inf
        columns = shape[1] if len(shape) == 2 else 1
        row, column = positions // columns, positions % columns
        (top, bottom), (left, right) = place.shard.rows, place.shard.columns
        held = (row >= top) & (row < bottom) & (column >= left) & (column < right)
        if not bool(held.any()):
            continue
        found = _live(place, row[held] - top, column[held] - left)
        if found is not None and not bool(matches(expected[held], found).all()):
            largest = max(largest, float((found.double() - expected[held].double()).abs().max()))
    return largest


def _same_tensor(places: list[Place]) -> bool:
    """Whether places are one tensor (a tied head) and not several parts of one."""
    return len(places) > 1 and len({place.shard for place in places}) == 1


def _live(place: Place, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor | None:
    """Entries of what this rank holds, (n,) on the CPU; None: they are quantised."""
    layer: Any = place.layer
    if isinstance(place.site, ExpertsSite):
        return expert_entries(layer, place.part, place.shard.start, row, column)
    if place.part == "bias" or not isinstance(place.site, (LinearSite, EmbeddingSite)):
        tensor = layer.bias if place.part == "bias" else layer.weight
        return _detached(tensor.detach().view(-1)[(row + place.shard.start).to(tensor.device)])
    method = place.site.method
    if method is None:  # a table that is no vocabulary
        return _detached(layer.weight[row.to(layer.weight.device), column.to(layer.weight.device)])
    if not _is_plain(method):
        return None
    device = _device(layer)
    with torch.no_grad():
        if isinstance(place.site, EmbeddingSite):
            rows = method.embedding(layer, row.to(device))
            return _detached(rows.gather(1, column.to(device)[:, None]).squeeze(1))
        width = place.shard.columns[1] - place.shard.columns[0]
        unit = torch.zeros(len(row), width, dtype=layer.params_dtype, device=device)
        unit.scatter_(1, column.to(device)[:, None], 1)
        made = method.apply(layer, unit, None)
        index = (row + place.shard.start).to(device)[:, None]
        return _detached(made.gather(1, index).squeeze(1))


def _is_plain(method: Any) -> bool:
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    return isinstance(method, (UnquantizedLinearMethod, UnquantizedEmbeddingMethod))


def _device(layer: Any) -> torch.device:
    device: torch.device = next(iter(layer.parameters())).device
    return device


def _detached(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu()
