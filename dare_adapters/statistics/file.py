"""Statistics beside an adapter: `fisher.safetensors` and `gram.safetensors`, both optional.

A file holds one float32 or bfloat16 tensor for each parameter, under its checkpoint name, and in
its metadata under `dare_statistics` a JSON object:

| field | |
|---|---|
| format_version | 1 |
| kind | "fisher" or "gram" |
| adapter_sha256 | of the adapter's tensors file: whose statistics these are |
| examples | how many they were computed from |
| dataset | its name |
| dtype | "F32" or "BF16" |
| settings | how they were computed; nothing is read from it |

"fisher" tensors have their parameter's shape. "gram" tensors are (inputs, inputs) of a weight
(outputs, inputs), and (1, inputs, inputs) of a weight (inputs, outputs), as GPT-2's are.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dare_adapters.adapter import Adapter
from dare_adapters.errors import AdapterExistsError, AdapterFormatError, AdapterNotFoundError
from dare_adapters.finite import first_non_finite
from dare_adapters.output import require_space
from dare_adapters.tensor_file import DTYPE_NAMES, TensorFileWriter

__all__ = [
    "KINDS",
    "StatisticsFile",
    "StatisticsInfo",
    "check_storable",
    "open_statistics",
    "prepare_to_write",
    "write_statistics",
]

KINDS = ("fisher", "gram")
FORMAT_VERSION = 1
_METADATA = "dare_statistics"
_DTYPES = ("F32", "BF16")
_MAX_METADATA = 16 << 20


@dataclass(frozen=True)
class StatisticsInfo:
    """What a file says of itself; see the module."""

    kind: str
    adapter_sha256: str
    examples: int
    dataset: str
    dtype: str = "F32"
    settings: Mapping[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


class StatisticsFile(Mapping[str, torch.Tensor]):
    """The statistics of one adapter by checkpoint name; each is read when it is asked for.

    Open one with :func:`open_statistics`.

    Attributes:
        path: of the file.
        info: its metadata.
    """

    def __init__(self, path: Path, info: StatisticsInfo, adapter: Adapter, reader: Any) -> None:
        self.path, self.info = path, info
        self._adapter, self._reader = adapter, reader
        self._names = frozenset(reader.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        """The statistic of one parameter, float32.

        Raises:
            AdapterFormatError: it holds NaN, infinity, or a negative square.
        """
        if name not in self._names:
            raise KeyError(name)
        value: torch.Tensor = self._reader.get_tensor(name).to(torch.float32)
        squares = value if self.info.kind == "fisher" else value.diagonal(dim1=-2, dim2=-1)
        if first_non_finite(value.reshape(-1)) is not None or bool((squares < 0).any()):
            raise AdapterFormatError(
                f"{self.path}: {name} holds NaN, infinity or a negative square; make the file again"
            )
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __deepcopy__(self, memo: dict[int, object]) -> StatisticsFile:
        return self  # nothing changes it

    def __reduce__(self) -> tuple[Any, ...]:
        return open_statistics, (self._adapter, self.info.kind, self.path.parent)

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.path.stat().st_size


def open_statistics(
    adapter: str | Path | Adapter, kind: str, directory: str | Path | None = None
) -> StatisticsFile:
    """Open an adapter's statistics. Every name, dtype and shape is checked before any is read.

    Args:
        adapter: whose.
        kind: "fisher" or "gram".
        directory: where the file is; by default the adapter's own.

    Raises:
        AdapterNotFoundError: there is no such file.
        AdapterFormatError: it is damaged, of another kind, or of another adapter.
        ValueError: there is no such kind.
    """
    _check_kind(kind)
    if not isinstance(adapter, Adapter):
        adapter = Adapter.open(adapter)
    path = (adapter.path if directory is None else Path(directory)) / f"{kind}.safetensors"
    if not path.is_file():
        raise AdapterNotFoundError(
            f"{path} is not there; make it with `dare-adapters stats BASE {adapter.path} "
            f"--kind {kind} --data DATA`"
        )
    try:
        reader: Any = safe_open(path, framework="pt")
        metadata = reader.metadata()
        views = {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118
        found = {name: (v.get_dtype(), tuple(v.get_shape())) for name, v in views.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterFormatError(f"{path}: not a safetensors file ({error})") from error
    info = _read_info(path, (metadata or {}).get(_METADATA))
    if info.kind != kind:
        raise AdapterFormatError(f"{path}: it holds {info.kind} statistics, not {kind}")
    if info.adapter_sha256 != adapter.config.sha256:
        raise AdapterFormatError(
            f"{path}: these are the statistics of another adapter "
            f"({info.adapter_sha256[:12]}…, not {adapter.config.sha256[:12]}…); make those of "
            f"{adapter.path} with `dare-adapters stats`"
        )
    for name, (dtype, shape) in found.items():
        if dtype != info.dtype:
            raise AdapterFormatError(f"{path}: {name} is {dtype}, the metadata says {info.dtype}")
        _check_shape(path, adapter, kind, name, shape)
    return StatisticsFile(path, info, adapter, reader)


def write_statistics(
    directory: str | Path,
    info: StatisticsInfo,
    tensors: Mapping[str, torch.Tensor],
    *,
    overwrite: bool = False,
) -> Path:
    """Write `<kind>.safetensors`: beside its place, then renamed, so it is there whole or not.

    Args:
        directory: an adapter's, or another.
        info: for its metadata; tensors are rounded to `info.dtype`.
        tensors: checkpoint name -> statistic.
        overwrite: replace the file if it exists.

    Raises:
        AdapterExistsError: the file exists and `overwrite` is not set.
        DareError: the disk is too small.
        ValueError: the info is of no known kind or dtype.
    """
    check_storable(info.kind, info.dtype)
    nbytes = sum(tensor.numel() for tensor in tensors.values()) * _item_bytes(info.dtype)
    path = prepare_to_write(Path(directory), info.kind, nbytes, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    dtype = next(torch_dtype for torch_dtype, name in DTYPE_NAMES.items() if name == info.dtype)
    metadata = {"format": "pt", _METADATA: json.dumps(asdict(info), sort_keys=True)}
    writer = TensorFileWriter(partial, metadata)
    try:
        for name, tensor in sorted(tensors.items()):
            writer.add(name, tensor.to(dtype))
        writer.finish()
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)
    return path


def prepare_to_write(directory: Path, kind: str, nbytes: int, overwrite: bool) -> Path:
    """Where the file of a kind goes, after what can be refused before it is computed.

    Raises:
        AdapterExistsError: it exists and `overwrite` is not set.
        DareError: fewer than twice its `nbytes` are free: it is spooled before it is joined.
    """
    path = directory / f"{kind}.safetensors"
    if path.exists() and not overwrite:
        raise AdapterExistsError(f"{path} exists; choose another directory, or overwrite (--force)")
    require_space(directory, 2 * nbytes + (1 << 20))
    return path


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; there are {', '.join(KINDS)}")


def check_storable(kind: str, dtype: str) -> None:
    _check_kind(kind)
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype}; statistics are stored as {', '.join(_DTYPES)}")
    if kind == "gram" and dtype != "F32":
        raise ValueError("Gram matrices are inverted, and must be stored in float32")


def _item_bytes(dtype: str) -> int:
    return 4 if dtype == "F32" else 2


def _read_info(path: Path, text: object) -> StatisticsInfo:
    """The metadata, every field checked.

    Raises:
        AdapterFormatError: which field is wrong.
    """
    if not isinstance(text, str) or len(text) > _MAX_METADATA:
        raise AdapterFormatError(f"{path}: no {_METADATA} in its metadata; not a statistics file")
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(f"{path}: {_METADATA} is not JSON ({error})") from error
    if not isinstance(raw, dict):
        raise AdapterFormatError(f"{path}: {_METADATA} is not an object")

    def take(key: str, sound: bool, expected: str) -> Any:
        if not sound:
            raise AdapterFormatError(f"{path}: {key} is {raw.get(key)!r:.80}, expected {expected}")
        return raw[key]

    def whole(key: str, least: int) -> bool:
        return type(raw.get(key)) is int and raw[key] >= least

    version = take("format_version", whole("format_version", 1), "a whole number")
    if version > FORMAT_VERSION:
        raise AdapterFormatError(
            f"{path}: format version {version}, this library reads up to {FORMAT_VERSION}; "
            "upgrade dare-adapters"
        )
    settings = raw.get("settings")
    texts = {key: isinstance(raw.get(key), str) for key in ("adapter_sha256", "dataset")}
    kind = take("kind", raw.get("kind") in KINDS, f"one of {', '.join(KINDS)}")
    allowed = _DTYPES if kind == "fisher" else _DTYPES[:1]
    return StatisticsInfo(
        kind=kind,
        adapter_sha256=take("adapter_sha256", texts["adapter_sha256"], "a string"),
        examples=take("examples", whole("examples", 1), "a whole number from 1"),
        dataset=take("dataset", texts["dataset"], "a string"),
        dtype=take("dtype", raw.get("dtype") in allowed, f"one of {', '.join(allowed)}"),
        settings=take("settings", isinstance(settings, dict), "an object"),
        format_version=version,
    )


def _check_shape(
    path: Path, adapter: Adapter, kind: str, name: str, shape: tuple[int, ...]
) -> None:
    """Compare a tensor with the adapter's parameter of that name.

    Raises:
        AdapterFormatError: the adapter's base has no such parameter, or one of another shape.
    """
    entry = adapter.config.parameters.get(name)
    if entry is None and name not in adapter.config.witness:
        raise AdapterFormatError(f"{path}: {name} is no parameter of the base of {adapter.path}")
    if kind == "gram":
        square = len(shape) in (2, 3) and shape[-2:] == 2 * shape[-1:] and shape[:-2] in ((), (1,))
        input_axis = 0 if len(shape) == 3 else 1
        fits = entry is None or (len(entry.shape) == 2 and shape[-1] == entry.shape[input_axis])
        expected = "(inputs, inputs), or (1, inputs, inputs) of a weight (inputs, outputs)"
    elif entry is not None:
        square, fits, expected = True, shape == entry.shape, str(list(entry.shape))
    else:
        size = adapter.config.witness[name].split(":")[1:2]
        square, fits = True, size == [str(torch.Size(shape).numel())]
        expected = f"{''.join(size)} entries"
    if not (square and fits):
        raise AdapterFormatError(
            f"{path}: {name} has the shape {list(shape)}, expected {expected}; "
            f"it was made for another base than that of {adapter.path}"
        )
