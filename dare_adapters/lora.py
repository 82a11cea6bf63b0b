"""A PEFT LoRA adapter directory as a source of deltas: W + s B A, a range of rows at a time.

The deltas are those of PEFT's `get_delta_weight` (peft/tuners/lora/layer.py), in float32 whatever
the dtype of the factors; s is alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open

from dare_adapters.adapter import resolve_adapter
from dare_adapters.checkpoint import read_json
from dare_adapters.config import CONFIG_NAME, WEIGHTS_NAME
from dare_adapters.delta import STEP_ENTRIES, Delta, DenseDelta, NewParameter, WholeDelta
from dare_adapters.errors import AdapterFormatError, AdapterNotFoundError
from dare_adapters.finite import first_non_finite
from dare_adapters.lora_layout import (
    BiasChange,
    Factors,
    LoraLayout,
    StoredTensor,
    WholeValue,
    product_shape,
)
from dare_adapters.lora_settings import LoraSettings
from dare_adapters.source import DeltaSource
from dare_adapters.tensor_file import file_sha256

__all__ = ["LoraAdapter", "LowRankDelta"]


class LoraAdapter(DeltaSource):
    """One LoRA adapter, opened by :meth:`open` or :meth:`from_pretrained`.

    Names are the file's: `<module>.weight` of the class that it was trained with, and
    `<module>.bias` with `lora_bias`. What the file holds whole instead of as a change
    (`modules_to_save`, biases of `bias="all"` and `"lora_only"`, resized embeddings) is a
    :class:`NewParameter`, which replaces the base's.

    Attributes:
        path: the directory.
        config: adapter_config.json.
        base_copies: parameter name -> key of a copy of the base's own values, which PEFT saves
            beside the factors of an embedding; it is not part of the delta.
    """

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        reader: Any,
        layout: LoraLayout,
        fan_in_fan_out: bool | None = None,
    ) -> None:
        self.path, self.config, self.base_copies = path, config, layout.base_copies
        self._reader, self._entries = reader, layout.entries
        self._fan_in_fan_out = fan_in_fan_out
        self.label = str(path)
        self.base_model_name_or_path = config.get("base_model_name_or_path")
        self.revision = config.get("revision")
        self.base_architectures = []
        self.witness = {}

    @classmethod
    def open(
        cls, path: str | Path, *, verify: bool = True, fan_in_fan_out: bool | None = None
    ) -> LoraAdapter:
        """Open an adapter directory; nothing but safetensors and JSON is read.

        Every tensor's name, dtype and shape is compared with the others and the config before
        any is read.

        Args:
            path: the directory.
            verify: also look at every number.
            fan_in_fan_out: whether GPT-2's Conv1D layers were adapted, whose weights are
                (in, out); None: what the config says.

        Raises:
            AdapterNotFoundError: there is no adapter, or no adapter_model.safetensors.
            AdapterFormatError: it is not LoRA, is pickled, is damaged or contradicts itself.
            UnsupportedParameterError: its change cannot be told without the base (DoRA, PiSSA
                and others), or not as a change of weights.
        """
        path = Path(path)
        if not (path / CONFIG_NAME).is_file():
            raise AdapterNotFoundError(f"{path}: no {CONFIG_NAME}; this is not an adapter")
        config = read_json(path / CONFIG_NAME, AdapterFormatError)
        settings = LoraSettings(path / CONFIG_NAME, config, fan_in_fan_out)
        weights = path / WEIGHTS_NAME
        if not weights.is_file():
            _refuse_without_weights(path)
        try:
            reader: Any = safe_open(weights, framework="pt")
            found = {}
            for key in reader.keys():  # noqa: SIM118
                view = reader.get_slice(key)
                found[key] = StoredTensor(key, view.get_dtype(), tuple(view.get_shape()))
        except (SafetensorError, OSError, ValueError) as error:
            raise AdapterFormatError(f"{weights}: not a safetensors file ({error})") from error
        adapter = cls(path, config, reader, LoraLayout(weights, settings, found), fan_in_fan_out)
        if verify:
            for name in adapter:
                adapter.check(name)
        return adapter

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        verify: bool = True,
    ) -> LoraAdapter:
        """Open a local adapter directory, or download one from the Hugging Face hub."""
        return cls.open(resolve_adapter(source, revision, token), verify=verify)

    def __getitem__(self, name: str) -> Delta | NewParameter:
        entry = self._entries[name]
        if isinstance(entry, WholeValue):
            return NewParameter(self._reader.get_tensor(entry.key))
        if isinstance(entry, BiasChange):
            values = self._reader.get_tensor(entry.key).to(torch.float32, copy=True)
            return DenseDelta(values.mul_(entry.scaling))
        return LowRankDelta(
            self._reader.get_tensor(entry.b),
            self._reader.get_tensor(entry.a),
            entry.scaling,
            transposed=entry.transposed,
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __deepcopy__(self, memo: dict[int, object]) -> LoraAdapter:
        return self  # nothing changes it

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self._fan_in_fan_out)

    def __repr__(self) -> str:
        return (
            f"LoraAdapter({str(self.path)!r}, base={self.base_model_name_or_path!r}, "
            f"r={self.config.get('r')}, parameters={len(self)})"
        )

    def is_new(self, name: str) -> bool:
        return isinstance(self._entries[name], WholeValue)

    @cached_property
    def identity(self) -> str:
        """SHA-256 of the tensors file."""
        return file_sha256(self.path / WEIGHTS_NAME)

    @property
    def nbytes(self) -> int:
        """Bytes of config and tensors on disk."""
        return sum((self.path / name).stat().st_size for name in (CONFIG_NAME, WEIGHTS_NAME))

    def base_copy(self, name: str) -> torch.Tensor:
        """The values that the base had of one of `base_copies`, in the file's dtype."""
        tensor: torch.Tensor = self._reader.get_tensor(self.base_copies[name])
        return tensor

    def check(self, name: str) -> None:
        """Look at every stored number of one parameter.

        Raises:
            AdapterFormatError: NaN or infinity, or factors whose product is beyond float32.
        """
        entry = self._entries[name]
        largest = [1.0]
        for key in entry.keys:
            tensor = self._reader.get_tensor(key)
            if not tensor.is_floating_point():
                continue
            if first_non_finite(tensor.view(-1)) is not None:
                raise AdapterFormatError(f"{self.path}: {key:.200} holds NaN or infinity")
            largest.append(float(tensor.abs().max()) if tensor.numel() else 0.0)
        if isinstance(entry, WholeValue):
            return
        rank = len(tensor) if isinstance(entry, Factors) else 1  # the last is A
        bound = max(*largest, math.prod(largest) * rank) * max(1.0, abs(entry.scaling))
        if bound > torch.finfo(torch.float32).max:
            raise AdapterFormatError(f"{self.path}: the delta of {name:.200} is beyond float32")


class LowRankDelta(WholeDelta):
    """s B A, without ever making the whole of it.

    Args:
        b: (out, r), or (out, r, 1, …) of a convolution; an embedding's (width, r).
        a: (r, in), or (r, in, *kernel); an embedding's (r, tokens).
        scaling: s.
        transposed: of shape (in, out): Conv1D and embeddings.
    """

    def __init__(
        self, b: torch.Tensor, a: torch.Tensor, scaling: float, *, transposed: bool = False
    ) -> None:
        shape = product_shape(tuple(b.shape), tuple(a.shape), transposed)
        super().__init__(shape)
        b, a = b.detach().reshape(len(b), -1), a.detach().reshape(len(a), -1)
        self.left, self.right = (a.T, b.T) if transposed else (b, a)
        self.scaling = scaling
        self._block = max(1, STEP_ENTRIES // max(self.right.shape[1], 1))

    @property
    def rank(self) -> int:
        """r, the width of the factors."""
        return self.left.shape[1]

    def read(self, start: int, stop: int) -> tuple[None, torch.Tensor]:
        rows_each = self.right.shape[1] // self.columns  # that a row of `left` makes
        # Whole blocks: how a product rounds depends on its shape, and a row is to have the same
        # bits however it is asked for.
        first, last = start // rows_each, -(-stop // rows_each)
        first -= first % self._block
        right = self.right.to(torch.float32)
        blocks = [
            (self.left[block : block + self._block].to(torch.float32) @ right).view(-1)
            for block in range(first, last, self._block)
        ]
        product = blocks[0] if len(blocks) == 1 else torch.cat([torch.zeros(0), *blocks])
        skip = (start - first * rows_each) * self.columns
        return None, product[skip : skip + (stop - start) * self.columns].mul_(self.scaling)


def _refuse_without_weights(path: Path) -> NoReturn:
    if (path / "adapter_model.bin").is_file():
        raise AdapterFormatError(
            f"{path}: adapter_model.bin is pickled, and opening such a file can run any code; it "
            f"is not read. Write {WEIGHTS_NAME} with PeftModel.from_pretrained(…).save_pretrained"
        )
    raise AdapterNotFoundError(
        f"{path}: {CONFIG_NAME} is there, {WEIGHTS_NAME} is not (a pickled adapter_model.bin "
        "is not read)"
    )


def _reopen(path: Path, fan_in_fan_out: bool | None) -> LoraAdapter:
    """An adapter that was pickled, from its directory: it does not travel with the model."""
    return LoraAdapter.open(path, verify=False, fan_in_fan_out=fan_in_fan_out)
