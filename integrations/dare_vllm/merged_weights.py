"""The base's checkpoint with a mixture added, a tensor at a time, under checkpoint names.

These are the tensors of `dare_adapters.export`: float32 sums, rounded once to the base's dtype.
vLLM's own loader then fuses, slices, casts and quantises them as it does any checkpoint's.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from dare_adapters.adapter import Adapter
from dare_adapters.checkpoint import Checkpoint
from dare_adapters.checkpoint_writer import sum_parts
from dare_adapters.combine.align import align_to
from dare_adapters.combine.combination import Combination
from dare_adapters.companions import FINETUNED_CONFIG
from dare_adapters.delta import Delta, NewParameter, WeightedDelta
from dare_adapters.errors import (
    ArchitectureMismatchError,
    CheckpointMismatchError,
    UnsupportedParameterError,
)
from dare_adapters.export import check_base_checkpoint, main_dtype
from dare_adapters.pairing import TIED_HEADS, embedding_name
from dare_adapters.parallel import worker_pool
from dare_adapters.row_sums import add_rows
from dare_adapters.source import DeltaSource, Renamed

__all__ = ["MergedWeights", "plain_torch"]

Weights = Iterable[tuple[str, torch.Tensor]]

logger = logging.getLogger("vllm.dare")

_LISTED = 6
_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Fields of config.json that say nothing of what the model computes, or that are checked apart.
_HARMLESS = {
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "vocab_size",
}


class MergedWeights:
    """A base and the deltas that are added to it.

    Everything that can be refused is refused here, before a tensor is read.

    Args:
        base: the base's checkpoint.
        source: the deltas, or None: the base alone.
        check_base: compare sampled values of the base with the adapters' witness.
        untied: whether the model has a head of its own although the base's config ties it, as
            vLLM builds where the base's checkpoint stores both.

    Attributes:
        shapes: name -> shape of every tensor that :meth:`stream` makes.
        changed: base names of the parameters that get a delta.
        copies: base names of heads that repeat the embedding -> the embedding's.

    Raises:
        BaseMismatchError: it is not the adapters' base.
        CheckpointMismatchError: it lacks parameters that they change.
        ArchitectureMismatchError: it has them in other shapes.
        UnsupportedParameterError: its parameters are not plain floats; or fine-tunes of different
            architectures, which no one checkpoint holds.
    """

    def __init__(
        self,
        base: Checkpoint,
        source: DeltaSource | None,
        *,
        check_base: bool = True,
        untied: bool = False,
    ) -> None:
        self.base = base
        self.copies: dict[str, str] = {}
        self.source: DeltaSource | None = source and align_to(source, set(base))
        self._new: dict[str, str] = {}
        self._merged_shapes: dict[str, tuple[int, ...]] = {}
        self._left_out: set[str] = set()
        self._prefix = ""
        if self.source is not None:
            adapters = [leaf for leaf in _leaves(self.source) if isinstance(leaf, Adapter)]
            self._read_layout(adapters)
            self._check_parameters()
            if check_base:
                check_base_checkpoint(base, self.source, allow_cast=True)
            _warn_of_configs(base, adapters)
        self.changed = list(self._merged_shapes)
        embedding = embedding_name(base)
        if untied and base.tied and embedding in self.changed:
            # Of a tied head that both fine-tune and base store, an adapter has one delta.
            heads = self._left_out.intersection(TIED_HEADS)
            self.copies = {head: embedding for head in heads if embedding is not None}
            self._left_out -= self.copies.keys()
        self.shapes = self._shapes()

    def stream(
        self, weights: Weights, may_lack: Callable[[str], bool] = lambda name: False
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The base's tensors as they come, each with its delta added, then those that are new.

        Args:
            weights: checkpoint names and tensors of the base, on CPU; not written to.
            may_lack: whether a reader may leave a parameter out: another rank's experts.

        Raises:
            CheckpointMismatchError: parameters that the adapters change never came.
        """
        lacking = set(self.changed)
        with worker_pool() as pool:
            for name, tensor in weights:
                lacking.discard(name)
                if name in self.base and (name in self._left_out or name in self._new):
                    continue
                copied = self.copies.get(name, name)
                given = tensor if copied == name else self.base[copied]
                yield self.renamed(name), self.merged(copied, given, pool)
        lacking = {name for name in lacking if not may_lack(name)}
        if lacking:
            raise CheckpointMismatchError(
                f"{self._label} changes {len(lacking)} parameters that were never read from "
                f"{self.base.path}: {_listed(lacking)}"
            )
        for name in self._new:
            yield self._new[name], self.new_value(name)

    def merged(self, name: str, tensor: torch.Tensor, pool: ThreadPoolExecutor) -> torch.Tensor:
        """One of the base's tensors with its delta; the same tensor where there is none."""
        delta = self.delta(name)
        if delta is None:
            return tensor
        if tuple(tensor.shape) != delta.shape:
            raise ArchitectureMismatchError(
                f"{name} was read as {list(tensor.shape)}, {self._label} changes "
                f"{list(delta.shape)}"
            )
        with plain_torch():
            made = torch.empty(self._merged_shapes[name], dtype=tensor.dtype)
            flat, done = made.view(-1), 0
            for part in sum_parts(tensor, [WeightedDelta(delta)])(pool):
                flat[done : done + len(part)] = part
                done += len(part)
        return made

    def sample(self, name: str, positions: torch.Tensor) -> torch.Tensor:
        """Some entries of :meth:`merged`, of rows that are computed alone.

        Args:
            name: of a parameter of the base that keeps its place.
            positions: flat, int64 (n,), within the base's shape.
        """
        name = self.copies.get(name, name)
        flat, delta = self.base[name].detach().reshape(-1), self.delta(name)
        if delta is None:
            return flat[positions]
        found = torch.empty(len(positions), dtype=flat.dtype)
        with plain_torch():
            for number, position in enumerate(positions.tolist()):
                row, column = divmod(position, delta.columns)
                part = flat[row * delta.columns : (row + 1) * delta.columns]
                found[number] = add_rows(part, [WeightedDelta(delta)], row, row + 1)[column]
            delta.release()
        return found

    def keeps(self, name: str) -> bool:
        """Whether a parameter of the base is a parameter of the model, changed or not."""
        return name in self.base and name not in self._left_out and name not in self._new

    def delta(self, name: str) -> Delta | None:
        """What is added to one of the base's parameters."""
        if self.source is None or name in self._new or name not in self.source:
            return None
        with plain_torch():
            delta = self.source.parameter(name, self._read_base)
        assert isinstance(delta, Delta)
        return delta

    def new_value(self, name: str) -> torch.Tensor:
        """A parameter that replaces the base's or that it does not have, in the base's dtype."""
        assert self.source is not None
        parameter = self.source[name]
        assert isinstance(parameter, NewParameter)
        value = parameter.value
        return value.to(main_dtype(self.base)) if value.is_floating_point() else value

    def renamed(self, name: str) -> str:
        """The name that a parameter of the base has in the fine-tune's architecture."""
        if self._prefix.startswith("-"):
            return name.removeprefix(self._prefix[1:])
        return self._prefix + name

    @property
    def new(self) -> dict[str, str]:
        """Source's name -> checkpoint's name of parameters that adapters bring whole."""
        return dict(self._new)

    @property
    def _label(self) -> str:
        return self.source.label if self.source is not None else "the base"

    def _read_base(self, name: str) -> torch.Tensor:
        return self.base[name]

    def _read_layout(self, adapters: list[Adapter]) -> None:
        """What the fine-tunes leave out, add and call otherwise."""
        assert self.source is not None
        layouts = [
            (a.config.finetuned_prefix, set(a.config.ignored_base_parameters)) for a in adapters
        ]
        if layouts:
            self._prefix = layouts[0][0]
            others = [
                a.label
                for a, (prefix, _) in zip(adapters, layouts, strict=True)
                if prefix != self._prefix
            ]
            if others:
                raise UnsupportedParameterError(
                    f"{adapters[0].label} and {others[0]} are of fine-tunes that name the base's "
                    f"parameters differently ({self._prefix!r} before them in the first): no one "
                    "checkpoint has both"
                )
            self._left_out = set.intersection(*(left_out for _, left_out in layouts))
            self._left_out -= {n for n in self.source if not self.source.is_new(n)}
        for name in self.source:
            if self.source.is_new(name):
                entries = [
                    a.config.parameters[name] for a in adapters if name in a.config.parameters
                ]
                own = next((entry.finetuned_name for entry in entries), None)
                self._new[name] = own or (self.renamed(name) if name in self.base else name)

    def _check_parameters(self) -> None:
        assert self.source is not None
        names = [name for name in self.source if name not in self._new]
        lacking = [name for name in names if name not in self.base]
        if lacking:
            raise CheckpointMismatchError(
                f"{self._label} changes {len(lacking)} parameters that {self.base.path} does not "
                f"have: {_listed(lacking)}"
            )
        packed = [name for name in names if self.base.info[name].dtype not in _PLAIN]
        if packed:
            kinds = {str(self.base.info[name].dtype) for name in packed}
            raise UnsupportedParameterError(
                f"{self.base.path} holds {_listed(packed)} as {', '.join(sorted(kinds))}; a delta "
                "can only be added to plain floats: serve the base that is not quantised"
            )
        wrong = []
        for name in names:
            delta = self.delta(name)
            assert delta is not None
            if delta.shape != self.base.info[name].shape:
                wrong.append(name)
            self._merged_shapes[name] = _merged_shape(delta)
        if wrong:
            raise ArchitectureMismatchError(
                f"{self.base.path} does not fit {self._label}: it has {len(wrong)} parameters in "
                f"other shapes ({_listed(wrong)})"
            )

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        found = {
            self.renamed(name): info.shape
            for name, info in self.base.info.items()
            if name not in self._left_out and name not in self._new
        }
        for name, shape in self._merged_shapes.items():
            found[self.renamed(name)] = shape
        for name, copied in self.copies.items():
            found[self.renamed(name)] = found[self.renamed(copied)]
        for name, own in self._new.items():
            found[own] = tuple(self.new_value(name).shape)
        return found

    def added_rows(self) -> dict[str, int]:
        """How many vocabulary rows are added to which parameters."""
        found = {
            name: shape[0] - self.base.info[name].shape[0]
            for name, shape in self._merged_shapes.items()
            if shape
        }
        return {name: added for name, added in found.items() if added}


@contextmanager
def plain_torch() -> Iterator[None]:
    """PyTorch's own defaults, where an engine that loads has others: the GPU, half precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"), torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(before)


def _merged_shape(delta: Delta) -> tuple[int, ...]:
    added = 0 if delta.added_rows is None else len(delta.added_rows)
    return (delta.shape[0] + added, *delta.shape[1:]) if delta.shape else ()


def _leaves(source: DeltaSource) -> Iterator[DeltaSource]:
    """The adapters that a source is made of."""
    if isinstance(source, Renamed):
        yield from _leaves(source.source)
    elif isinstance(source, Combination):
        for part in source.sources:
            yield from _leaves(part)
    else:
        yield source


def _warn_of_configs(base: Checkpoint, adapters: Iterable[Adapter]) -> None:
    """Tell of fine-tunes whose config computes something else than the base's does."""
    for adapter in adapters:
        file = adapter.path / FINETUNED_CONFIG
        if not file.is_file():
            continue
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        differing = {
            key: config.get(key)
            for key in sorted(config.keys() | base.config.keys())
            if key not in _HARMLESS and config.get(key) != base.config.get(key)
        }
        if differing:
            logger.warning(
                "the fine-tune of %s has another config than %s, which is served: %s; if the "
                "model depends on it, pass --hf-overrides %s",
                adapter.label,
                base.path,
                ", ".join(differing),
                json.dumps(differing),
            )


def _listed(names: Iterable[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    return ", ".join(listed[:_LISTED]) + more
