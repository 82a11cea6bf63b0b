"""Adapters of a model as sources of deltas, and a new adapter made of them."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from dare_adapters.combine.combination import Combination, Statistics
from dare_adapters.config import WEIGHTS_NAME, ParameterEntry
from dare_adapters.delta import Delta, NewParameter
from dare_adapters.errors import AdapterExistsError, AdapterNotFoundError, CombinationError
from dare_adapters.source import WHOLE, BaseReader, DeltaSource
from dare_adapters.store import save_source
from dare_adapters.tuner.config import DareConfig
from dare_adapters.tuner.exchange import tensor_of
from dare_adapters.tuner.loading import live_state_dict
from dare_adapters.tuner.state import DareState
from dare_adapters.tuner.stored import StoredParameter

if TYPE_CHECKING:
    from dare_adapters.tuner.model import DareModel

__all__ = ["LayersSource", "add_weighted"]


class LayersSource(DeltaSource):
    """An adapter of a model, as it is in the layers now.

    Args:
        model: the tuner.
        adapter: its name.
        names: place of a parameter -> the name that an earlier source has for it; extended.
    """

    def __init__(self, model: DareModel, adapter: str, names: dict[object, str]) -> None:
        config: DareConfig = model.peft_config[adapter]
        self.label, self._config = adapter, config
        self.base_model_name_or_path = config.base_model_name_or_path
        self.revision = config.revision
        self.base_architectures = list(config.base_architectures)
        self.base_parameter_count = config.base_parameter_count
        self.witness = dict(config.witness)
        self._adapter = adapter
        self._found: dict[str, tuple[DareState, StoredParameter]] = {}
        for layer in model.modules():
            if isinstance(layer, DareState):
                for one in layer.dare_stored.get(adapter, ()):
                    window = one.placement.window
                    place = (id(layer), window.owner, window.offset, window.shape)
                    name = names.setdefault(place, one.placement.name)
                    self._found[name] = (layer, one)

    def __getitem__(self, name: str) -> Delta | NewParameter:
        layer, one = self._found[name]
        return layer.delta(one, self._adapter)

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, name: object) -> bool:
        return name in self._found

    def is_new(self, name: str) -> bool:
        return self._entry(name).kind == "new"

    def stored_bits(self, name: str) -> int:
        entry = self._entry(name)
        return entry.bits if entry.kind == "sparse" and entry.bits is not None else WHOLE

    def base(self, name: str) -> torch.Tensor:
        """The base's value of a parameter."""
        layer, one = self._found[name]
        window = one.placement.window
        view = window.view_on(tensor_of(layer.owner, window.owner))
        return view.take(0, view.rows, None).cpu().view(window.shape)

    def _entry(self, name: str) -> ParameterEntry:
        return self._found[name][1].held

    @property
    def identity(self) -> str:
        read = self._config.described
        if read is not None and self._config.inference_mode:
            return read.sha256
        digest = hashlib.sha256()
        for name, (layer, one) in sorted(self._found.items()):
            digest.update(name.encode())
            for _, tensor in sorted(layer.parts(one, self._adapter).items()):
                plain = tensor.detach().cpu().contiguous().reshape(-1)
                digest.update(plain.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def add_weighted(
    model: DareModel,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
    *,
    bits: int | None,
    seed: int = 0,
    mask: str = "auto",
    prune: str | None = None,
    drop_rate: float | None = None,
    statistics: Sequence[Statistics] | None = None,
    options: Mapping[str, Any],
) -> None:
    """Combine adapters of a model and load the result; see `DareModel.add_weighted_adapter`."""
    if adapter_name in model.peft_config:
        raise AdapterExistsError(f"an adapter {adapter_name!r} is there already; choose another")
    if not adapters:
        raise CombinationError("there is no adapter in an empty list")
    unknown = [name for name in adapters if name not in model.peft_config]
    if unknown:
        raise AdapterNotFoundError(
            f"no adapter {', '.join(map(repr, unknown))} is loaded; there is "
            f"{', '.join(map(repr, model.peft_config))}"
        )
    merged = {
        name for m in model.modules() if isinstance(m, DareState) for name in m.merged_adapters
    }
    if merged:
        raise CombinationError(
            f"{', '.join(sorted(merged))} are merged into the base: call unmerge_adapter first"
        )
    names: dict[object, str] = {}
    sources = [LayersSource(model, name, names) for name in adapters]
    combination = Combination(
        sources, weights, combination_type, options, seed=seed, mask=mask, prune=prune,
        drop_rate=drop_rate, statistics=statistics, check_base=False,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "adapter"
        save_source(
            combination,
            path,
            base=_base_reader(sources),
            bits=bits,
            description={"combination": combination.describe()},
        )
        config = DareConfig.from_pretrained(str(path))
        tensors = load_file(path / WEIGHTS_NAME)
    config.inference_mode = True
    config.base_model_name_or_path = sources[0].base_model_name_or_path
    model.peft_config[adapter_name] = config
    try:
        model.inject_adapter(model.model, adapter_name)
    except BaseException:
        del model.peft_config[adapter_name]
        raise
    state = live_state_dict(model, config, adapter_name, tensors)
    model.load_state_dict(state, strict=False)


def _base_reader(sources: Sequence[LayersSource]) -> BaseReader:
    def read(name: str) -> torch.Tensor:
        return next(source for source in sources if name in source).base(name)

    return read
