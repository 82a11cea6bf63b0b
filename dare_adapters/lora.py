"""A PEFT LoRA adapter directory as a source of deltas: W + s B A, a range of rows at a time.

The deltas are those of PEFT's `get_delta_weight` (peft/tuners/lora/layer.py), in float32 whatever
the dtype of the factors; s is alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open

from dare_adapters.adapter import resolve_adapter
from dare_adapters.checkpoint import DTYPES, read_json
from dare_adapters.config import CONFIG_NAME, FLOATS, KEY_PREFIX, MAX_NUMEL, WEIGHTS_NAME
from dare_adapters.delta import STEP_ENTRIES, Delta, DenseDelta, NewParameter
from dare_adapters.errors import (
    AdapterFormatError,
    AdapterNotFoundError,
    UnsupportedParameterError,
)
from dare_adapters.finite import first_non_finite
from dare_adapters.source import DeltaSource
from dare_adapters.tensor_file import file_sha256

__all__ = ["LoraAdapter", "LowRankDelta"]

Shape = tuple[int, ...]


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
        layout: _Layout,
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
        settings = _Settings(path / CONFIG_NAME, config, fan_in_fan_out)
        weights = path / WEIGHTS_NAME
        if not weights.is_file():
            _refuse_without_weights(path)
        try:
            reader: Any = safe_open(weights, framework="pt")
            found = {}
            for key in reader.keys():  # noqa: SIM118
                view = reader.get_slice(key)
                found[key] = _Stored(key, view.get_dtype(), tuple(view.get_shape()))
        except (SafetensorError, OSError, ValueError) as error:
            raise AdapterFormatError(f"{weights}: not a safetensors file ({error})") from error
        adapter = cls(path, config, reader, _Layout(weights, settings, found), fan_in_fan_out)
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
        if isinstance(entry, _Whole):
            return NewParameter(self._reader.get_tensor(entry.key))
        if isinstance(entry, _Bias):
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
        return isinstance(self._entries[name], _Whole)

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
        if isinstance(entry, _Whole):
            return
        rank = len(tensor) if isinstance(entry, _Factors) else 1  # the last is A
        bound = max(*largest, math.prod(largest) * rank) * max(1.0, abs(entry.scaling))
        if bound > torch.finfo(torch.float32).max:
            raise AdapterFormatError(f"{self.path}: the delta of {name:.200} is beyond float32")


class LowRankDelta(Delta):
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
        shape = _product_shape(tuple(b.shape), tuple(a.shape), transposed)
        super().__init__(shape)
        b, a = b.detach().reshape(len(b), -1), a.detach().reshape(len(a), -1)
        self.left, self.right = (a.T, b.T) if transposed else (b, a)
        self.scaling = scaling
        self._block = max(1, STEP_ENTRIES // max(self.right.shape[1], 1))

    @property
    def rank(self) -> int:
        """r, the width of the factors."""
        return self.left.shape[1]

    @property
    def entries_per_row(self) -> int:
        return self.columns

    @property
    def recalls_positions(self) -> bool:
        return True

    def positions(self, start: int, stop: int) -> None:
        return None

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


@dataclass(frozen=True)
class _Factors:
    """Keys of the factors of one parameter's delta."""

    b: str
    a: str
    scaling: float
    transposed: bool

    @property
    def keys(self) -> tuple[str, ...]:
        return self.b, self.a


@dataclass(frozen=True)
class _Bias:
    """Key of the change of a bias (`lora_bias`)."""

    key: str
    scaling: float

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)


@dataclass(frozen=True)
class _Whole:
    """Key of a value that replaces the base's."""

    key: str

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)


_Entry = _Factors | _Bias | _Whole


@dataclass(frozen=True)
class _Stored:
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
_MAX_NAME, _MAX_NESTED = 512, 16
# The layers that transformers makes of Conv1D (GPT-2, its kin), and the blocks they are in.
_BLOCK = re.compile(r"(^|\.)h\.\d+\.")
_CONV1D = re.compile(r"(^|\.)h\.\d+\.(.*\.)?(c_attn|q_attn|c_proj|c_fc)$")


class _Layout:
    """What each tensor of the file is for.

    Raises:
        AdapterFormatError: a tensor that is unknown, lacks its partner, or does not fit it.
        UnsupportedParameterError: tensors that are no change of weights.
    """

    def __init__(self, file: Path, settings: _Settings, stored: Mapping[str, _Stored]) -> None:
        self.file, self.settings = file, settings
        self.entries: dict[str, _Entry] = {}
        self.base_copies: dict[str, str] = {}
        modules: dict[str, dict[str, _Stored]] = {}
        values: dict[str, _Stored] = {}
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
        if not key.startswith(KEY_PREFIX) or not key.isprintable() or len(key) > _MAX_NAME:
            self._fail(key, f"not a name that PEFT writes; they begin with {KEY_PREFIX!r}")
        name = key.removeprefix(KEY_PREFIX)
        for part in _PARTS:
            if name == part or name.endswith(f".{part}"):
                return name.removesuffix(part).removesuffix("."), part
        pieces = name.split(".")
        if "lora_magnitude_vector" in pieces:
            raise UnsupportedParameterError(_needs_base(self.file, "use_dora"))
        if "trainable_tokens_delta" in pieces:
            raise UnsupportedParameterError(_needs_base(self.file, "trainable_token_indices"))
        if any(p.startswith("lora_") or p == "modules_to_save" for p in pieces):
            self._fail(
                key,
                "not a tensor of a LoRA adapter as PEFT saves it; an adapter's name must not be in "
                "it: write the directory with PeftModel.save_pretrained",
            )
        module, _, leaf = name.rpartition(".")
        return module, leaf

    def _transposed(self, modules: Mapping[str, Mapping[str, _Stored]]) -> set[str]:
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
        parts: Mapping[str, _Stored],
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
        shape = _product_shape(b.shape, a.shape, transposed)
        if math.prod(shape) > MAX_NUMEL:
            self._fail(a.key, f"with lora_B it makes {math.prod(shape)} entries")
        self._add(parameter, _Factors(b.key, a.key, scaling, transposed))
        change = parts.get(_BIAS)
        if change is not None:
            self._check_float(change)
            if not self.settings.lora_bias or bias is None or change.shape != b.shape[:1]:
                self._fail(
                    change.key,
                    f"has the shape {list(change.shape)} beside lora_B's {list(b.shape)}, and the "
                    f"config's lora_bias is {self.settings.lora_bias}",
                )
            self._add(bias, _Bias(change.key, scaling))

    def _names(self, module: str, modules: Mapping[str, object]) -> tuple[str, str | None, str]:
        """The adapted weight, its bias, and the module as the config's patterns see it."""
        owner, nested, inner = f"{module}.".partition(".base_layer.")
        if nested:  # PEFT wraps an attention's output projection inside of the attention
            if inner != "out_proj." or owner not in modules:
                raise UnsupportedParameterError(_needs_base(self.file, "target_parameters"))
            return f"{owner}.out_proj.weight", f"{owner}.out_proj.bias", owner
        if f"{module}.base_layer.out_proj" in modules:
            return f"{module}.in_proj_weight", None, module
        prefix = f"{module}." if module else ""
        return f"{prefix}weight", f"{prefix}bias", module

    def _check_factors(self, a: _Stored, b: _Stored, rank: int, embedding: bool) -> None:
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

    def _check_float(self, tensor: _Stored) -> None:
        if tensor.dtype not in FLOATS or 0 in tensor.shape:
            self._fail(
                tensor.key,
                f"is {tensor.dtype} {list(tensor.shape)}, expected one of {', '.join(FLOATS)} and "
                "no dimension of zero",
            )

    def _add_value(
        self, name: str, tensor: _Stored, modules: Mapping[str, Mapping[str, _Stored]]
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
        self._add(name, _Whole(tensor.key))

    def _check_copy(self, name: str, copy: _Stored, parts: Mapping[str, _Stored]) -> None:
        entry = self.entries.get(name)
        if not isinstance(entry, _Factors) or copy.dtype not in FLOATS:
            return
        shapes = {part.key: part.shape for part in parts.values()}
        expected = _product_shape(shapes[entry.b], shapes[entry.a], entry.transposed)
        if copy.shape != expected:
            self._fail(copy.key, f"has the shape {list(copy.shape)}, its change {list(expected)}")

    def _add(self, name: str, entry: _Entry) -> None:
        if name in self.entries:
            self._fail(name, "has two tensors that change it")
        self.entries[name] = entry


# What a config's setting means, where it is set, for a change of weights.
_NEEDS_BASE = {
    "use_dora": "DoRA, whose change depends on the norms of the base's weights",
    "use_qalora": "QA-LoRA, whose factors act on averages of its inputs",
    "use_bdlora": "BD-LoRA, whose factors are block-diagonal",
    "velora_config": "VeLoRA, which this library does not know",
    "kasa_config": "KaSA, which takes singular values out of the base's weights",
    "monteclora_config": "MonteCLoRA, which draws its change at random",
    "arrow_config": "Arrow, which chooses between adapters for every token",
    "alora_invocation_tokens": "aLoRA, which changes the weights for some tokens only",
    "layer_replication": "a LoRA that repeats layers of the base",
    "target_parameters": "a LoRA of target_parameters, which PEFT stores in an order of dimensions "
    "that only the base's modules tell",
    "trainable_token_indices": "a LoRA with trainable_token_indices, which are whole rows and not "
    "changes of the base's",
}
# They put the largest part of W into B A, or round W, and take that from the base.
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
_KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


class _Settings:
    """The fields of adapter_config.json that a delta depends on, with PEFT's defaults.

    Raises:
        AdapterFormatError: a field that is not what PEFT writes.
        UnsupportedParameterError: a kind of LoRA that is no change of the base's weights.
    """

    def __init__(self, file: Path, raw: dict[str, Any], fan_in_fan_out: bool | None) -> None:
        self.file, self.raw = file, raw
        if raw.get("peft_type") != "LORA":
            self._fail("peft_type", "'LORA'")
        for key in _NEEDS_BASE:
            if raw.get(key):
                raise UnsupportedParameterError(_needs_base(file, key))
        self._check_initialisation()
        for key in ("base_model_name_or_path", "revision"):
            if not isinstance(raw.get(key), str | None):
                self._fail(key, "text or null")
        self.lora_bias, self.rslora = self._flag("lora_bias"), self._flag("use_rslora")
        self.fan_in_fan_out_is_certain = fan_in_fan_out is not None
        self.fan_in_fan_out = self._flag("fan_in_fan_out")
        if fan_in_fan_out is not None:
            self.fan_in_fan_out = fan_in_fan_out
        self._whole = raw.get("modules_to_save") or []
        if not isinstance(self._whole, list):
            self._fail("modules_to_save", "a list of names")
        self._ranks, self._alphas = self._patterns("rank_pattern"), self._patterns("alpha_pattern")

    def rank(self, module: str) -> int:
        """r of a module."""
        rank = self._of_module("rank_pattern", self._ranks, module, self.raw.get("r", 8))
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 < rank <= MAX_NUMEL:
            self._fail("r", "a whole number of at least 1 (rank_pattern likewise)", rank)
        return int(rank)

    def scaling(self, module: str, rank: int) -> float:
        """s of a module."""
        alpha = self._of_module(
            "alpha_pattern", self._alphas, module, self.raw.get("lora_alpha", 8)
        )
        plain = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        if not plain or not abs(alpha) < torch.finfo(torch.float32).max:
            self._fail("lora_alpha", "a finite number (alpha_pattern likewise)", alpha)
        return float(alpha / math.sqrt(rank) if self.rslora else alpha / rank)

    def is_saved_whole(self, module: str) -> bool:
        """Whether `modules_to_save` has it."""
        return any(module == name or module.endswith(f".{name}") for name in self._whole)

    def _of_module(
        self, field: str, patterns: Mapping[str, Callable[[str], bool]], module: str, default: Any
    ) -> Any:
        """PEFT's `get_pattern_key`: the first pattern that matches the end of the name."""
        key = next((key for key, matches in patterns.items() if matches(module)), module)
        return (self.raw.get(field) or {}).get(key, default)

    def _patterns(self, field: str) -> dict[str, Callable[[str], bool]]:
        found = self.raw.get(field) or {}
        if not isinstance(found, dict):
            self._fail(field, "an object of patterns")
        try:
            return {key: _matcher(key) for key in found}
        except ValueError as error:
            raise AdapterFormatError(f"{self.file}: {field}: {error}") from error

    def _check_initialisation(self) -> None:
        how = self.raw.get("init_lora_weights", True)
        how = how.lower() if isinstance(how, str) else how
        if isinstance(how, str) and how.startswith(_CHANGES_BASE):
            raise UnsupportedParameterError(
                f"{self.file}: init_lora_weights is {how!r:.80}, which changed the base's weights: "
                "the factors are not the change of the base that the config names. Save it once "
                "more with PEFT's path_initial_model_for_weight_conversion, or, where the base at "
                "hand is the changed one, set init_lora_weights to true in the config"
            )
        if not isinstance(how, str | bool | None):
            self._fail("init_lora_weights", "true, false or a name")
        if how not in _KEEPS_BASE:
            known = ", ".join(str(name) for name in _KEEPS_BASE if name is not None)
            raise UnsupportedParameterError(
                f"{self.file}: init_lora_weights is {how!r:.80}, and this library does not know "
                f"whether that changes the base's weights; it knows {known}"
            )

    def _flag(self, key: str) -> bool:
        value = self.raw.get(key)
        if not isinstance(value, bool | None):
            self._fail(key, "true or false")
        return bool(value)

    def _fail(self, key: str, expected: str, *of_pattern: Any) -> NoReturn:
        value = of_pattern[0] if of_pattern else self.raw.get(key)
        raise AdapterFormatError(f"{self.file}: {key} is {value!r:.80}, expected {expected}")


def _matcher(pattern: str) -> Callable[[str], bool]:
    """Whether a module's name matches a pattern as PEFT's `get_pattern_key` says.

    Raises:
        ValueError: the pattern has more to it than these have.
    """
    if not re.fullmatch(r"\^?[\w.-]*", pattern):
        return _Pattern(pattern).matches
    plain = re.compile(rf"(.*\.)?({pattern})$")  # with nothing in it that could take long
    return lambda name: plain.match(name) is not None


Positions = set[int]
_Step = Callable[[str, Positions], Positions]


class _Pattern:
    """A regular expression, matched without backtracking: `re` can be kept busy for years.

    A step takes the positions that matching may have come to and gives those it may come to
    next, so that time is bounded by the pattern and the name.
    """

    def __init__(self, text: str) -> None:
        self._text, self._place, self._depth = text, 0, 0
        if len(text) > _MAX_NAME:
            raise ValueError(f"a pattern of {len(text)} characters; {_MAX_NAME} are read")
        self._step = self._alternatives()
        if self._place < len(text):
            self._give_up()

    def matches(self, name: str) -> bool:
        """Whether the end of a name, from its beginning or after a dot, matches."""
        starts = {0} | {place + 1 for place, letter in enumerate(name) if letter == "."}
        return len(name) in self._step(name, starts)

    def _give_up(self) -> NoReturn:
        raise ValueError(
            f"the pattern {self._text!r:.120} has at character {self._place} what this library "
            r"does not read; of regular expressions it reads . ^ $ | (…) […] * + ? {m,n} \d \w \s"
        )

    def _take(self, expression: str) -> re.Match[str] | None:
        found = re.compile(expression).match(self._text, self._place)
        self._place = found.end() if found else self._place
        return found

    def _alternatives(self) -> _Step:
        branches = [self._sequence()]
        while self._take(r"\|"):
            branches.append(self._sequence())
        return lambda name, places: set().union(*(step(name, places) for step in branches))

    def _sequence(self) -> _Step:
        steps = []
        while self._place < len(self._text) and self._text[self._place] not in "|)":
            steps.append(self._repeated(self._atom()))

        def run(name: str, places: Positions) -> Positions:
            for step in steps:
                places = step(name, places)
            return places

        return run

    def _atom(self) -> _Step:
        if self._take(r"\((\?:)?(?!\?)"):
            self._depth += 1
            inner = self._alternatives() if self._depth <= _MAX_NESTED else None
            if inner is None or not self._take(r"\)"):
                self._give_up()
            self._depth -= 1
            return inner
        if self._take(r"\^"):
            return lambda name, places: places & {0}
        if self._take(r"\$"):
            return lambda name, places: places & {len(name)}
        one = self._take(r"[^\\\[\](){}*+?|^$]|\\[dwsDWS]|\\[^\w]|\[\^?\]?(?:\\.|[^\]\\])*\]")
        if one is None:
            self._give_up()
        try:
            letter = re.compile(one[0])
        except re.error:
            self._give_up()
        return lambda name, places: {
            place + 1 for place in places if place < len(name) and letter.match(name[place])
        }

    def _repeated(self, step: _Step) -> _Step:
        found = self._take(r"(?:([*+?])|\{(?=[\d,])(\d{1,4})?(,)?(\d{1,4})?\})\??(?![*+?{])")
        if found is None:
            return step
        sign, least, comma, most = found.groups()
        low = 1 if sign == "+" else int(least or 0)
        high = 1 if sign == "?" else low if least and not comma else int(most) if most else None

        def run(name: str, places: Positions) -> Positions:
            for _ in range(low):
                places, before = step(name, places), places
                if places == before:
                    break
            reached, new, times = places, places, low
            while new and (high is None or times < high):
                new = step(name, new) - reached
                reached, times = reached | new, times + 1
            return reached

        return run


def _product_shape(b: Shape, a: Shape, transposed: bool) -> Shape:
    """Shape of the parameter that two factors change."""
    shape = (b[0], *a[1:])
    return shape[::-1] if transposed else shape


def _needs_base(file: Path, key: str) -> str:
    return (
        f"{file}: this is {_NEEDS_BASE[key]}; such an adapter cannot be read as a change of "
        "weights. Where PEFT can merge it (merge_and_unload), save the merged model and extract "
        "an adapter from that"
    )


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
