"""One live base encoder under the heads of its fine-tunes: what every GLUE experiment scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dare_adapters.checkpoint import open_checkpoint
from dare_adapters.difference import Difference, Finetuned
from dare_adapters.errors import CheckpointError
from dare_adapters.live import locate
from dare_adapters.pairing import pair_parameters
from dare_adapters.source import DeltaSource, Renamed
from dare_eval.glue.tasks import Task
from dare_eval.glue.train import load_classifier

__all__ = ["GlueEncoder"]


class GlueEncoder:
    """The base's encoder, which adapters go on and come off, and each task's own head over it.

    Only the encoder is ever dropped from or merged; heads, whatever an architecture's head is, stay
    the fine-tune's (MergeLM leaves `.*classifier.*` out).

    Args:
        base: directory or hub id.
        finetuned: a fine-tune for each task.
        device: where to compute; default: a GPU if there is one.

    Attributes:
        classifiers: by task's name: its head over the one encoder.
        encoder: with which adapters work; as the base has it unless one is worn.
        deltas: by task's name: fine-tune minus base of the encoder, nothing dropped or rounded.
    """

    def __init__(
        self, base: str, finetuned: Mapping[Task, str | Path], device: str | None = None
    ) -> None:
        self.base, self.finetuned = base, {task.name: str(p) for task, p in finetuned.items()}
        self.classifiers: dict[str, Any] = {
            task.name: load_classifier(path, task.labels) for task, path in finetuned.items()
        }
        first = next(iter(self.classifiers.values()))
        other = [m for m in self.classifiers.values() if type(m) is not type(first)]
        if other:
            raise CheckpointError(
                f"the fine-tunes are of different architectures, {type(first).__name__} and "
                f"{type(other[0]).__name__}; all must be of {base}'s"
            )
        self.encoder = _base_encoder(base, type(first))
        for classifier in self.classifiers.values():
            setattr(classifier, classifier.base_model_prefix, self.encoder)
            classifier.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.deltas = {
            name: self.inside(_difference(base, path)) for name, path in self.finetuned.items()
        }

    def inside(self, source: DeltaSource) -> DeltaSource:
        """What a source changes of the encoder, without its head."""
        shared = [name for name in source if not source.is_new(name)]
        places = locate(self.encoder, shared)
        return Renamed(source, {name: name for name in shared if places[name] is not None})

    @contextmanager
    def wearing(self, source: DeltaSource) -> Iterator[None]:
        """The encoder with a source's deltas in it inside the block, and the base's after it."""
        self.encoder.load_dare_adapter(source, "worn")
        try:
            yield
        finally:
            self.encoder.delete_dare_adapter("worn")

    @contextmanager
    def merged(self, tasks: Sequence[str], method: str, **options: Any) -> Iterator[None]:
        """The encoder with the deltas of these tasks, combined by a method, inside the block.

        Args:
            tasks: one or more.
            method: a combination type.
            **options: of `add_weighted_adapter`.
        """
        for task in tasks:
            self.encoder.load_dare_adapter(self.deltas[task], task, activate=False)
        try:
            self.encoder.add_weighted_adapter(
                list(tasks), [1.0] * len(tasks), "merged", combination_type=method, **options
            )
            self.encoder.set_dare_adapter("merged")
            yield
        finally:
            for name in list(self.encoder.dare_adapters):
                self.encoder.delete_dare_adapter(name)

    def model(self, task: str) -> nn.Module:
        """The task's classifier, with whatever the encoder wears."""
        found: nn.Module = self.classifiers[task]
        return found


def _base_encoder(base: str, kind: Any) -> Any:
    """The base's encoder in float32, found under the task's class."""
    try:
        return kind.from_pretrained(base, dtype=torch.float32).base_model.eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{base} does not load as a {kind.__name__}: {error}") from error


def _difference(base: str, finetuned: str) -> DeltaSource:
    one, other = open_checkpoint(base), open_checkpoint(finetuned)
    return Finetuned(Difference(one, other, pair_parameters(one, other)))
