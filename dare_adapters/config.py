"""adapter_config.json: enough to allocate every tensor of an adapter before reading one."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from dare_adapters import codec
from dare_adapters.checkpoint import read_json
from dare_adapters.errors import AdapterFormatError
from dare_adapters.mask import MAX_BLOCK, MAX_DROP_RATE, matrix_shape
from dare_adapters.scales import SCALE_DTYPES

__all__ = ["CONFIG_NAME", "FORMAT_VERSION", "WEIGHTS_NAME", "AdapterConfig", "ParameterEntry"]

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
FORMAT_VERSION = 1
MASKS = ("blocked", "bernoulli", "bitmap", "gaps")
KINDS = ("sparse", "dense", "new")
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
PLAIN = {**FLOATS, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
MAX_NUMEL = 1 << 40
EXPONENTS = (-149, 128)  # of float32, with those below its normal range
KEY_PREFIX = "base_model.model."
# What a reader's result depends on; the rest (names, statistics) may be edited.
BINDING = (
    "format_version",
    "seed",
    "parameters",
    "witness",
    "finetuned_prefix",
    "ignored_base_parameters",
    "sha256",
)


@dataclass
class ParameterEntry:
    """How one parameter is stored.

    Attributes:
        kind: "sparse" or "dense" (a delta), "new" (the value of a parameter the base has not).
        shape: of the base's parameter; of the value where new.
        mask, block, drop_rate, bits, exponent: of a sparse delta; block for "blocked" masks.
        dtype: safetensors name; of the values at 32 and 16 bits, of a dense delta, of a new value.
        slots: stored survivors, where the mask does not fix them.
        value_units: length of the values tensor, where the mask does not fix it.
        support_bytes: length of the column gaps.
        added_rows, added_dtype: vocabulary rows beyond the base's.
        finetuned_name: the fine-tune's name, where it is not the prefix and this name.
    """

    kind: str
    shape: tuple[int, ...]
    mask: str | None = None
    block: int | None = None
    drop_rate: float | None = None
    bits: int | None = None
    exponent: int = 0
    dtype: str | None = None
    slots: int | None = None
    value_units: int | None = None
    support_bytes: int | None = None
    added_rows: int = 0
    added_dtype: str | None = None
    finetuned_name: str | None = None

    def tensors(self, name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Key in the tensors file -> (dtype, shape), of every tensor of this parameter."""
        found: dict[str, tuple[str, tuple[int, ...]]] = {}
        rows, columns = matrix_shape(self.shape)
        if self.kind == "sparse":
            assert self.bits is not None
            value_dtype = self.dtype if self.bits >= 16 else "U8"
            assert value_dtype is not None
            if self.mask == "blocked":
                assert self.block is not None
                slots = -(-columns // self.block)
                width = slots if self.bits >= 16 else codec.bytes_per_row(slots, self.bits)
                found[tensor_key(name, "values")] = (value_dtype, (rows, width))
            else:
                assert self.value_units is not None
                found[tensor_key(name, "values")] = (value_dtype, (self.value_units,))
            if self.mask == "bitmap":
                found[tensor_key(name, "support")] = ("U8", (rows, -(-columns // 8)))
            elif self.mask == "gaps":
                assert self.support_bytes is not None
                found[tensor_key(name, "support")] = ("U8", (self.support_bytes,))
            if self.bits < 16:
                found[tensor_key(name, "scales")] = (SCALE_DTYPES[self.bits], (rows,))
        else:
            assert self.dtype is not None
            part = "delta" if self.kind == "dense" else "value"
            found[tensor_key(name, part)] = (self.dtype, self.shape)
        if self.added_rows:
            assert self.added_dtype is not None
            shape = (self.added_rows, *self.shape[1:])
            found[tensor_key(name, "rows")] = (self.added_dtype, shape)
        return found

    def to_json(self) -> dict[str, Any]:
        """Without the fields that say nothing."""
        return {
            f.name: list(value) if f.name == "shape" else value
            for f in fields(self)
            if (value := getattr(self, f.name)) != f.default
        }

    @classmethod
    def from_json(cls, name: str, raw: Any) -> ParameterEntry:
        """From JSON, every field checked.

        Raises:
            AdapterFormatError: a field is missing, of the wrong type, or out of range.
        """
        check = _Check(f"parameter {name}", raw)
        kind = check.choice("kind", KINDS)
        entry = cls(kind=kind, shape=check.shape("shape"))
        entry.finetuned_name = check.text("finetuned_name", optional=True)
        rows, columns = matrix_shape(entry.shape)
        if kind == "sparse":
            entry.mask = check.choice("mask", MASKS)
            entry.bits = check.choice("bits", codec.BITS)
            entry.drop_rate = check.rate("drop_rate")
            entry.exponent = check.integer("exponent", *EXPONENTS, default=0)
            if entry.drop_rate > MAX_DROP_RATE:
                check.fail("drop_rate", f"at most {MAX_DROP_RATE}")
            if not rows * columns:
                check.fail("shape", "at least one entry: a sparse delta of nothing is not stored")
            if entry.bits >= 16:
                widths = {16: ("F16", "BF16"), 32: ("F32",)}
                entry.dtype = check.choice("dtype", widths[entry.bits])
            if entry.mask == "blocked":
                entry.block = check.integer("block", 1, MAX_BLOCK)
            else:
                size = rows * columns
                entry.slots = check.integer("slots", *_survivor_range(entry, size))
                entry.value_units = check.integer("value_units", 0, size)
                if entry.mask == "gaps":
                    entry.support_bytes = check.integer("support_bytes", 0, size)
        else:
            entry.dtype = check.choice("dtype", tuple(FLOATS if kind == "dense" else PLAIN))
        entry.added_rows = check.integer("added_rows", 0, MAX_NUMEL, default=0)
        if entry.added_rows:
            if kind == "new" or not entry.shape:
                check.fail("added_rows", "a delta with at least one dimension")
            entry.added_dtype = check.choice("added_dtype", tuple(FLOATS))
        check.no_others()
        return entry


@dataclass
class AdapterConfig:
    """The contents of adapter_config.json; see README, "The adapter format"."""

    base_model_name_or_path: str | None = None
    revision: str | None = None
    base_architectures: list[str] = field(default_factory=list)
    task_type: str | None = None
    method: str = "dare"
    mask: str = "blocked"
    drop_rate: float = 0.9
    bits: int = 4
    seed: int = 0
    rescale: bool = True
    finetuned_model: dict[str, Any] = field(default_factory=dict)
    finetuned_prefix: str = ""
    ignored_base_parameters: list[str] = field(default_factory=list)
    parameters: dict[str, ParameterEntry] = field(default_factory=dict)
    witness: dict[str, str] = field(default_factory=dict)
    fidelity: dict[str, dict[str, float]] = field(default_factory=dict)
    base_parameter_count: int = 0
    library_versions: dict[str, str] = field(default_factory=dict)
    sha256: str = ""
    format_version: int = FORMAT_VERSION
    peft_type: str = "DARE"
    target_modules: None = None
    inference_mode: bool = True

    def to_json(self) -> dict[str, Any]:
        """The whole config as JSON, with its digest."""
        raw = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "parameters"}
        raw["parameters"] = {name: entry.to_json() for name, entry in self.parameters.items()}
        raw["digest"] = _digest(raw)
        return dict(sorted(raw.items()))

    def save(self, directory: Path, extra: Mapping[str, Any] | None = None) -> None:
        """Write adapter_config.json, with fields of others in it that this format ignores."""
        text = _one_line_an_entry(dict(sorted({**(extra or {}), **self.to_json()}.items())))
        (directory / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> AdapterConfig:
        """Read and check adapter_config.json.

        Raises:
            AdapterFormatError: it is not the config of a DARE adapter, or damaged, or too new.
        """
        path = directory / CONFIG_NAME
        return cls.from_json(read_json(path, AdapterFormatError), str(path))

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], path: str) -> AdapterConfig:
        """Check what adapter_config.json holds.

        Args:
            raw: the whole object.
            path: what messages call it.

        Raises:
            AdapterFormatError: as :meth:`load` says.
        """
        if raw.get("peft_type") != "DARE":
            raise AdapterFormatError(
                f"{path}: peft_type is {raw.get('peft_type')!r}; load_dare_adapter takes DARE "
                "adapters only, other kinds load with model.load_adapter or PeftModel"
            )
        check = _Check(path, raw)
        version = check.integer("format_version", 1, 1 << 31)
        if version > FORMAT_VERSION:
            raise AdapterFormatError(
                f"{path}: format version {version}, this library reads up to {FORMAT_VERSION}; "
                "upgrade dare-adapters"
            )
        parameters = check.mapping("parameters")
        config = cls(
            base_model_name_or_path=check.text("base_model_name_or_path", optional=True),
            revision=check.text("revision", optional=True),
            base_architectures=check.texts("base_architectures"),
            task_type=check.text("task_type", optional=True),
            method=check.text("method") or "",
            mask=check.text("mask") or "",
            drop_rate=check.rate("drop_rate"),
            bits=check.choice("bits", codec.BITS),
            seed=check.integer("seed", 0, (1 << 64) - 1),
            rescale=bool(raw.get("rescale", True)),
            finetuned_model=check.mapping("finetuned_model"),
            finetuned_prefix=check.text("finetuned_prefix") or "",
            ignored_base_parameters=check.texts("ignored_base_parameters"),
            parameters={n: ParameterEntry.from_json(n, e) for n, e in parameters.items()},
            witness=check.mapping("witness"),
            fidelity=check.mapping("fidelity"),
            base_parameter_count=check.integer("base_parameter_count", 0, MAX_NUMEL),
            library_versions=check.mapping("library_versions"),
            sha256=check.text("sha256") or "",
        )
        if raw.get("digest") != _digest(raw):
            raise AdapterFormatError(
                f"{path}: its digest does not match its contents; the file was edited or damaged "
                f"(only the fields outside {', '.join(BINDING)} may be edited)"
            )
        return config

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Every tensor that the tensors file must hold: key -> (dtype, shape)."""
        return dict(self._tensors())

    def _tensors(self) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
        for name, entry in self.parameters.items():
            yield from entry.tensors(name).items()

    def pruned_numel(self) -> int:
        """Entries of all parameters that were pruned."""
        return sum(math.prod(e.shape) for e in self.parameters.values() if e.kind == "sparse")

    def summary(self) -> dict[str, Any]:
        """The fields of one value each, for display."""
        return {
            key: value
            for key, value in asdict(self).items()
            if key not in ("parameters", "witness", "fidelity", "library_versions")
        }


def _one_line_an_entry(raw: dict[str, Any]) -> str:
    """JSON for people and for size: an object of objects has a line for each of them."""
    lines = []
    for key, value in raw.items():
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        if isinstance(value, dict) and value:
            items = (
                f"{json.dumps(name)}:{json.dumps(item, ensure_ascii=False, separators=(',', ':'))}"
                for name, item in value.items()
            )
            text = "{\n" + ",\n".join(items) + "}"
        lines.append(f"{json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}"


def tensor_key(name: str, part: str) -> str:
    """Key of one tensor: `base_model.model.<module>.dare_<parameter>_<part>`."""
    module, _, parameter = name.rpartition(".")
    return f"{KEY_PREFIX}{module + '.' if module else ''}dare_{parameter}_{part}"


def _survivor_range(entry: ParameterEntry, size: int) -> tuple[int, int]:
    """How many of `size` entries may survive: no file of a few bytes may name a vast parameter.

    A Bernoulli mask keeps size * (1 - p), give or take twelve standard deviations. No other mask
    is thinner than the thinnest blocked one.
    """
    if entry.mask != "bernoulli":
        return max(0, size // MAX_BLOCK - 64), size
    assert entry.drop_rate is not None
    expected = size * (1 - entry.drop_rate)
    slack = 12 * math.sqrt(expected) + 64
    return max(0, math.floor(expected - slack)), min(size, math.ceil(expected + slack))


def tensor_nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor in the file."""
    return PLAIN[dtype] * math.prod(shape)


def _digest(raw: Mapping[str, Any]) -> str:
    bound = {key: raw.get(key) for key in BINDING}
    text = json.dumps(bound, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


class _Check:
    """Fields of one JSON object, taken out with a check each."""

    def __init__(self, where: str, raw: Any) -> None:
        self.where = where
        if not isinstance(raw, dict):
            raise AdapterFormatError(f"{where}: expected an object, found {type(raw).__name__}")
        self.raw = raw
        self.taken: set[str] = set()

    def fail(self, key: str, expected: str) -> None:
        value = self.raw.get(key)
        raise AdapterFormatError(f"{self.where}: {key} is {value!r:.80}, expected {expected}")

    def _take(self, key: str) -> Any:
        self.taken.add(key)
        return self.raw.get(key)

    def no_others(self) -> None:
        if others := set(self.raw) - self.taken:
            raise AdapterFormatError(f"{self.where}: unknown fields {', '.join(sorted(others))}")

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = self._take(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            self.fail(key, f"a whole number in {low} … {high}")
        return int(value)

    def rate(self, key: str) -> float:
        value = self._take(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            self.fail(key, "a number in [0, 1]")
        return float(value)

    def text(self, key: str, optional: bool = False) -> str | None:
        value = self._take(key)
        if not isinstance(value, str) and not (optional and value is None):
            self.fail(key, "a string" + (" or null" if optional else ""))
        return value  # type: ignore[no-any-return]

    def texts(self, key: str) -> list[str]:
        value = self._take(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.fail(key, "a list of strings")
        return list(value)

    def mapping(self, key: str) -> dict[str, Any]:
        value = self._take(key)
        if not isinstance(value, dict):
            self.fail(key, "an object")
        return dict(value)

    def choice(self, key: str, valid: tuple[Any, ...]) -> Any:
        value = self._take(key)
        # 4.0 and True are equal to whole numbers and are none.
        if type(value) not in {type(option) for option in valid} or value not in valid:
            self.fail(key, "one of " + ", ".join(str(v) for v in valid))
        return value

    def shape(self, key: str) -> tuple[int, ...]:
        value = self._take(key)
        sound = isinstance(value, list) and len(value) <= 8
        sound = sound and all(
            isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= MAX_NUMEL for n in value
        )
        if not sound or math.prod(value) > MAX_NUMEL:
            self.fail(key, f"a list of sizes, at most {MAX_NUMEL} entries in all")
        return tuple(value)
