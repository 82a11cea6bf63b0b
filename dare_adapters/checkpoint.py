"""Hugging Face checkpoints, read lazily: single or sharded safetensors, `.bin` as weights only.

Those of transformers, and those of single models of diffusers: a UNet, a transformer, a VAE.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dare_adapters.errors import CheckpointError
from dare_adapters.mapped_pages import MappedFile

__all__ = ["Checkpoint", "ParameterInfo", "open_checkpoint", "read_json"]

SAFETENSORS = "model.safetensors"
PICKLED = "pytorch_model.bin"
OF_DIFFUSERS = "diffusion_pytorch_model"
# Pickles only where there is nothing else.
_WEIGHTS = (SAFETENSORS, f"{OF_DIFFUSERS}.safetensors", PICKLED, f"{OF_DIFFUSERS}.bin")
# Of several models, each in a folder of its own.
_PIPELINE = "model_index.json"
MAX_JSON_BYTES = 64 << 20
MAX_JSON_DEPTH = 64

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_READABLE = (
    f"this library reads dense tensors of {', '.join(DTYPES)} "
    "(a quantised checkpoint has no delta of plain numbers)"
)


@dataclass(frozen=True)
class ParameterInfo:
    """What is known of a stored tensor without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class Checkpoint(Mapping[str, torch.Tensor]):
    """The tensors of a model directory by checkpoint name; each is read when it is asked for.

    Attributes:
        path: the directory.
        config: config.json, or {} where there is none.
        info: shape and dtype of every tensor.
        shards: file name -> tensor names, in the order of the index.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config: dict[str, Any] = _optional_json(path / "config.json")
        self.info: dict[str, ParameterInfo] = {}
        self.shards: dict[str, list[str]] = {}
        self._readers: dict[str, Any] = {}
        self._mapped: dict[str, torch.Tensor] = {}
        self._mapped_files: dict[str, MappedFile] = {}
        self._file_of: dict[str, str] = {}
        for file, names in _list_shards(path).items():
            self._open(file, names)

    def __getitem__(self, name: str) -> torch.Tensor:
        """The tensor, memory-mapped where the file allows it: do not write to it."""
        tensor = self._mapped.get(name)
        if tensor is None:
            reader = self._readers[self._file_of[name]]
            tensor = reader[name] if isinstance(reader, dict) else reader.get_tensor(name)
            assert isinstance(tensor, torch.Tensor)
            self._mapped[name] = tensor  # a mapping, not a copy: it holds no memory
        return tensor

    def release(self, name: str) -> None:
        """Take a tensor that was read out of resident memory, where it is mapped."""
        file = self._file_of[name]
        if name in self._mapped and not isinstance(self._readers[file], dict):
            self._mapped_files[file].release_pages(self._mapped[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.info)

    def __len__(self) -> int:
        return len(self.info)

    def __contains__(self, name: object) -> bool:
        return name in self.info

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.info.values())

    @property
    def architectures(self) -> list[str]:
        """Class names from the config."""
        named = self.config.get("architectures")
        if not isinstance(named, list):
            named = [self.config["_class_name"]] if self.of_diffusers else []
        return [str(name) for name in named]

    @property
    def of_diffusers(self) -> bool:
        """Whether it is a model of diffusers, which tells its class under another name."""
        return "architectures" not in self.config and "_class_name" in self.config

    @property
    def weights_name(self) -> str:
        """What its library calls a single file of weights."""
        return f"{OF_DIFFUSERS}.safetensors" if self.of_diffusers else SAFETENSORS

    @property
    def tied(self) -> bool:
        """Whether the output head is the input embedding."""
        text = self.config.get("text_config")
        own = text if isinstance(text, dict) else {}
        return bool(self.config.get("tie_word_embeddings", own.get("tie_word_embeddings", False)))

    @property
    def vocab_size(self) -> int | None:
        """Rows of the embedding, as the config has it."""
        text = self.config.get("text_config")
        own = text if isinstance(text, dict) else {}
        size = self.config.get("vocab_size", own.get("vocab_size"))
        return size if isinstance(size, int) else None

    def _open(self, file: str, names: list[str] | None) -> None:
        full = self.path / file
        if file.endswith(".safetensors"):
            try:
                reader: Any = safe_open(full, framework="pt")
                found = list(reader.keys())
                info = {name: _slice_info(reader, name, full) for name in found}
            except (SafetensorError, OSError, ValueError) as error:
                raise CheckpointError(
                    f"{full}: not a readable safetensors file ({error}); download it again"
                ) from error
        else:
            reader = _load_pickled(full)
            info = {
                name: ParameterInfo(tuple(value.shape), value.dtype)
                for name, value in reader.items()
            }
        for name in info if names is None else names:
            if name not in info:
                raise CheckpointError(
                    f"{self.path}: the index says {name} is in {file}, but it is not; "
                    "the shards and the index are of different versions"
                )
            if name in self.info:
                raise CheckpointError(f"{self.path}: {name} is in two shards")
            self.info[name] = info[name]
            self._file_of[name] = file
            self.shards.setdefault(file, []).append(name)
        self._readers[file] = reader
        self._mapped_files[file] = MappedFile(full)


def open_checkpoint(
    source: str | Path, revision: str | None = None, token: str | bool | None = None
) -> Checkpoint:
    """Open a local model directory, or a model of the Hugging Face hub.

    Args:
        source: a directory, or a hub id such as "meta-llama/Llama-2-13b-hf".
        revision: branch, tag or commit; for hub ids only.
        token: hub access token.

    Raises:
        CheckpointError: nothing is there, a shard is missing or damaged.
    """
    path = Path(source)
    if not path.is_dir():
        path = _download(str(source), revision, token)
    return Checkpoint(path)


def _download(repo: str, revision: str | None, token: str | bool | None) -> Path:
    from huggingface_hub import snapshot_download

    small = ["*.json", "*.model", "*.txt", "*.jinja", "LICENSE*"]
    try:
        # Weights in the pickle format are fetched only where there are no others.
        pickles = ["pytorch_model*.bin", f"{OF_DIFFUSERS}*.bin"]
        for singles, weights in ((_WEIGHTS[:2], ["*.safetensors"]), (_WEIGHTS[2:], pickles)):
            found = Path(
                snapshot_download(
                    repo,
                    revision=revision,
                    token=token,
                    allow_patterns=[*weights, *small],
                    # The same weights once more: under other names, or in float16.
                    ignore_patterns=["*/*", "consolidated*", f"{OF_DIFFUSERS}.*.*"],
                )
            )
            if any(_has(found, single) for single in singles) or (found / _PIPELINE).is_file():
                return found
    except Exception as error:  # of the hub's client, its HTTP library, or the disk
        raise CheckpointError(
            f"{repo!r} is neither a directory nor a model that the hub can give: {error}"
        ) from error
    raise CheckpointError(f"{repo!r} has neither safetensors nor pytorch_model.bin weights")


def _list_shards(path: Path) -> dict[str, list[str] | None]:
    """File name -> the tensors that the index puts in it (None: all that it has)."""
    for single in _WEIGHTS:
        if (path / single).is_file():
            return {single: None}
        index = path / f"{single}.index.json"
        if index.is_file():
            return _read_index(path, index)
    if (path / _PIPELINE).is_file():
        raise CheckpointError(
            f"{path} is a pipeline of several models: download it, and take the folder of each "
            "that was fine-tuned (unet, transformer, text_encoder, …) by itself"
        )
    raise CheckpointError(
        f"{path}: no weights; expected {', '.join(_WEIGHTS)}, or one of them with .index.json"
    )


def _has(path: Path, single: str) -> bool:
    return (path / single).is_file() or (path / f"{single}.index.json").is_file()


def _read_index(path: Path, index: Path) -> dict[str, list[str] | None]:
    weight_map = read_json(index, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map")
    shards: dict[str, list[str] | None] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{index}: {name} is said to be in {file!r}, not a file name")
        names = shards.setdefault(file, [])
        assert names is not None
        names.append(name)
    missing = [file for file in shards if not (path / file).is_file()]
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(shards)} shards are missing: {', '.join(missing)}"
        )
    return shards


def _slice_info(reader: Any, name: str, file: Path) -> ParameterInfo:
    view = reader.get_slice(name)
    dtype = DTYPES.get(view.get_dtype())
    if dtype is None:
        raise CheckpointError(f"{file}: {name} has the dtype {view.get_dtype()}; {_READABLE}")
    return ParameterInfo(tuple(view.get_shape()), dtype)


def _load_pickled(file: Path) -> dict[str, torch.Tensor]:
    """A `.bin` file without running any code in it."""
    error: Exception | None = None
    for mmap in (True, False):  # files of torch before 1.6 cannot be mapped
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
            break
        except Exception as failure:
            error = failure
    else:
        raise CheckpointError(
            f"{file}: cannot be read with torch.load(weights_only=True) ({error}); "
            "it is damaged, or holds objects other than tensors: convert it to safetensors"
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()
    ):
        raise CheckpointError(f"{file}: not a dictionary of tensors")
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.dtype not in DTYPES.values():
            raise CheckpointError(
                f"{file}: {name} is a {tensor.layout} tensor of {tensor.dtype}; {_READABLE}"
            )
    return {name: tensor.detach() for name, tensor in state.items()}


def read_json(path: Path, error: type[Exception]) -> dict[str, Any]:
    """A JSON object from a file of bounded size; `error` is raised for anything else."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise error(f"{path}: {size} bytes, more than the {MAX_JSON_BYTES} that are read")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as failure:
        raise error(f"{path}: not readable as JSON ({failure})") from failure
    if not isinstance(value, dict):
        raise error(f"{path}: expected a JSON object, found {type(value).__name__}")
    if nested_deeper(value, MAX_JSON_DEPTH):
        raise error(f"{path}: nested deeper than {MAX_JSON_DEPTH} levels")
    return value


def nested_deeper(value: Any, levels: int) -> bool:
    """Whether JSON is nested deeper than that, which printing or hashing it might not survive."""
    level = [value]
    for _ in range(levels):
        level = [
            item
            for parent in level
            for item in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(item, (dict, list))
        ]
        if not level:
            return False
    return True


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path, CheckpointError) if path.is_file() else {}
