"""A merge recipe to a checkpoint, or to an adapter: nothing is held but a few parameters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from dare_adapters.checkpoint import (
    Checkpoint,
    ParameterInfo,
    open_checkpoint,
    read_json,
)
from dare_adapters.checkpoint_writer import (
    PART_ENTRIES,
    OutputTensor,
    Parts,
    shards_of_size,
    sum_parts,
    whole_parts,
    write_checkpoint,
)
from dare_adapters.combine.registry import get_method
from dare_adapters.combine.sparsify import RandomMasks
from dare_adapters.companions import is_companion
from dare_adapters.config import CONFIG_NAME
from dare_adapters.delta import Delta, DenseDelta, NewParameter, WeightedDelta
from dare_adapters.errors import AdapterFormatError, CheckpointError, RecipeError
from dare_adapters.finite import first_non_finite
from dare_adapters.merge_models import (
    MergeModel,
    delta_between,
    is_adapter_directory,
    open_model,
)
from dare_adapters.merge_rows import AlignedDelta, AlignedTensor
from dare_adapters.merge_vocabulary import Vocabulary, plan_vocabulary
from dare_adapters.output import complete_directory, require_space
from dare_adapters.parallel import worker_pool
from dare_adapters.recipe import (
    IDENTICAL,
    MergePlan,
    ModelPath,
    ModelReference,
    Recipe,
    TensorOf,
    check_recipe,
    plan_merge,
    read_recipe,
    with_adapter_bases,
)
from dare_adapters.recipe import OutputTensor as PlannedTensor
from dare_adapters.recipe.structure import Inventory
from dare_adapters.source import DeltaSource
from dare_adapters.store import save_source
from dare_adapters.witness import content_seed, encode_witness

__all__ = ["merge"]

RECIPE_FILE = "merge_recipe.yml"
SHARD_BYTES = 5 * 10**9


def merge(
    recipe: str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    as_adapter: bool = False,
    bits: int = 4,
    seed: int = 0,
    mask: str = "auto",
    max_shard_bytes: int = SHARD_BYTES,
    token: str | bool | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Run a recipe in mergekit's grammar, with mergekit's numbers.

    Arithmetic is in float32 and rounded once, to `out_dtype`, `dtype`, or what the inputs have.
    Everything that is not supported is named before a model is opened, and every mismatch before
    anything is written.

    Args:
        recipe: a YAML file, its text, or the same as a mapping. A model may be a DARE or LoRA
            adapter's directory, which stands for its base with it attached.
        out: directory to write.
        as_adapter: write an adapter over `base_model` instead of a checkpoint.
        bits: of an adapter's entries.
        seed: of random choices; they depend on the models' contents, not on their order.
        mask: "auto", "blocked" or "bernoulli": how entries are dropped at random.
        max_shard_bytes: of the checkpoint's files.
        token: hub access token.
        workers: threads; they never change the result.
        overwrite: replace `out` if it exists.
        progress: show a bar.

    Returns:
        `out`.

    Raises:
        RecipeError: the recipe cannot be read, run, or does not fit its models.
        CheckpointError, AdapterFormatError, AdapterNotFoundError: a model cannot be opened.
        AdapterExistsError, DareError: as `complete_directory` says.
    """
    read = read_recipe(recipe)
    check_recipe(_with_bases(read))
    read = _with_bases(read)
    models = _open_models(read, token)
    plan = plan_merge(read, {name: Inventory(m.info, m.config) for name, m in models.items()})
    vocabulary = plan_vocabulary(read, plan, models, as_adapter=as_adapter, token=token)
    aligned = vocabulary.tensors
    run = _Run(plan, [models[reference] for reference in plan.models], seed, mask, aligned)
    target = Path(out)
    if as_adapter:
        base = _plain_base(read, models)
        source = _Merged(run, base, read)
        save_source(
            source, target, bits=bits, description={"recipe": read.text},
            workers=workers, overwrite=overwrite, progress=progress,
        )  # fmt: skip
        vocabulary.write(target)
        return target
    outputs = [run.output(tensor) for tensor in plan.tensors]
    total = sum(tensor.nbytes for tensor in outputs)
    with complete_directory(target, overwrite) as directory:
        require_space(directory, total)
        bar = tqdm(total=total, unit="B", unit_scale=True, desc="merge", disable=not progress)
        with bar, worker_pool(workers) as pool:
            donor, shards = run.models[plan.donor], shards_of_size(outputs, max_shard_bytes)
            write_checkpoint(directory, shards, pool, bar, donor.checkpoint.weights_name)
        _write_companions(directory, donor, plan, read, vocabulary)
    return target


def _with_bases(recipe: Recipe) -> Recipe:
    """With the base that adapters of the recipe name; only local configs are read."""
    bases = {}
    for reference in recipe.inputs:
        if is_adapter_directory(reference.model.path):
            config = read_json(Path(reference.model.path) / CONFIG_NAME, AdapterFormatError)
            named = config.get("base_model_name_or_path")
            if isinstance(named, str):
                revision = config.get("revision")
                bases[reference] = ModelReference(
                    ModelPath(named, revision if isinstance(revision, str) else None)
                )
    return with_adapter_bases(recipe, bases)


def _open_models(recipe: Recipe, token: str | bool | None) -> dict[ModelReference, MergeModel]:
    checkpoints: dict[ModelPath, Checkpoint] = {}

    def checkpoint(path: ModelPath) -> Checkpoint:
        if path not in checkpoints:
            checkpoints[path] = open_checkpoint(path.path, path.revision, token)
        return checkpoints[path]

    def base_of(reference: ModelReference) -> Callable[[], Checkpoint]:
        def base() -> Checkpoint:
            own = recipe.base_model
            if own is None or own == reference or own.lora or is_adapter_directory(own.model.path):
                raise RecipeError(
                    f"{reference} is an adapter; name the checkpoint it is over as base_model"
                )
            return checkpoint(own.model)

        return base

    models = {}
    for reference in recipe.inputs:
        lora = (reference.lora.path, reference.lora.revision) if reference.lora else None
        path = reference.model
        models[reference] = open_model(path.path, path.revision, lora, base_of(reference), token)
    return models


class _Run:
    """What computes a plan's tensors."""

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
        ahead = [*self.checks(planned), *self._ahead.pop(planned.name, [])]
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
        self._ahead[planned.name] = delta.preparations()
        changes, dtype = [WeightedDelta(delta)], planned.out_dtype
        check = _refuse_non_finite(planned.name)
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

        return _checked(planned.name, parts)

    def _copied(self, planned: PlannedTensor, tensor: torch.Tensor) -> Parts:
        scale = planned.options.get("scale")
        if scale is None:
            return _checked(planned.name, whole_parts(tensor, planned.out_dtype))

        def parts(pool: ThreadPoolExecutor) -> Iterator[torch.Tensor]:
            for part in whole_parts(tensor, torch.float32)(pool):
                yield (part * scale).to(planned.out_dtype)

        return _checked(planned.name, parts)

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
        for place in dict.fromkeys((*planned.inputs, *([planned.base] if planned.base else []))):
            checkpoint = self.models[place.model].checkpoint
            if place.name in checkpoint:
                yield partial(_check_finite, checkpoint, place.name)

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


def _check_finite(checkpoint: Checkpoint, name: str) -> None:
    tensor = checkpoint[name]
    if not tensor.is_floating_point():
        return
    flat = tensor.reshape(-1)
    for start in range(0, len(flat), PART_ENTRIES):
        place = first_non_finite(flat[start : start + PART_ENTRIES])
        if place is not None:
            raise CheckpointError(
                f"{checkpoint.path}: {name} holds {float(flat[start + place])} at entry "
                f"{start + place}; a damaged model cannot be merged, get it again"
            )


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


def _refuse_non_finite(name: str) -> Callable[[torch.Tensor], None]:
    """Refuses parts of a tensor that hold NaN or infinity."""

    def check(part: torch.Tensor) -> None:
        if part.is_floating_point() and first_non_finite(part.reshape(-1)) is not None:
            raise CheckpointError(
                f"{name} would hold NaN or infinity: a model that is merged is damaged, or the "
                f"weights take it beyond {part.dtype}; nothing was written"
            )

    return check


def _checked(name: str, parts: Parts) -> Parts:
    """Parts that are refused where they hold NaN or infinity."""
    check = _refuse_non_finite(name)

    def checked(pool: ThreadPoolExecutor) -> Iterator[torch.Tensor]:
        for part in parts(pool):
            check(part)
            yield part

    return checked


def _then(parts: Parts, done: Callable[[], None]) -> Parts:
    """Parts, and what is to be done when all have been made."""

    def all_parts(pool: ThreadPoolExecutor) -> Iterator[torch.Tensor]:
        yield from parts(pool)
        done()

    return all_parts


def _plain_base(recipe: Recipe, models: Mapping[ModelReference, MergeModel]) -> MergeModel:
    base = recipe.base_model
    if base is None or models[base].sources or recipe.slices:
        raise RecipeError(
            "an adapter needs a base_model that is a checkpoint, and its layers as they are (no "
            "slices); write a checkpoint instead"
        )
    return models[base]


class _Merged(DeltaSource):
    """A run's result as a source of deltas from the base."""

    def __init__(self, run: _Run, base: MergeModel, recipe: Recipe) -> None:
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


def _write_companions(
    directory: Path, donor: MergeModel, plan: MergePlan, recipe: Recipe, vocabulary: Vocabulary
) -> None:
    for place in dict.fromkeys((donor.checkpoint.path, donor.path)):
        for file in place.iterdir():
            if file.is_file() and is_companion(file.name):
                shutil.copyfile(file, directory / file.name)
    vocabulary.write(directory)
    config = json.loads(json.dumps(dict(donor.config)))
    for key, value in plan.config_changes.items():
        *outer, last = key.split(".")
        part = config
        for name in outer:
            part = part[name]
        part[last] = value
    vocabulary.change_config(config)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if recipe.text:
        (directory / RECIPE_FILE).write_text(recipe.text, encoding="utf-8")
