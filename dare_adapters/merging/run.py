"""What computes the tensors of a merge plan, a range of rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dare_adapters.checkpoint import Checkpoint, ParameterInfo
from dare_adapters.checkpoint_writer import OutputTensor, Parts, sum_parts, whole_parts
from dare_adapters.combine.registry import get_method
from dare_adapters.combine.sparsify import RandomMasks
from dare_adapters.delta import Delta, DenseDelta, WeightedDelta
from dare_adapters.errors import RecipeError
from dare_adapters.merging.damage import check_input, checked, refusing_damage
from dare_adapters.merging.models import MergeModel, delta_between
from dare_adapters.merging.rows import AlignedDelta, AlignedTensor
from dare_adapters.recipe import IDENTICAL, MergePlan, TensorOf
from dare_adapters.recipe import OutputTensor as PlannedTensor
from dare_adapters.source import DeltaSource
from dare_adapters.witness import content_seed

__all__ = ["MergeRun"]


class MergeRun:
    """What computes a plan's tensors.

    Args:
        plan: of the merge.
        models: that its numbers are of.
        seed, mask: of what is dropped at random.
        aligned: vocabulary tensors whose rows differ between models, by the output's names.
    """

    def __init__(
        self,
        plan: MergePlan,
        models: list[MergeModel],
        seed: int,
        mask: str,
        aligned: Mapping[str, AlignedTensor],
    ) -> None:
        self.plan, self.models, self.seed, self.mask = plan, models, seed, mask
        self.aligned = aligned
        self._seeds: dict[int, int] = {}
        self._contents: dict[Path, int] = {}
        self._ahead: dict[str, list[Callable[[], object]]] = {}

    def output(self, planned: PlannedTensor) -> OutputTensor:
        """One tensor to write."""
        shape, parts = self._made(planned)
        released = _then(parts, lambda: self._release(planned))
        ahead = self._ahead.pop(planned.name, None)
        if ahead is None:
            ahead = list(self.checks(planned))
        return OutputTensor(planned.name, planned.out_dtype, shape, released, ahead)

    def _made(self, planned: PlannedTensor) -> tuple[tuple[int, ...], Parts]:
        aligned = self.aligned.get(planned.name)
        place = planned.passthrough_of
        if place is not None and aligned is not None:
            own = place.model
            return aligned.shape, _later(lambda: self._copied(planned, aligned.whole(own)))
        if place is not None:
            tensor = self.tensor(planned, place)
            if planned.method == IDENTICAL:
                self._require_identical(planned, tensor)
            return tuple(tensor.shape), self._copied(planned, tensor)
        first = planned.base or planned.inputs[0]
        shape = aligned.shape if aligned else self.models[first.model].info[first.name].shape
        if get_method(planned.method).on_parameters:
            return shape, self._of_parameters(planned)
        delta = self.delta(planned)
        changes, dtype = [WeightedDelta(delta)], planned.out_dtype
        # What is wrong with a base shows in the sum, entry for entry.
        shows = delta.shows_damage and planned.base is not None and aligned is None
        looked_at = [] if shows else list(self.checks(planned))
        self._ahead[planned.name] = [*looked_at, *delta.preparations()]
        check = refusing_damage(planned.name, self._look_again(planned) if shows else None)
        if planned.base is None:
            return shape, _only(delta, dtype, check)
        if aligned is not None:
            own = planned.base.model
            return shape, _later(lambda: sum_parts(aligned.whole(own), changes, dtype, check=check))
        return shape, sum_parts(self.tensor(planned, planned.base), changes, dtype, check=check)

    def delta(self, planned: PlannedTensor) -> Delta:
        """Of a method on deltas: from the base, or, where there is none, from zero."""
        method = get_method(planned.method)
        aligned = self.aligned.get(planned.name)
        deltas: list[Delta]
        if aligned is not None:
            base_number = None if planned.base is None else planned.base.model
            deltas = [AlignedDelta(aligned, one.model, base_number) for one in planned.inputs]
        elif planned.base is None:
            deltas = [DenseDelta(self.tensor(planned, one)) for one in planned.inputs]
        else:
            base = self.models[planned.base.model]
            deltas = [
                delta_between(base, planned.base.name, self.models[one.model], one.name)
                for one in planned.inputs
            ]
        given: dict[str, Any] = {"name": planned.name} if "name" in method.given else {}
        if "masks" in method.given:
            seeds = [self._seed_of(one.model) for one in planned.inputs]
            given["masks"] = RandomMasks(planned.name, seeds, self.mask)
        made = method.function(deltas, planned.weights, **planned.options, **given)
        assert isinstance(made, Delta)
        return made

    def merged(self, planned: PlannedTensor) -> torch.Tensor:
        """Of a method on parameters: the merged one, float32."""
        method = get_method(planned.method)
        given: dict[str, Any] = {"name": planned.name} if "name" in method.given else {}
        if "base" in method.given:
            given["base"] = None
            if planned.base is not None:
                given["base"] = self.tensor(planned, planned.base).to(torch.float32)
        parameters = [
            self.tensor(planned, one).to(torch.float32, copy=True) for one in planned.inputs
        ]
        made = method.function(parameters, planned.weights, **planned.options, **given)
        assert isinstance(made, torch.Tensor)
        return made

    def _of_parameters(self, planned: PlannedTensor) -> Parts:
        def parts(pool: ThreadPoolExecutor) -> Iterator[torch.Tensor]:
            yield from whole_parts(self.merged(planned), planned.out_dtype)(pool)

        return checked(planned.name, parts)

    def _copied(self, planned: PlannedTensor, tensor: torch.Tensor) -> Parts:
        scale = planned.options.get("scale")
        if scale is None:
            return checked(planned.name, whole_parts(tensor, planned.out_dtype))

        def parts(pool: ThreadPoolExecutor) -> Iterator[torch.Tensor]:
            for part in whole_parts(tensor, torch.float32)(pool):
                yield (part * scale).to(planned.out_dtype)

        return checked(planned.name, parts)

    def _require_identical(self, planned: PlannedTensor, tensor: torch.Tensor) -> None:
        for one in planned.inputs:
            if not torch.equal(self.tensor(planned, one), tensor):
                raise RecipeError(
                    f"{planned.name} is a table of {tensor.dtype} that differs between "
                    f"{self.plan.models[planned.inputs[0].model]} and "
                    f"{self.plan.models[one.model]}; it cannot be merged"
                )

    def tensor(self, planned: PlannedTensor, place: TensorOf) -> torch.Tensor:
        """An input of a tensor, whole."""
        if planned.name in self.aligned:
            return self.aligned[planned.name].whole(place.model)
        return self.models[place.model].parameter(place.name)

    def starts_from(self, planned: PlannedTensor, name: str) -> bool:
        """Whether a tensor's deltas are from what the base has under a name, as it stands."""
        if planned.base is None or planned.base.name != name:
            return False
        model, aligned = planned.base.model, self.aligned.get(planned.name)
        rows = self.models[model].info[name].shape[0] if aligned else 0
        return aligned is None or aligned.plan.keeps(model, rows)

    def checks(self, planned: PlannedTensor) -> Iterator[Callable[[], object]]:
        """Each input's numbers looked at: a method that trims or votes would lose a NaN in them."""
        seen = set()  # adapters have one checkpoint
        for place in (*planned.inputs, *([planned.base] if planned.base else [])):
            checkpoint = self.models[place.model].checkpoint
            if place.name in checkpoint and (checkpoint.path, place.name) not in seen:
                seen.add((checkpoint.path, place.name))
                yield partial(check_input, checkpoint, place.name)

    def _look_again(self, planned: PlannedTensor) -> Callable[[], None]:
        """What names the input that is damaged, where one is."""

        def look() -> None:
            for check in self.checks(planned):
                check()

        return look

    def _release(self, planned: PlannedTensor) -> None:
        if planned.name in self.aligned:
            self.aligned[planned.name].release()
        for one in (*planned.inputs, *([planned.base] if planned.base else [])):
            self.models[one.model].release(one.name)

    def _seed_of(self, number: int) -> int:
        if number not in self._seeds:
            model = self.models[number]
            own = self._content_of(model.checkpoint)
            identity = "+".join([str(own), *(source.identity for source in model.sources)])
            self._seeds[number] = _Identity(identity).mask_seed(self.seed)
        return self._seeds[number]

    def _content_of(self, checkpoint: Checkpoint) -> int:
        """The seed that a checkpoint's content gives; adapters over one base share the reading."""
        if checkpoint.path not in self._contents:
            self._contents[checkpoint.path] = content_seed(_each_released(checkpoint))
        return self._contents[checkpoint.path]


def _each_released(checkpoint: Checkpoint) -> Iterator[tuple[str, ParameterInfo, torch.Tensor]]:
    """Every tensor, its memory let go of before the next one."""
    for name in sorted(checkpoint):
        yield name, checkpoint.info[name], checkpoint[name]
        checkpoint.release(name)


class _Identity(DeltaSource):
    """Only what :meth:`DeltaSource.mask_seed` needs."""

    def __init__(self, identity: str) -> None:
        self._identity = identity

    @property
    def identity(self) -> str:
        return self._identity

    def __getitem__(self, name: str) -> Delta:
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def _only(delta: Delta, dtype: torch.dtype, check: Callable[[torch.Tensor], None]) -> Parts:
    """A delta from zero."""
    zero = torch.zeros(1).expand(delta.rows * delta.columns).view(delta.shape)
    return sum_parts(zero, [WeightedDelta(delta)], dtype, check=check)


def _later(make: Callable[[], Parts]) -> Parts:
    """Parts of what takes memory from the moment it is made."""

    def parts(pool: ThreadPoolExecutor) -> Iterator[torch.Tensor]:
        yield from make()(pool)

    return parts


def _then(parts: Parts, done: Callable[[], None]) -> Parts:
    """Parts, and what is to be done when all have been made."""

    def all_parts(pool: ThreadPoolExecutor) -> Iterator[torch.Tensor]:
        yield from parts(pool)
        done()

    return all_parts
