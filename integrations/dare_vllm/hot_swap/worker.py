"""A worker's part in a swap: prepare without a change, commit, and roll back.

Every worker of an engine does the same in the same order; see :mod:`dare_vllm.hot_swap.steps`.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.checkpoint_weight_patch import (
    CheckpointWeightPatch,
    load_checkpoint_weight_patches,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

from dare_adapters.errors import (
    ArchitectureMismatchError,
    DareError,
    PatchedModelError,
    UnsupportedParameterError,
)
from dare_adapters.parallel import worker_pool
from dare_vllm.at_load.loader import DareModelLoader
from dare_vllm.hot_swap.layout import check_layout, pack_again, reload_obstacle, sparse_obstacle
from dare_vllm.hot_swap.patches import make_patches, make_whole_patches, write_entries
from dare_vllm.hot_swap.windows import Window, find_windows, live_storages
from dare_vllm.merged_weights import MergedWeights
from dare_vllm.mixture import LOAD_FORMAT, Mixture, loaded_mixture

__all__ = ["ROUTES", "SwapWorker", "answer"]

ROUTES = ("auto", "reload", "sparse")

logger = logging.getLogger("vllm.dare")

# Load formats whose weights are those of the checkpoint that this package reads.
_CHECKPOINT_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", LOAD_FORMAT)
# Bytes of patches that are held at a time.
_BATCH_BYTES = 256 << 20


PatchMaker = Callable[
    [MergedWeights, MergedWeights, ThreadPoolExecutor, torch.device, Collection[str]],
    Iterator[CheckpointWeightPatch],
]
"""Of two mixtures, what makes the first of the second, but in parameters that are so already."""


@dataclass
class _Swap:
    """A mixture that was checked, and what it takes the place of."""

    token: str
    route: str
    loader: DareModelLoader
    before: Mixture
    old: MergedWeights
    new: MergedWeights
    # On the sparse route, where the model has parameters that it keeps as the checkpoint does.
    windows: dict[str, list[Window]] = field(default_factory=dict)
    written: bool = False  # in whole or in part, and not undone


def answer(worker: Any, method: str, *arguments: Any) -> dict[str, Any]:
    """Call a method of a worker's :class:`SwapWorker`; an error comes back as plain JSON.

    Raising it would say as little as a string to the engine's other processes.
    """
    swapper = worker.__dict__.setdefault("_dare_swap", None) or SwapWorker(worker)
    worker.__dict__["_dare_swap"] = swapper
    try:
        result = getattr(swapper, method)(*arguments)
        assert isinstance(result, dict)
        return result
    except Exception as error:
        if not isinstance(error, DareError):
            logger.exception("dare: %s failed", method)
        return {"error": type(error).__name__, "message": str(error)}


class SwapWorker:
    """What one worker knows of the mixture it has.

    Args:
        worker: vLLM's.
    """

    def __init__(self, worker: Any) -> None:
        self.worker = worker
        self._current: MergedWeights | None = None
        self._current_key: object = None
        self._prepared: _Swap | None = None
        self._compared: set[str] = set()
        self._windows: dict[str, list[Window] | None] = {}

    def mixture(self) -> dict[str, Any]:
        """The mixture that the engine has now."""
        return self._mixture.to_config()

    def prepare(self, token: str, config: dict[str, Any], route: str) -> dict[str, Any]:
        """Open and check a mixture; nothing in the model changes.

        Args:
            token: what :meth:`commit` will name.
            config: of the mixture.
            route: "reload" writes every weight anew, "sparse" only those entries that the old or
                the new mixture touches; "auto": "reload" where the model allows it, which was the
                faster one wherever both were timed.

        Raises:
            DareError: the mixture cannot be had in this engine, or not by this route.
        """
        if route not in ROUTES:
            raise ValueError(f"route is {route!r:.40}; there are {', '.join(ROUTES)}")
        self._prepared = None
        load_format = self._load_config.load_format
        if load_format not in _CHECKPOINT_FORMATS:
            raise UnsupportedParameterError(
                f"the engine was loaded with load_format={load_format!r}, whose weights are not "
                f"those of a checkpoint; start it with load_format={LOAD_FORMAT!r}"
            )
        if self.worker.vllm_config.parallel_config.data_parallel_size > 1:
            raise UnsupportedParameterError(
                "an engine with data_parallel_size > 1 cannot be swapped as one: run its replicas "
                "as servers of their own and swap each"
            )
        mixture = Mixture.from_config(config)
        old = self._open_current()
        loader = self._loader(mixture)
        new = loader.open_mixture(self._model_config, old.base)
        self._check_same_tensors(old, new)
        if route == "auto":
            route = "reload" if reload_obstacle(self._model) is None else "sparse"
        if route == "sparse":
            obstacle = sparse_obstacle(self._model, self._model_config)
            if obstacle is not None:
                raise UnsupportedParameterError(
                    f"single entries cannot be written: {obstacle}; swap with route='reload'"
                )
            self._check_layout(old, new)
        else:
            obstacle = reload_obstacle(self._model)
            if obstacle is not None:
                raise UnsupportedParameterError(
                    f"weights cannot be loaded again: {obstacle}; start an engine with the mixture"
                )
        self._prepared = _Swap(token, route, loader, self._mixture, old, new)
        if route == "sparse":
            self._prepared.windows = self._find_windows(old, new)
        return {"route": route}

    def commit(self, token: str) -> dict[str, Any]:
        """Write the prepared mixture; on any failure the old one is back.

        Raises:
            PatchedModelError: another swap was prepared since.
        """
        swap = self._of(token)
        start = time.perf_counter()
        swap.written = True
        try:
            entries = self._write(swap, swap.new, swap.old, make_patches)
        except BaseException:
            self._restore(swap)
            raise
        self._set_current(swap.loader.mixture, swap.new)
        return {"route": swap.route, "seconds": time.perf_counter() - start, "entries": entries}

    def rollback(self, token: str) -> dict[str, Any]:
        """Bring the old mixture back, where a commit of this token has not done so itself."""
        swap = self._of(token)
        if swap.written:
            self._restore(swap)
            self._set_current(swap.before, swap.old)
        return {}

    def _write(
        self, swap: _Swap, target: MergedWeights, other: MergedWeights, make: PatchMaker
    ) -> int:
        """Make the model's weights those of `target`; how many entries were written.

        Args:
            make: on the sparse route, what is to be written.
        """
        runner, model = self.worker.model_runner, self._model
        with set_current_vllm_config(self.worker.vllm_config):
            if swap.route == "reload":
                weights = swap.loader.base_weights(self._model_config, model)
                counted = _Counted(swap.loader.add_mixture(target, weights, model))
                runner.reload_weights(weights_iterator=iter(counted))
                pack_again(model, reloaded=True)
                return counted.entries
            entries = 0
            written: list[str] = []
            for name, windows in swap.windows.items() if make is make_patches else ():
                entries += write_entries(windows, target, other, name)
                written.append(name)
            with worker_pool() as pool:
                patches = make(target, other, pool, self.worker.device, written)
                for batch in _batches(patches):
                    entries += sum(patch.values.numel() for patch in batch)
                    load_checkpoint_weight_patches(model, batch, validate_unique_indices=False)
            pack_again(model, reloaded=False)
            # What vLLM's own reload does after it.
            runner.reset_lora_state()
            runner.reset_encoder_cache()
            runner.reset_mm_cache()
        return entries

    def _restore(self, swap: _Swap) -> None:
        if swap.route == "reload":
            # Layers that got only some of their weights are still waiting for the rest.
            with set_current_vllm_config(self.worker.vllm_config):
                finalize_layerwise_reload(self._model, self._model_config)
        self._write(swap, swap.old, swap.new, make_whole_patches)
        swap.written = False

    def _check_same_tensors(self, old: MergedWeights, new: MergedWeights) -> None:
        """A running model cannot gain or lose a parameter, or change its shape."""
        names = sorted(old.shapes.keys() | new.shapes.keys())
        differing = [name for name in names if old.shapes.get(name) != new.shapes.get(name)]
        if differing:
            told = [
                f"{name} ({_tell(old.shapes.get(name))} now, {_tell(new.shapes.get(name))} then)"
                for name in differing[:4]
            ]
            raise ArchitectureMismatchError(
                f"the mixture would change which parameters the model has: {', '.join(told)}; "
                "start an engine with it"
            )
        if self._model_config.word_embeddings_untied_by_checkpoint and self._shares_head():
            raise UnsupportedParameterError(
                "vLLM tied the head to the embedding because they were equal, and a mixture may "
                f"set them apart; start the engine with load_format={LOAD_FORMAT!r}"
            )

    def _shares_head(self) -> bool:
        weights = self._model.named_parameters(remove_duplicate=False)
        places = {name.replace(".base_layer.", "."): w.data_ptr() for name, w in weights}
        heads = {place for name, place in places.items() if name.endswith("lm_head.weight")}
        others = {place for name, place in places.items() if not name.endswith("lm_head.weight")}
        return bool(heads & others - {0})

    def _check_layout(self, old: MergedWeights, new: MergedWeights) -> None:
        """Compare what the model has with base and old mixture, once for each parameter."""
        names = [n for n in dict.fromkeys([*old.changed, *new.changed]) if n not in self._compared]
        with worker_pool() as pool, set_current_vllm_config(self.worker.vllm_config):
            for name in names:
                if name in old.new:
                    continue
                tensor = old.merged(name, old.base[name], pool)
                check_layout(self._model, old.renamed(name), tensor)
                self._compared.add(name)

    def _find_windows(self, old: MergedWeights, new: MergedWeights) -> dict[str, list[Window]]:
        """Where the model has what either mixture changes; without those of other kinds."""
        copies = {**old.copies, **new.copies}
        changed = [n for n in dict.fromkeys([*old.changed, *new.changed]) if n not in old.new]
        wanted = {
            name: [new.renamed(own) for own in (name, *(h for h in copies if copies[h] == name))]
            for name in changed
            if name not in new.new
        }
        storages = live_storages(self._model)
        for name, windows in list(self._windows.items()):
            if any(w.live.untyped_storage().data_ptr() not in storages for w in windows or ()):
                del self._windows[name]  # it was loaded again, elsewhere
        lacking = [
            (own, _like(new.base[name], new.shapes[own]))
            for name, names in wanted.items()
            for own in names
            if own not in self._windows
        ]
        with set_current_vllm_config(self.worker.vllm_config):
            self._windows.update(find_windows(self._model, lacking))
        found: dict[str, list[Window]] = {}
        for name, names in wanted.items():
            here = [self._windows.get(own) for own in names]
            if None not in here:
                found[name] = [window for windows in here for window in windows or ()]
        return found

    def _open_current(self) -> MergedWeights:
        """What the model has, from the swap before or as the load config has it."""
        key = (self._model_config.model, self._model_config.revision, self._mixture)
        if self._current is None or key != self._current_key:
            self._current = self._loader(self._mixture).open_mixture(self._model_config)
            self._current_key, self._compared = key, set()
        return self._current

    def _loader(self, mixture: Mixture) -> DareModelLoader:
        return DareModelLoader(dataclasses.replace(self._load_config, **self._settings(mixture)))

    def _set_current(self, mixture: Mixture, merged: MergedWeights) -> None:
        """Remember a mixture, and let vLLM's own `reload_weights` load it."""
        self.worker.update_config({"load_config": self._settings(mixture)})
        self._current = merged
        self._current_key = (self._model_config.model, self._model_config.revision, self._mixture)

    def _settings(self, mixture: Mixture) -> dict[str, Any]:
        """Fields of the load config for a mixture, what else was set there kept."""
        others = Mixture.split(self._load_config.model_loader_extra_config or {})[1]
        extra = {**others, **mixture.to_config()}
        return {"load_format": LOAD_FORMAT, "model_loader_extra_config": extra}

    def _of(self, token: str) -> _Swap:
        swap = self._prepared
        if swap is None or swap.token != token:
            raise PatchedModelError("another swap was prepared since; nothing was changed")
        return swap

    @property
    def _mixture(self) -> Mixture:
        return loaded_mixture(self._load_config)

    @property
    def _load_config(self) -> Any:
        return self.worker.vllm_config.load_config

    @property
    def _model_config(self) -> Any:
        return self.worker.vllm_config.model_config

    @property
    def _model(self) -> Any:
        return self.worker.get_model()


class _Counted:
    """An iterator of weights that counts their entries."""

    def __init__(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        self._weights, self.entries = weights, 0

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._weights:
            self.entries += tensor.numel()
            yield name, tensor


def _batches(patches: Iterable[CheckpointWeightPatch]) -> Iterator[list[CheckpointWeightPatch]]:
    batch: list[CheckpointWeightPatch] = []
    size = 0
    for patch in patches:
        if not patch.values.numel():
            continue
        assert patch.indices is not None
        batch.append(patch)
        size += patch.values.nbytes + patch.indices.nbytes
        if size > _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _like(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of a shape, the given one where it has it."""
    return tensor if tuple(tensor.shape) == shape else tensor.new_empty(shape)


def _tell(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))
