"""What each tensor of a LoRA adapter's file is for: factors, a bias, or a whole value."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from dare_adapters.checkpoint import DTYPES
from dare_adapters.config import FLOATS, KEY_PREFIX, MAX_NUMEL
from dare_adapters.errors import AdapterFormatError, UnsupportedParameterError
from dare_adapters.lora_settings import LoraSettings, needs_base
from dare_adapters.module_pattern import MAX_NAME

__all__ = [
    "BiasChange",
    "Factors",
    "LoraEntry",
    "LoraLayout",
    "StoredTensor",
    "WholeValue",
    "product_shape",
]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Factors:
    """Keys of the factors of one parameter's delta."""

    b: str
    a: str
    scaling: float
    transposed: bool

    @property
    def keys(self) -> tuple[str, ...]:
        return self.b, self.a


@dataclass(frozen=True)
class BiasChange:
    """Key of the change of a bias (`lora_bias`)."""

    key: str
    scaling: float

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)


@dataclass(frozen=True)
class WholeValue:
    """Key of a value that replaces the base's."""

    key: str

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)


LoraEntry = Factors | BiasChange | WholeValue


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the file: its key, safetensors dtype and shape."""

    key: str
    dtype: str
    shape: Shape


_LINEAR = ("lora_A.weight", "lora_B.weight")
_EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
_BIAS = "lora_B.bias"
_PARTS = (*_LINEAR, _BIAS, *_EMBEDDING)
# With bias="all" PEFT writes the biases of modules_to_save once more, and those they replaced.
_WRAPPED = re.compile(r"\.(modules_to_save|original_module)\.([^.]+\.)*bias$")

# The layers that transformers makes of Conv1D (GPT-2, its kin), and the blocks they are in.
_BLOCK = re.compile(r"(^|\.)h\.\d+\.")
_CONV1D = re.compile(r"(^|\.)h\.\d+\.(.*\.)?(c_attn|q_attn|c_proj|c_fc)$")


class LoraLayout:
    """What each tensor of the file is for.

    Raises:
        AdapterFormatError: a tensor that is unknown, lacks its partner, or does not fit it.
        UnsupportedParameterError: tensors that are no change of weights.
    """

    def __init__(
        self, file: Path, settings: LoraSettings, stored: Mapping[str, StoredTensor]
    ) -> None:
        self.file, self.settings = file, settings
        self.entries: dict[str, LoraEntry] = {}
        self.base_copies: dict[str, str] = {}
        modules: dict[str, dict[str, StoredTensor]] = {}
        values: dict[str, StoredTensor] = {}
        for key, tensor in stored.items():
            if settings.raw.get("bias") == "all" and _WRAPPED.search(key):
                continue
            module, part = self._split(key)
            if part in _PARTS:
                modules.setdefault(module, {})[part] = tensor
            else:
                values[f"{module}.{part}" if module else part] = tensor
        if not stored:
            raise AdapterFormatError(f"{file}: it holds no tensors")
        transposed = self._transposed(modules)
        for module, parts in modules.items():
            self._add_module(module, parts, modules, module in transposed)
        for name, tensor in values.items():
            self._add_value(name, tensor, modules)

    def _fail(self, key: str, reason: str) -> NoReturn:
        raise AdapterFormatError(f"{self.file}: {key!r:.200}: {reason}")

    def _split(self, key: str) -> tuple[str, str]:
        """A key's module and what follows: one of `_PARTS`, or a parameter's own name."""
        if not key.startswith(KEY_PREFIX) or not key.isprintable() or len(key) > MAX_NAME:
            self._fail(key, f"not a name that PEFT writes; they begin with {KEY_PREFIX!r}")
        name = key.removeprefix(KEY_PREFIX)
        for part in _PARTS:
            if name == part or name.endswith(f".{part}"):
                return name.removesuffix(part).removesuffix("."), part
        pieces = name.split(".")
        if "lora_magnitude_vector" in pieces:
            raise UnsupportedParameterError(needs_base(self.file, "use_dora"))
        if "trainable_tokens_delta" in pieces:
            raise UnsupportedParameterError(needs_base(self.file, "trainable_token_indices"))
        if any(p.startswith("lora_") or p == "modules_to_save" for p in pieces):
            self._fail(
                key,
                "not a tensor of a LoRA adapter as PEFT saves it; an adapter's name must not be in "
                "it: write the directory with PeftModel.save_pretrained",
            )
        module, _, leaf = name.rpartition(".")
        return module, leaf

    def _transposed(self, modules: Mapping[str, Mapping[str, StoredTensor]]) -> set[str]:
        """The modules that are Conv1D.

        PEFT saves `fan_in_fan_out` as it was for the layer that it adapted last, so that beside
        an adapted head (a Linear, after all blocks) it says nothing about the blocks.
        """
        flag = self.settings.fan_in_fan_out
        factors = {m: parts[_LINEAR[0]] for m, parts in modules.items() if _LINEAR[0] in parts}
        linear = {module for module, a in factors.items() if len(a.shape) == 2}
        outside = {module for module in linear if not _BLOCK.search(module)}
        likely = sorted(module for module in linear if _CONV1D.search(module))
        if not (likely and outside):
            return linear if flag else set()
        if not flag and not self.settings.fan_in_fan_out_is_certain:
            self._fail(
                likely[0],
                f"the config's fan_in_fan_out is of {min(outside):.200}, and does not tell whether "
                "this is a Conv1D of GPT-2, whose weight is (in, out). If it is, set "
                "fan_in_fan_out to true in adapter_config.json; if it is not, open it with "
                "LoraAdapter.open(path, fan_in_fan_out=False)",
            )
        return linear - outside if flag else set()

    def _add_module(
        self,
        module: str,
        parts: Mapping[str, StoredTensor],
        modules: Mapping[str, object],
        transposed: bool,
    ) -> None:
        parameter, bias, matched = self._names(module, modules)
        embedding = any(part in parts for part in _EMBEDDING)
        a, b = (parts.get(part) for part in (_EMBEDDING if embedding else _LINEAR))
        if a is None or b is None or (embedding and len(parts) > 2):
            self._fail(module, f"has {', '.join(parts)} and not both factors of one product")
        rank = self.settings.rank(matched)
        scaling = self.settings.scaling(matched, rank)
        self._check_factors(a, b, rank, embedding)
        transposed = transposed or embedding
        shape = product_shape(b.shape, a.shape, transposed)
        if math.prod(shape) > MAX_NUMEL:
            self._fail(a.key, f"with lora_B it makes {math.prod(shape)} entries")
        self._add(parameter, Factors(b.key, a.key, scaling, transposed))
        change = parts.get(_BIAS)
        if change is not None:
            self._check_float(change)
            if not self.settings.lora_bias or bias is None or change.shape != b.shape[:1]:
                self._fail(
                    change.key,
                    f"has the shape {list(change.shape)} beside lora_B's {list(b.shape)}, and the "
                    f"config's lora_bias is {self.settings.lora_bias}",
                )
            self._add(bias, BiasChange(change.key, scaling))

    def _names(self, module: str, modules: Mapping[str, object]) -> tuple[str, str | None, str]:
        """The adapted weight, its bias, and the module as the config's patterns see it."""
        owner, nested, inner = f"{module}.".partition(".base_layer.")
        if nested:  # PEFT wraps an attention's output projection inside of the attention
            if inner != "out_proj." or owner not in modules:
                raise UnsupportedParameterError(needs_base(self.file, "target_parameters"))
            return f"{owner}.out_proj.weight", f"{owner}.out_proj.bias", owner
        if f"{module}.base_layer.out_proj" in modules:
            return f"{module}.in_proj_weight", None, module
        prefix = f"{module}." if module else ""
        return f"{prefix}weight", f"{prefix}bias", module

    def _check_factors(self, a: StoredTensor, b: StoredTensor, rank: int, embedding: bool) -> None:
        for factor in (a, b):
            self._check_float(factor)
        dimensions = len(a.shape)
        if len(b.shape) != dimensions or not 2 <= dimensions <= (2 if embedding else 5):
            self._fail(a.key, f"has the shape {list(a.shape)}, its partner {list(b.shape)}")
        if a.shape[0] != rank:
            self._fail(a.key, f"has the shape {list(a.shape)}, the config says rank {rank}")
        if dimensions > 2 and b.shape[1] != rank and rank % b.shape[1] == 0:
            raise UnsupportedParameterError(
                f"{b.key:.200} of {self.file} is of a convolution in {rank // b.shape[1]} groups, "
                "whose change PEFT cannot merge either"
            )
        if b.shape[1] != rank or any(size != 1 for size in b.shape[2:]):
            self._fail(b.key, f"has the shape {list(b.shape)}, lora_A {list(a.shape)}")

    def _check_float(self, tensor: StoredTensor) -> None:
        if tensor.dtype not in FLOATS or 0 in tensor.shape:
            self._fail(
                tensor.key,
                f"is {tensor.dtype} {list(tensor.shape)}, expected one of {', '.join(FLOATS)} and "
                "no dimension of zero",
            )

    def _add_value(
        self, name: str, tensor: StoredTensor, modules: Mapping[str, Mapping[str, StoredTensor]]
    ) -> None:
        module, _, leaf = name.rpartition(".")
        wrapped = f".{module}".endswith(".base_layer")
        owner = module.removesuffix("base_layer").removesuffix(".") if wrapped else module
        name = f"{owner}.{leaf}" if owner else leaf
        name = name.replace(".base_layer.out_proj.", ".out_proj.")
        if (wrapped and owner not in modules) or "base_layer" in name.split("."):
            self._fail(tensor.key, "is a part of an adapted layer that this library does not know")
        if tensor.dtype not in DTYPES:
            self._fail(tensor.key, f"is {tensor.dtype}, expected one of {', '.join(DTYPES)}")
        # Before PEFT 0.6 the adapted layer's own parameters had no base_layer in their names.
        if owner in modules and self.settings.is_saved_whole(owner):
            self._fail(tensor.key, "the config's modules_to_save has a layer that has factors too")
        if owner in modules and leaf != "bias":
            self._check_copy(name, tensor, modules[owner])
            self.base_copies[name] = tensor.key
            return
        self._add(name, WholeValue(tensor.key))

    def _check_copy(self, name: str, copy: StoredTensor, parts: Mapping[str, StoredTensor]) -> None:
        entry = self.entries.get(name)
        if not isinstance(entry, Factors) or copy.dtype not in FLOATS:
            return
        shapes = {part.key: part.shape for part in parts.values()}
        expected = product_shape(shapes[entry.b], shapes[entry.a], entry.transposed)
        if copy.shape != expected:
            self._fail(copy.key, f"has the shape {list(copy.shape)}, its change {list(expected)}")

    def _add(self, name: str, entry: LoraEntry) -> None:
        if name in self.entries:
            self._fail(name, "has two tensors that change it")
        self.entries[name] = entry


def product_shape(b: Shape, a: Shape, transposed: bool) -> Shape:
    """Shape of the parameter that two factors change."""
    shape = (b[0], *a[1:])
    return shape[::-1] if transposed else shape
