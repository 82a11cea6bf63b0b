"""Whatever kind of adapter a directory or hub id is, opened as a source of deltas."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dare_adapters.adapter import Adapter, resolve_adapter
from dare_adapters.checkpoint import read_json
from dare_adapters.combine.mix import is_mix, open_mix
from dare_adapters.config import CONFIG_NAME
from dare_adapters.errors import AdapterFormatError, AdapterNotFoundError
from dare_adapters.lora import LoraAdapter
from dare_adapters.source import DeltaSource

__all__ = ["open_source", "opening_source"]


def open_source(
    path_or_id: str | Path,
    revision: str | None = None,
    token: str | bool | None = None,
    verify: bool = True,
) -> DeltaSource:
    """Open an adapter by the `peft_type` of its config.

    Args:
        path_or_id: a directory, or a hub id.
        revision, token: for hub ids.
        verify: look at every number, and at a DARE adapter's SHA-256; of all that a mix names.

    Raises:
        AdapterNotFoundError: there is no adapter.
        AdapterFormatError: it is of another kind, or damaged.
        UnsupportedParameterError: a kind of LoRA that is no change of weights.
        CombinationError: a mix that cannot be computed.
    """
    with opening_source(path_or_id, revision, token, verify) as source:
        return source


@contextmanager
def opening_source(
    path_or_id: str | Path,
    revision: str | None = None,
    token: str | bool | None = None,
    verify: bool = True,
) -> Iterator[DeltaSource]:
    """:func:`open_source` for the work of a block, as :meth:`Adapter.opening` says."""
    path = resolve_adapter(path_or_id, revision, token)
    config = path / CONFIG_NAME
    if not config.is_file():
        raise AdapterNotFoundError(f"{path}: no {CONFIG_NAME}; this is not an adapter")
    read = read_json(config, AdapterFormatError)
    if is_mix(read):
        yield open_mix(path, token=token, verify=verify)
        return
    kind = read.get("peft_type")
    if kind == "DARE":
        with Adapter.opening(path, verify=verify) as adapter:
            yield adapter
    elif kind == "LORA":
        yield LoraAdapter.open(path, verify=verify)
    else:
        raise AdapterFormatError(
            f"{config}: peft_type is {kind!r:.80}; adapters of DARE, LORA can be opened, "
            "others load with PEFT"
        )
