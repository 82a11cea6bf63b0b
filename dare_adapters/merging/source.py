"""The result of a merge as a source of deltas, of which an adapter is made."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dare_adapters.combine.registry import get_method
from dare_adapters.delta import Delta, DenseDelta, NewParameter
from dare_adapters.errors import RecipeError
from dare_adapters.merging.models import MergeModel
from dare_adapters.merging.run import MergeRun
from dare_adapters.recipe import Recipe
from dare_adapters.source import DeltaSource
from dare_adapters.witness import encode_witness

__all__ = ["MergedSource"]


class MergedSource(DeltaSource):
    """A run's result as a source of deltas from the base."""

    def __init__(self, run: MergeRun, base: MergeModel, recipe: Recipe) -> None:
        self._run, self._base = run, base
        self._planned = {tensor.name: tensor for tensor in run.plan.tensors}
        missing = [name for name in self._planned if name not in base.info]
        if missing:
            raise RecipeError(
                f"the merge makes {len(missing)} tensors that the base_model lacks "
                f"({', '.join(missing[:6])}); an adapter cannot hold them, write a checkpoint"
            )
        path = recipe.base_model
        assert path is not None
        self.label = f"{recipe.merge_method} of {', '.join(map(str, recipe.inputs))}"
        self.base_model_name_or_path, self.revision = path.model.path, path.model.revision
        self.base_architectures = base.checkpoint.architectures
        floats = [n for n, info in base.info.items() if info.dtype.is_floating_point]
        self.base_parameter_count = sum(base.info[name].numel for name in floats)
        self.witness = {name: encode_witness(name, base.checkpoint[name]) for name in floats}

    def __getitem__(self, name: str) -> Delta | NewParameter:
        planned = self._planned[name]
        base = self._base.checkpoint[name]
        if not base.is_floating_point():
            assert planned.passthrough_of is not None
            return NewParameter(self._run.tensor(planned, planned.passthrough_of))
        for check in self._run.checks(planned):
            check()
        if planned.passthrough_of is None and not get_method(planned.method).on_parameters:
            if self._run.starts_from(planned, name):
                return self._run.delta(planned)
            merged = self._run.delta(planned).dense()
            if planned.base is not None:
                merged += self._run.tensor(planned, planned.base).to(torch.float32)
        elif planned.passthrough_of is None:
            merged = self._run.merged(planned)
        else:
            merged = self._run.tensor(planned, planned.passthrough_of).to(torch.float32)
            merged = merged * planned.options.get("scale", 1.0)
        return DenseDelta(merged - base.to(torch.float32))

    def __iter__(self) -> Iterator[str]:
        return iter(self._planned)

    def __len__(self) -> int:
        return len(self._planned)

    def is_new(self, name: str) -> bool:
        return not self._base.info[name].dtype.is_floating_point

    def stored_bits(self, name: str) -> int:
        return 16

    @property
    def identity(self) -> str:
        return self.label
