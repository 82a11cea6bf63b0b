"""`dare-eval lm run`, `drop` and `merge`: cells of a decoder, a mixture and a task."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dare_adapters
from dare_adapters.mask import block_size
from dare_adapters.open_source import open_source
from dare_eval.identity import model_identity
from dare_eval.lm.decoder import Decoder
from dare_eval.lm.evaluation import Evaluation, check_task
from dare_eval.lm.masked_weights import masked_weights
from dare_eval.lm.mixture import Mixture
from dare_eval.records import Cell, Records

__all__ = ["DROP_METHODS", "DropAxes", "Laboratory", "MergeAxes"]

DROP_METHODS = ("dare", "drop_only", "magnitude", "masked_weights")

Wearing = Callable[[], AbstractContextManager[Mixture]]
"""Makes a mixture that a cell needs, and unmakes what it wrote for it."""


@dataclass(frozen=True)
class DropAxes:
    """What is varied of a fine-tune's delta.

    Attributes:
        methods: of DROP_METHODS; "masked_weights" drops from the weights, not from the delta.
        drop_rates: p, each in [0, 1).
        masks: "auto", "blocked", "bernoulli"; rates that "blocked" cannot have are left out of it.
        bits: of survivors; 32 rounds nothing, fewer are stored and read as an adapter.
        seeds: of masks; magnitude has none.
    """

    methods: Sequence[str] = DROP_METHODS
    drop_rates: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99)
    masks: Sequence[str] = ("auto",)
    bits: Sequence[int] = (32,)
    seeds: Sequence[int] = (0,)

    def points(self) -> Iterator[dict[str, Any]]:
        """Every combination that means something."""
        for method, rate in itertools.product(self.methods, self.drop_rates):
            random = method != "magnitude"
            masks = self.masks if random else [None]
            bits = [32] if method == "masked_weights" else self.bits
            for mask, width, seed in itertools.product(
                masks, bits, self.seeds if random else [None]
            ):
                if mask == "blocked" and block_size(rate) is None:
                    continue
                point = {"method": method, "drop_rate": rate, "mask": mask}
                yield {**point, "bits": width, "seed": seed}


@dataclass(frozen=True)
class MergeAxes:
    """How models are made one.

    Attributes:
        combination_types: of `dare_adapters.method_names()`.
        options: of the combination types; each has those that it knows.
        weight: of every model.
        drop_rates: of DARE before the method; 0 is without.
        seeds: of masks, where there are any.
        pairs: merge every pair, not all at once.
    """

    combination_types: Sequence[str] = ("average", "task_arithmetic")
    options: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    drop_rates: Sequence[float] = (0.0, 0.2)
    seeds: Sequence[int] = (0,)
    pairs: bool = False

    def points(self) -> Iterator[dict[str, Any]]:
        """Every combination that means something, with the options that its method knows."""
        from dare_adapters.combine.registry import get_method

        for name, rate in itertools.product(self.combination_types, self.drop_rates):
            known = get_method(name).options
            options = {key: value for key, value in self.options.items() if key in known}
            draws = rate > 0 or name.startswith(("dare", "della"))
            for seed in self.seeds if draws else [None]:
                method = {"method": name, "dare": rate > 0, "drop_rate": rate, "seed": seed}
                yield {**method, "weight": self.weight, "options": options}


class Laboratory:
    """A base, the tasks it is measured on, and where results go.

    Args:
        base: directory or hub id.
        tasks: see :class:`.evaluation.Evaluation`.
        records: where results go.
        evaluation: how each is measured.
        backend: "transformers" or "vllm".
        model_arguments: of the harness model, such as dtype and batch_size.
        work: directory for what has to be on disk for a while; default: one that is removed.

    Raises:
        RefusedCodeError, SandboxUnavailableError: as `check_task`.
    """

    def __init__(
        self,
        base: str,
        tasks: Sequence[str],
        records: Records,
        evaluation: Evaluation,
        *,
        backend: str = "transformers",
        model_arguments: Mapping[str, Any] | None = None,
        work: Path | None = None,
    ) -> None:
        for task in tasks:
            check_task(task, evaluation.allow_code_execution)
        self.base, self.tasks, self.records = base, tasks, records
        self.evaluation, self.backend, self._work = evaluation, backend, work
        self.model_arguments = dict(model_arguments or {})
        self._decoder = Decoder(base, backend, self.model_arguments)
        self._identity = model_identity(base)

    def run(self, adapters: Sequence[str], finetuned: Sequence[str]) -> None:
        """The base, adapters over it, and fine-tunes as they are, on every task."""
        experiment = "lm-run"
        cells = self._cells(experiment, {"method": "base"}, _always(Mixture()))
        for adapter in adapters:
            config = {"method": "adapter", "model": _adapter_identity(adapter)}
            cells += self._cells(experiment, config, _always(Mixture((adapter,), (1.0,))))
        for model in finetuned:
            cells += self._finetuned_cells(experiment, model)
        self._run(cells, "lm run")

    def drop(self, finetuned: Sequence[str], axes: DropAxes) -> None:
        """Each fine-tune under every drop rate and method, beside itself and the base."""
        experiment = "lm-drop"
        cells = self._cells(experiment, {"method": "base"}, _always(Mixture()))
        for model in finetuned:
            identity = model_identity(model)
            cells += self._finetuned_cells(experiment, model)
            for point in axes.points():
                config = {"finetuned": identity, **point}
                cells += self._cells(experiment, config, self._dropped(model, point))
        self._run(cells, "lm drop")

    def merge(self, models: Sequence[str], axes: MergeAxes) -> None:
        """Fine-tunes or adapters over the base made one by every method, beside each alone."""
        experiment = "lm-merge"
        identities = {model: self._any_identity(model) for model in models}
        cells: list[Cell] = []
        for model in models:
            config = {"method": "single", "models": [identities[model]]}
            cells += self._cells(experiment, config, self._merged([model], {}))
        size = 2 if axes.pairs else len(models)
        for chosen in itertools.combinations(models, size):
            for point in axes.points():
                config = {"models": [identities[model] for model in chosen], **point}
                cells += self._cells(experiment, config, self._merged(chosen, point))
        self._run(cells, "lm merge")

    def _run(self, cells: list[Cell], description: str) -> None:
        try:
            self.records.run_all(cells, description)
        finally:
            self._decoder.close()

    def _cells(self, experiment: str, own: Mapping[str, Any], wearing: Wearing) -> list[Cell]:
        """One cell for each task."""
        cells: list[Cell] = []
        for task in self.tasks:
            config = self._config(experiment, task, own)

            def measure(task: str = task, config: Mapping[str, Any] = config) -> dict[str, Any]:
                with wearing() as mixture:
                    return self._measure(self._decoder, mixture, task, config)

            cells.append((config, measure))
        return cells

    def _finetuned_cells(self, experiment: str, model: str) -> list[Cell]:
        """A full checkpoint, loaded as it is."""
        cells: list[Cell] = []
        own = {"method": "finetuned", "finetuned": model_identity(model)}
        for task in self.tasks:
            config = self._config(experiment, task, own)

            def measure(task: str = task, config: Mapping[str, Any] = config) -> dict[str, Any]:
                self._decoder.close()
                decoder = Decoder(model, self.backend, self.model_arguments)
                try:
                    return self._measure(decoder, Mixture(), task, config)
                finally:
                    decoder.close()

            cells.append((config, measure))
        return cells

    def _config(self, experiment: str, task: str, own: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "experiment": experiment,
            "task": task,
            "base": self._identity,
            "backend": self.backend,
            "model_arguments": self.model_arguments,
            **self.evaluation.config(),
            **own,
        }

    def _measure(
        self, decoder: Decoder, mixture: Mixture, task: str, config: Mapping[str, Any]
    ) -> dict[str, Any]:
        name = self.records.path(config).stem
        return self.evaluation.measure(decoder.wearing(mixture), task, name)

    def _dropped(self, model: str, point: Mapping[str, Any]) -> Wearing:
        """What is left of a fine-tune."""

        def wearing() -> AbstractContextManager[Mixture]:
            if point["bits"] < 32 or point["method"] == "masked_weights":
                return _Scratch(self._work, lambda folder: self._extracted(model, point, folder))
            options = {"prune": point["method"], "drop_rate": point["drop_rate"]}
            if point["mask"] is not None:
                options |= {"mask": point["mask"], "seed": point["seed"]}
            return _Scratch(self._work, lambda folder: self._whole([model], folder, options))

        return wearing

    def _merged(self, models: Sequence[str], point: Mapping[str, Any]) -> Wearing:
        def wearing() -> AbstractContextManager[Mixture]:
            options = dict(point.get("options", {}))
            if point.get("dare"):
                options |= {"prune": "dare", "drop_rate": point["drop_rate"]}
            if point.get("seed") is not None:
                options["seed"] = point["seed"]

            def make(folder: Path) -> Mixture:
                how = (point.get("method", "linear"), point.get("weight", 1.0))
                return self._whole(models, folder, options, *how)

            return _Scratch(self._work, make)

        return wearing

    def _whole(
        self,
        models: Sequence[str],
        folder: Path,
        options: Mapping[str, Any],
        combination_type: str = "linear",
        weight: float = 1.0,
    ) -> Mixture:
        """A mixture of models; of a fine-tune its whole delta is written to `folder` first."""
        adapters = [
            model if _is_adapter(model) else self._extract(model, folder / str(number))
            for number, model in enumerate(models)
        ]
        weights = (weight,) * len(adapters)
        return Mixture(tuple(adapters), weights, combination_type, options)

    def _extracted(self, model: str, point: Mapping[str, Any], folder: Path) -> Mixture:
        """An adapter that is written as such, rounded to a few bits."""
        if point["method"] == "masked_weights":
            masked = masked_weights(
                model, folder / "masked", point["drop_rate"], point["seed"], point["mask"]
            )
            return Mixture((self._extract(str(masked), folder / "adapter"),), (1.0,))
        rate = point["drop_rate"]
        adapter = self._extract(
            model,
            folder / "adapter",
            drop_rate=rate,
            # A rate by pattern is for every parameter, also those that are else kept whole.
            drop_rates={"*": rate},
            bits=point["bits"],
            method=point["method"],
            mask=point["mask"] or "auto",
            seed=point["seed"],
        )
        return Mixture((adapter,), (1.0,))

    def _extract(self, model: str, out: Path, **how: Any) -> str:
        settings = {"drop_rate": 0.0, "bits": 32, **how}
        dare_adapters.extract(self.base, model, out, on_large_delta="ignore", **settings)
        return str(out)

    def _any_identity(self, model: str) -> Any:
        return _adapter_identity(model) if _is_adapter(model) else model_identity(model)


class _Scratch(AbstractContextManager[Mixture]):
    """A mixture whose adapters are in a directory of its own, which goes with it."""

    def __init__(self, parent: Path | None, make: Callable[[Path], Mixture]) -> None:
        self._parent, self._make = parent, make

    def __enter__(self) -> Mixture:
        if self._parent is not None:
            self._parent.mkdir(parents=True, exist_ok=True)
        self._folder = tempfile.TemporaryDirectory(prefix="dare-eval-", dir=self._parent)
        try:
            return self._make(Path(self._folder.name))
        except BaseException:
            self._folder.cleanup()
            raise

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()


def _always(mixture: Mixture) -> Wearing:
    return lambda: nullcontext(mixture)


def _is_adapter(model: str) -> bool:
    """Whether a directory or hub id holds an adapter, not a checkpoint."""
    folder = Path(model)
    if folder.is_dir():
        return (folder / "adapter_config.json").is_file()
    from huggingface_hub import file_exists

    return file_exists(model, "adapter_config.json")


def _adapter_identity(adapter: str) -> dict[str, str]:
    name = str(adapter).replace("\\", "/").rstrip("/").rpartition("/")[2]
    return {"name": name, "content": open_source(adapter).identity}
