"""A merge recipe to a checkpoint, or to an adapter: nothing is held but a few parameters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from dare_adapters.checkpoint import Checkpoint, open_checkpoint, read_json
from dare_adapters.checkpoint_writer import shards_of_size, write_checkpoint
from dare_adapters.companions import is_companion
from dare_adapters.config import CONFIG_NAME
from dare_adapters.errors import AdapterFormatError, RecipeError
from dare_adapters.merging.models import MergeModel, is_adapter_directory, open_model
from dare_adapters.merging.run import MergeRun
from dare_adapters.merging.source import MergedSource
from dare_adapters.merging.vocabulary import Vocabulary, plan_vocabulary
from dare_adapters.output import complete_directory, require_space
from dare_adapters.parallel import worker_pool
from dare_adapters.recipe import (
    MergePlan,
    ModelPath,
    ModelReference,
    Recipe,
    check_recipe,
    plan_merge,
    read_recipe,
    with_adapter_bases,
)
from dare_adapters.recipe.structure import Inventory
from dare_adapters.store import save_source

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
    run = MergeRun(plan, [models[reference] for reference in plan.models], seed, mask, aligned)
    target = Path(out)
    if as_adapter:
        base = _plain_base(read, models)
        source = MergedSource(run, base, read)
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


def _plain_base(recipe: Recipe, models: Mapping[ModelReference, MergeModel]) -> MergeModel:
    base = recipe.base_model
    if base is None or models[base].sources or recipe.slices:
        raise RecipeError(
            "an adapter needs a base_model that is a checkpoint, and its layers as they are (no "
            "slices); write a checkpoint instead"
        )
    return models[base]


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
