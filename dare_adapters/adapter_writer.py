"""Encoded parameters into an adapter directory: tensors, entries of the config, measurements."""

from __future__ import annotations

import re
from pathlib import Path
from types import TracebackType

import torch

from dare_adapters.config import WEIGHTS_NAME, AdapterConfig, tensor_nbytes
from dare_adapters.encode import EncodedParameter
from dare_adapters.errors import CheckpointMismatchError
from dare_adapters.prune import PruneRule
from dare_adapters.tensor_file import TensorFileWriter

__all__ = ["AdapterWriter"]


class AdapterWriter:
    """The tensors file of a directory, filled a parameter at a time.

    Leaving the block without an error completes the file and the config's entries, digest of the
    file and measurements; the config itself is saved by its owner.

    Args:
        directory: where to write.
        config: what describes it.
    """

    def __init__(self, directory: Path, config: AdapterConfig) -> None:
        self._config = config
        self._fidelity = _Fidelity()
        self._writer = TensorFileWriter(directory / WEIGHTS_NAME, {"format": "pt"})

    def __enter__(self) -> AdapterWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._config.sha256 = self._writer.finish()
                self._config.fidelity = self._fidelity.groups()
        finally:
            self._writer.close()

    def add(self, encoded: EncodedParameter, rule: PruneRule | None = None) -> None:
        """Write one parameter; `rule` is what it was pruned by."""
        planned = encoded.entry.tensors(encoded.name)
        for key, tensor in encoded.tensors.items():
            dtype, shape = planned[key]
            if tuple(tensor.shape) != shape or tensor.nbytes != tensor_nbytes(dtype, shape):
                raise CheckpointMismatchError(  # a defect of this library, never of the input
                    f"{key}: encoded as {tuple(tensor.shape)}, its entry says {shape}"
                )
            self._writer.add(key, tensor)
        self._config.parameters[encoded.name] = encoded.entry
        if encoded.entry.kind != "new":
            self._fidelity.add(encoded, rule)


class _Fidelity:
    """What was lost, for each group of parameters that differ only in their layer's number."""

    def __init__(self) -> None:
        self._groups: dict[str, dict[str, float]] = {}

    def add(self, encoded: EncodedParameter, rule: PruneRule | None) -> None:
        """Count one parameter.

        `drop_error` and `rounding_error` are squared errors over the squared delta: expected over
        masks for random supports, measured otherwise.
        """
        key = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", encoded.name)
        sums = self._groups.setdefault(
            key, {"parameters": 0, "entries": 0, "survivors": 0, "delta": 0, "drop": 0, "round": 0}
        )
        energy, entry = encoded.energy, encoded.entry
        keep = 1.0 if rule is None else 1 - rule.drop_rate
        factor = 1.0 if rule is None else rule.factor
        kept = energy.signal / factor**2
        if rule is None or keep == 1.0:
            delta, drop = kept, 0.0
        elif rule.drop_error is None:
            assert encoded.total_signal is not None
            delta, drop = encoded.total_signal, encoded.total_signal - kept
        else:
            delta, drop = kept / keep, rule.drop_error * kept / keep
        sums["parameters"] += 1
        sums["entries"] += torch.Size(entry.shape).numel()
        sums["survivors"] += energy.survivors
        sums["delta"] += delta
        sums["drop"] += drop
        sums["round"] += energy.rounding

    def groups(self) -> dict[str, dict[str, float]]:
        """As they stand in the config."""
        return {
            key: {
                "parameters": sums["parameters"],
                "entries": sums["entries"],
                "survivors": sums["survivors"],
                "delta_rms": _six((sums["delta"] / max(sums["entries"], 1)) ** 0.5),
                "drop_error": _six(sums["drop"] / sums["delta"] if sums["delta"] else 0.0),
                "rounding_error": _six(sums["round"] / sums["delta"] if sums["delta"] else 0.0),
            }
            for key, sums in self._groups.items()
        }


def _six(value: float) -> float:
    """Six significant digits: these are for people."""
    return float(f"{value:.6g}")
