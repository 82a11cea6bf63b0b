"""A model's layers to the tensors and the config of an adapter's file.

PEFT takes the tensors first, writes them, and saves the config; transformers saves the config
before it writes them. So a config remembers what was taken by whom it describes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save as safetensors_bytes
from torch import nn

from dare_adapters.config import KEY_PREFIX, WEIGHTS_NAME, AdapterConfig, ParameterEntry, tensor_key
from dare_adapters.encode import encode_seeded
from dare_adapters.model_guards import without_dare_adapters
from dare_adapters.sparse_delta import SparseDelta
from dare_adapters.tensor_file import DTYPE_NAMES, TensorFileWriter, file_sha256
from dare_adapters.tuner.base_witness import witness_of_base
from dare_adapters.tuner.loading import HeldTensor, held_tensors
from dare_adapters.tuner.names import base_model, own_tensors
from dare_adapters.tuner.stored import StoredParameter
from dare_adapters.versions import library_versions

if TYPE_CHECKING:
    from dare_adapters.tuner.config import DareConfig

__all__ = ["Taken", "adapter_state_dict", "save_again", "take_description"]

_ORDER = ("scales", "support", "values", "delta", "value", "rows")


@dataclass
class Taken:
    """Tensors that are about to be written, and the config that describes them.

    Attributes:
        description: complete but for the digest of the file.
        tensors: key in the file -> tensor.
    """

    description: AdapterConfig
    tensors: dict[str, torch.Tensor]


def adapter_state_dict(
    model: nn.Module, config: DareConfig, adapter: str, state_dict: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors of an adapter as its file has them.

    Args:
        model: with the adapter; keys have PEFT's prefix where it is a `PeftModel`.
        config: of the adapter; it remembers what was taken, for `save_pretrained`.
        adapter: its name.
        state_dict: of the model.
    """
    held = [tensor for tensor in held_tensors(model, adapter) if tensor.live_key in state_dict]
    groups: dict[int, list[HeldTensor]] = {}
    for tensor in held:
        groups.setdefault(id(tensor.stored), []).append(tensor)
    entries: dict[str, ParameterEntry] = {}
    tensors: dict[str, torch.Tensor] = {}
    for group in groups.values():
        stored = group[0].stored
        parts = {tensor.part: state_dict[tensor.live_key] for tensor in group}
        name = stored.placement.name
        entries[name], made = _stored(stored, parts, config.bits)
        tensors.update({tensor_key(name, part): one for part, one in made.items()})
    kept: dict[str, torch.Tensor] = config.unplaced
    for name, entry in config.entries.items():
        keys = entry.tensors(name)
        if name not in entries and all(key in kept for key in keys):
            entries[name] = entry
            tensors.update({key: kept[key] for key in keys})
    description = _describe(model, config, entries)
    config._taken = Taken(description, tensors)
    if held and not held[0].live_key.startswith(KEY_PREFIX):
        return {key.removeprefix(KEY_PREFIX): one for key, one in tensors.items()}
    return dict(tensors)


def take_description(config: DareConfig, directory: Path) -> AdapterConfig | None:
    """What is to be written into adapter_config.json; None: the config is only a recipe.

    Args:
        config: of the adapter.
        directory: where the tensors file is, if it was written already.
    """
    taken: Taken | None = getattr(config, "_taken", None)
    if taken is None:
        return config.described
    file = directory / WEIGHTS_NAME
    read = config.described
    same = read is not None and taken.description.parameters == read.parameters
    whole = {key: one.detach().cpu().contiguous() for key, one in taken.tensors.items()}
    # Both libraries write with safetensors, now or when this is done.
    digest = hashlib.sha256(safetensors_bytes(whole, {"format": "pt"})).hexdigest()
    written = file.is_file() and file_sha256(file) == digest
    if read is not None and same and written and digest != read.sha256:
        digest = _written_as_read(read, whole, file) or digest
    if same and read is not None and digest == read.sha256:
        return read
    taken.description.sha256 = digest
    return taken.description


def save_again(model: nn.Module, directory: str | Path) -> None:
    """After transformers has written an adapter: config and tensors as they were read.

    It saves the config before the tensors, and these in the order of the safetensors library.
    """
    from dare_adapters.tuner.config import DareConfig

    configs = getattr(model, "peft_config", None)
    active = getattr(model, "active_adapters", None)
    if not isinstance(configs, dict) or not callable(active):
        return
    for name in active():
        config = configs.get(name)
        if not isinstance(config, DareConfig) or config.described is None:
            continue
        if (Path(directory) / WEIGHTS_NAME).is_file():
            config.save_pretrained(directory)


def _written_as_read(
    read: AdapterConfig, tensors: dict[str, torch.Tensor], file: Path
) -> str | None:
    """Exchange a file for the one that was read, if that is what its tensors make; its SHA-256.

    Other libraries write tensors in another order.
    """
    again = file.with_name(f"{file.name}.again")
    again.unlink(missing_ok=True)
    writer = TensorFileWriter(again, {"format": "pt"})
    try:
        for name, entry in read.parameters.items():
            keys = entry.tensors(name)
            for part in _ORDER:  # as they are encoded
                if (key := tensor_key(name, part)) in keys:
                    writer.add(key, tensors[key])
        digest = writer.finish()
        if digest != read.sha256:
            return None
        again.replace(file)
        return digest
    finally:
        writer.close()
        again.unlink(missing_ok=True)


def _stored(
    stored: StoredParameter, parts: dict[str, torch.Tensor], bits: int | None
) -> tuple[ParameterEntry, dict[str, torch.Tensor]]:
    """A parameter's entry and tensors as they are to be written."""
    placement, entry = stored.placement, stored.held
    whole = {part: _whole(one) for part, one in parts.items()}
    if entry.kind == "sparse" and bits is not None and bits < 16 and placement.trainable:
        delta = stored.delta({part: one.cpu() for part, one in whole.items()})
        assert isinstance(delta, SparseDelta)
        encoded = encode_seeded(placement.name, delta, bits, entry)
        prefix = tensor_key(placement.name, "")
        tensors = {key.removeprefix(prefix): one for key, one in encoded.tensors.items()}
        return encoded.entry, tensors
    as_read = _as_read(placement.entry, entry, whole)
    if as_read is not None:
        return placement.entry, as_read
    if entry.kind != "sparse":
        part = "delta" if entry.kind == "dense" else "value"
        made = replace(entry, dtype=DTYPE_NAMES[whole[part].dtype])
        return _with_rows(made, whole), whole
    values = whole["values"]
    if values.dtype == torch.float64:
        values = whole["values"] = values.to(torch.float32)
    made = replace(entry, bits=8 * values.element_size(), dtype=DTYPE_NAMES[values.dtype])
    return _with_rows(made, whole), whole


def _as_read(
    read: ParameterEntry, held: ParameterEntry, parts: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor] | None:
    """The tensors in the dtypes that the file had, where nothing is lost by it."""
    if read != held:
        return None
    found = {}
    for key, (dtype, _) in read.tensors("x").items():
        part = key.rpartition("_")[2]
        tensor = parts[part]
        wanted = _DTYPES[dtype]
        if tensor.dtype != wanted:
            made = tensor.to(wanted)
            if not torch.equal(made.to(tensor.dtype), tensor):
                return None
            tensor = made
        found[part] = tensor
    return found


def _with_rows(entry: ParameterEntry, parts: dict[str, torch.Tensor]) -> ParameterEntry:
    if "rows" in parts:
        return replace(entry, added_dtype=DTYPE_NAMES[parts["rows"].dtype])
    return entry


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor gathered."""
    gathered = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    assert isinstance(gathered, torch.Tensor)
    return gathered.detach()


def _describe(
    model: nn.Module, config: DareConfig, entries: dict[str, ParameterEntry]
) -> AdapterConfig:
    read = config.described
    pruned = [e.bits for e in entries.values() if e.kind == "sparse" and e.bits is not None]
    if read is not None:
        order = [*(name for name in read.parameters if name in entries)]
        order += [name for name in entries if name not in read.parameters]
        entries = {name: entries[name] for name in order}
        bits = max(pruned, default=read.bits)
        return replace(read, parameters=entries, bits=bits, method=_method(read, entries))
    base = base_model(model)
    architectures = getattr(getattr(base, "config", None), "architectures", None)
    with without_dare_adapters(base):  # those of `load_dare_adapter` may have added rows
        count = sum(owner.tensor.numel() for owner in own_tensors(base).values())
    new = {name for name, entry in entries.items() if entry.kind == "new"}
    return AdapterConfig(
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        base_architectures=list(architectures or [type(base).__name__]),
        task_type=None
        if config.task_type is None
        else str(getattr(config.task_type, "value", config.task_type)),
        method="trained",
        mask="blocked" if config.rule.block is not None else "bernoulli",
        drop_rate=config.drop_rate,
        bits=max(pruned, default=config.bits or 32),
        seed=config.seed or 0,
        rescale=False,
        parameters=entries,
        witness=witness_of_base(base, new),
        base_parameter_count=count,
        library_versions=library_versions(),
    )


def _method(read: AdapterConfig, entries: dict[str, ParameterEntry]) -> str:
    return read.method if read.parameters == entries else "trained"


_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
