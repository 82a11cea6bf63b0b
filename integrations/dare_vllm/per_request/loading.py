"""From a request's path to packed terms: what a worker does when an adapter is loaded.

A path is a directory, a hub id, or, for the mixes that clients name, a description of several
(:func:`mix_path`). All that could be wrong is found here, before a step needs the adapter: an
exception inside a step ends vLLM's engine.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from tqdm import tqdm

from dare_adapters.checkpoint import read_json
from dare_adapters.combine.mix import is_mix
from dare_adapters.config import CONFIG_NAME
from dare_adapters.errors import AdapterFormatError, DareError
from dare_adapters.open_source import open_source
from dare_adapters.source import DeltaSource
from dare_vllm.merged_weights import MergedWeights
from dare_vllm.per_request.base_check import check_base
from dare_vllm.per_request.model_sites import ModelSites
from dare_vllm.per_request.packed_adapter import PackedAdapter, Term, pack_adapter
from dare_vllm.per_request.refusal import AdapterRefusedError

__all__ = ["Loader", "mix_path", "parts_of"]

MIX_SCHEME = "dare-mix:"
# Opened adapters that are remembered after their memory was given back: a mapped file each.
REMEMBERED = 1024


class UnsupportedEngineError(DareError):
    """The engine's configuration can serve no adapter per request."""


@dataclass(frozen=True)
class _Source:
    """A source that was verified, and a key that is the same for the same content."""

    deltas: DeltaSource
    key: str


@dataclass(frozen=True)
class _Opened:
    """A source and the factor that it is added with."""

    source: _Source
    weight: float


def mix_path(parts: Sequence[tuple[str, float]]) -> str:
    """The path of a LoRARequest that stands for a weighted sum of adapters.

    Args:
        parts: (path of an adapter, weight).
    """
    return MIX_SCHEME + json.dumps([[path, weight] for path, weight in parts])


def parts_of(path: str) -> list[tuple[str, float]] | None:
    """The paths and weights of a DARE adapter or of a mix; None: it is no such thing.

    Args:
        path: of a LoRARequest.

    Raises:
        AdapterFormatError: a description of a mix, or an adapter's config, cannot be read.
    """
    if path.startswith(MIX_SCHEME):
        try:
            parts = [
                (str(one), float(weight)) for one, weight in json.loads(path[len(MIX_SCHEME) :])
            ]
        except (ValueError, TypeError) as error:
            raise AdapterFormatError(f"{path!r:.200} describes no mix ({error})") from error
        if not parts or not all(math.isfinite(weight) for _, weight in parts):
            raise AdapterFormatError(f"{path!r:.200} describes no mix of finite weights")
        return parts
    return [(path, 1.0)] if _is_dare(path) else None


def _is_dare(path: str) -> bool:
    from vllm.lora.utils import get_adapter_absolute_path

    config = Path(get_adapter_absolute_path(path)) / CONFIG_NAME
    if not config.is_file():
        return False  # vLLM says what is missing
    return read_json(config, AdapterFormatError).get("peft_type") == "DARE"


class Loader:
    """Loads adapters for one model, and remembers what it opened.

    Args:
        sites: of the model.
        obstacles: why the engine can serve no adapter at all; empty: it can.
        mixture: see :func:`dare_vllm.per_request.base_check.check_base`.
    """

    def __init__(
        self,
        sites: ModelSites,
        obstacles: str = "",
        mixture: Callable[[], MergedWeights | None] = lambda: None,
    ) -> None:
        self.sites, self.obstacles, self.mixture = sites, obstacles, mixture
        self._opened: OrderedDict[int, list[_Opened]] = OrderedDict()
        self._witnesses: dict[str, str] = {}
        self._sources: WeakValueDictionary[tuple[object, ...], _Source] = WeakValueDictionary()
        self._packed: WeakValueDictionary[str, PackedAdapter] = WeakValueDictionary()

    def load(self, request: Any) -> list[Term] | None:
        """The terms of a request's adapter; None: it is none of ours.

        An adapter that vLLM evicted comes back from the file that was opened and checked, even
        if that was deleted since.

        Args:
            request: vLLM's `LoRARequest`.

        Raises:
            AdapterRefusedError: it cannot be served; the message says why.
        """
        try:
            opened = None if request.load_inplace else self._opened.get(request.lora_int_id)
            if opened is None:
                parts = parts_of(request.lora_path)
                if parts is None:
                    return None
                if self.obstacles:
                    raise UnsupportedEngineError(self.obstacles)
                opened = [self._open(path, weight) for path, weight in parts]
                terms = [Term(self._pack(one), one.weight) for one in opened]
                self._remember(request.lora_int_id, opened)
                return terms
            return [Term(self._pack(one), one.weight) for one in opened]
        except (DareError, OSError) as error:
            raise AdapterRefusedError(request.lora_name, str(error)) from error

    def forget(self, lora_int_id: int) -> None:
        """Close what was opened for a request's adapter."""
        self._opened.pop(lora_int_id, None)

    def packed(self) -> list[PackedAdapter]:
        """All adapters in memory."""
        return list(self._packed.values())

    def _open(self, path: str, weight: float) -> _Opened:
        from vllm.lora.utils import get_adapter_absolute_path

        directory = Path(get_adapter_absolute_path(path))
        config = directory / CONFIG_NAME
        if config.is_file() and not is_mix(read := read_json(config, AdapterFormatError)):
            kind = read.get("peft_type")
            if kind != "DARE":
                raise AdapterFormatError(f"{path} is a {kind!r:.40}; mixes are of DARE adapters")
        stamp = _stamp(directory)
        known = self._sources.get(stamp)
        if known is None:
            source = open_source(directory)
            check_base(source, self.sites, self._witnesses, self.mixture)
            key = hashlib.sha256(config.read_bytes() + source.identity.encode()).hexdigest()
            known = self._sources[stamp] = _Source(source, key)
        return _Opened(known, weight)

    def _pack(self, opened: _Opened) -> PackedAdapter:
        source = opened.source
        packed = self._packed.get(source.key)
        if packed is None:
            count = len(source.deltas)
            with tqdm(total=count, desc="packing", delay=2, leave=False) as progress:
                packed = pack_adapter(source.deltas, self.sites, progress.update)
            self._packed[source.key] = packed
        return packed

    def _remember(self, lora_int_id: int, opened: list[_Opened]) -> None:
        self._opened[lora_int_id] = opened
        while len(self._opened) > REMEMBERED:
            self._opened.popitem(last=False)


def _stamp(directory: Path) -> tuple[object, ...]:
    """Another one when a file of an adapter was replaced or written to."""
    files = sorted(directory.glob("adapter_*")) if directory.is_dir() else []
    states = [(file.name, file.stat()) for file in files]
    return (
        os.path.realpath(directory),
        *((name, one.st_ino, one.st_size, one.st_mtime_ns) for name, one in states),
    )
