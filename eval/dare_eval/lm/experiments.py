"""`dare-eval lm run`, `drop` and `merge`: cells of a decoder, a mixture and a task."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dare_adapters.mask import block_size
from dare_adapters.open_source import open_source
from dare_eval.identity import model_identity
from dare_eval.lm.decoder import Decoder
from dare_eval.lm.deltas import Deltas, is_adapter
from dare_eval.lm.evaluation import Evaluation, check_task
from dare_eval.lm.mixture import Mixture
from dare_eval.records import Cell, Records

__all__ = ["DROP_METHODS", "DropAxes", "Laboratory", "MergeAxes"]

DROP_METHODS = ("dare", "drop_only", "magnitude", "masked_weights")


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
        work: directory for deltas while they are needed (4 bytes for each parameter of each
            fine-tune); default: the system's for temporary files.

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
        self.evaluation, self.backend = evaluation, backend
        self.model_arguments = dict(model_arguments or {})
        self._identity = model_identity(base)
        self._deltas = Deltas(base, work)
        self._decoder = Decoder(base, backend, self.model_arguments)

    def run(self, adapters: Sequence[str], finetuned: Sequence[str]) -> None:
        """The base, adapters over it, and fine-tunes as they are, on every task."""
        experiment = "lm-run"
        cells = self._cells(experiment, {"method": "base"}, Mixture)
        for adapter in adapters:
            config = {"method": "adapter", "model": _adapter_identity(adapter)}
            cells += self._cells(experiment, config, _worn(adapter))
        for model in finetuned:
            cells += self._finetuned(experiment, model)
        self._run(cells, "lm run")

    def drop(self, finetuned: Sequence[str], axes: DropAxes) -> None:
        """Each fine-tune under every drop rate and method, beside itself and the base."""
        experiment = "lm-drop"
        cells = self._cells(experiment, {"method": "base"}, Mixture)
        for model in finetuned:
            identity = model_identity(model)
            cells += self._finetuned(experiment, model)
            for point in axes.points():
                config = {"finetuned": identity, **point}
                cells += self._cells(experiment, config, self._dropped(model, point))
        self._run(cells, "lm drop")

    def merge(self, models: Sequence[str], axes: MergeAxes) -> None:
        """Fine-tunes or adapters over the base made one by every method, beside each alone."""
        experiment = "lm-merge"
        names = {
            model: _adapter_identity(model) if is_adapter(model) else model_identity(model)
            for model in models
        }
        cells: list[Cell] = []
        for model in models:
            config = {"method": "single", "models": [names[model]]}
            cells += self._cells(experiment, config, self._merged([model], {}))
        for chosen in itertools.combinations(models, 2 if axes.pairs else len(models)):
            for point in axes.points():
                config = {"models": [names[model] for model in chosen], **point}
                cells += self._cells(experiment, config, self._merged(chosen, point))
        self._run(cells, "lm merge")

    def _run(self, cells: list[Cell], description: str) -> None:
        try:
            self.records.run_all(cells, description)
        finally:
            self._decoder.close()
            self._deltas.remove()

    def _cells(
        self,
        experiment: str,
        own: Mapping[str, Any],
        mixture: Callable[[], Mixture],
        checkpoint: str | None = None,
    ) -> list[Cell]:
        """One cell for each task, of a mixture over the base or over another checkpoint."""
        cells: list[Cell] = []
        made: list[Mixture] = []
        for task in self.tasks:
            config = {
                "experiment": experiment,
                "task": task,
                "base": self._identity,
                "backend": self.backend,
                "model_arguments": self.model_arguments,
                **self.evaluation.config(),
                **own,
            }

            def measure(task: str = task, config: Mapping[str, Any] = config) -> dict[str, Any]:
                if not made:
                    made.append(mixture())
                model = self._decoder_of(checkpoint or self.base).wearing(made[0])
                file = self.records.path(config).stem
                return self.evaluation.measure(model, task, file, _generator(config))

            cells.append((config, measure))
        return cells

    def _finetuned(self, experiment: str, model: str) -> list[Cell]:
        """A full checkpoint, loaded as it is."""
        config = {"method": "finetuned", "finetuned": model_identity(model)}
        return self._cells(experiment, config, Mixture, checkpoint=model)

    def _decoder_of(self, checkpoint: str) -> Decoder:
        """One model is in memory at a time."""
        if self._decoder.base != checkpoint:
            self._decoder.close()
            self._decoder = Decoder(checkpoint, self.backend, self.model_arguments)
        return self._decoder

    def _dropped(self, model: str, point: Mapping[str, Any]) -> Callable[[], Mixture]:
        """What is left of a fine-tune."""
        method, rate, seed = point["method"], point["drop_rate"], point["seed"]

        def mixture() -> Mixture:
            if method == "masked_weights":
                return _worn(self._deltas.masked(model, rate, seed, point["mask"]))()
            if point["bits"] < 32:
                return _worn(self._deltas.pruned(model, point))()
            options = {"prune": method, "drop_rate": rate}
            if method != "magnitude":
                options |= {"mask": point["mask"], "seed": seed}
            return Mixture((self._deltas.whole(model),), (1.0,), "linear", options)

        return mixture

    def _merged(self, models: Sequence[str], point: Mapping[str, Any]) -> Callable[[], Mixture]:
        """Models made one; a single one is as it is."""

        def mixture() -> Mixture:
            adapters = [m if is_adapter(m) else self._deltas.whole(m) for m in models]
            options = dict(point.get("options", {}))
            if point.get("dare"):
                options |= {"prune": "dare", "drop_rate": point["drop_rate"]}
            if point.get("seed") is not None:
                options["seed"] = point["seed"]
            weights = (float(point.get("weight", 1.0)),) * len(adapters)
            return Mixture(tuple(adapters), weights, point.get("method", "linear"), options)

        return mixture


def _worn(adapter: str) -> Callable[[], Mixture]:
    return lambda: Mixture((adapter,), (1.0,))


def _generator(config: Mapping[str, Any]) -> str:
    """A name of what wrote a completion, for people."""
    models = config.get("models") or [config.get("model") or config.get("finetuned")]
    names = [model["name"] for model in models if model] or [config["base"]["name"]]
    rate, seed = config.get("drop_rate"), config.get("seed")
    how = [config["method"], f"p{rate:g}" if rate else None, f"s{seed}" if seed else None]
    return "-".join(["+".join(names), *(word for word in how if word)])


def _adapter_identity(adapter: str) -> dict[str, str]:
    name = str(adapter).replace("\\", "/").rstrip("/").rpartition("/")[2]
    return {"name": name, "content": open_source(adapter).identity}
