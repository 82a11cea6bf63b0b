"""The live model of an adapter's task: its base under the fine-tune's head, adapter active."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dare_adapters.adapter import Adapter
from dare_adapters.checkpoint import read_json
from dare_adapters.companions import FINETUNED_CONFIG
from dare_adapters.errors import AdapterFormatError, ArchitectureMismatchError, CheckpointError
from dare_adapters.live import locate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["adapter_active", "load_task_model", "load_tokenizer"]


def load_task_model(
    base: str | Path,
    adapter: Adapter,
    *,
    dtype: torch.dtype | str = torch.float32,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    token: str | bool | None = None,
) -> PreTrainedModel:
    """The base as the class and with the config that the adapter's fine-tune had.

    The adapter is not loaded yet: a head that only it brings is random until then.

    Args:
        base: directory or hub id.
        adapter: whose finetuned_config.json names the class.
        dtype: of the live weights.

    Raises:
        AdapterFormatError: the config is missing or names no class of transformers.
        ArchitectureMismatchError: the class has parameters that neither base nor adapter has.
        CheckpointError: the base cannot be loaded.
    """
    from transformers import AutoConfig

    model_class = _task_class(adapter)
    with _silent():
        try:
            config = AutoConfig.from_pretrained(
                adapter.path / FINETUNED_CONFIG, trust_remote_code=False
            )
        except Exception as error:  # of whatever reads a file that anyone may have written
            raise AdapterFormatError(
                f"{adapter.path / FINETUNED_CONFIG}: no model config ({error})"
            ) from error
        try:
            own = AutoConfig.from_pretrained(
                base, revision=revision, token=token, trust_remote_code=False
            )
            # Rows that the fine-tune added come with the adapter.
            config.get_text_config().vocab_size = own.get_text_config().vocab_size
            model, loaded = model_class.from_pretrained(
                base,
                config=config,
                dtype=dtype,
                revision=revision,
                token=token,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except Exception as error:  # of the class, the hub, or the disk
            raise CheckpointError(
                f"{base} does not load as {model_class.__name__}: {error}"
            ) from error
    places = locate(model, [name for name in adapter if adapter.is_new(name)])
    brought = {place.owner for place in places.values() if place is not None}
    random = {*loaded["missing_keys"], *(name for name, *_ in loaded["mismatched_keys"])} - brought
    if random:
        raise ArchitectureMismatchError(
            f"{model_class.__name__} has {', '.join(sorted(random)[:6])}, which neither {base} nor "
            f"{adapter.path} has"
        )
    live: PreTrainedModel = model.to(device)
    return live


def load_tokenizer(base: str | Path, adapter: Adapter, config: Any, **hub: Any) -> Any:
    """The adapter's tokenizer where it has its own, else the base's; able to pad.

    Raises:
        CheckpointError: neither has one.
    """
    from transformers import AutoTokenizer

    own = any(
        (adapter.path / name).is_file()
        for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt")
    )
    source = adapter.path if own else base
    with _silent():
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                source, config=config, trust_remote_code=False, **({} if own else hub)
            )
        except Exception as error:  # of the tokenizers library too, which has its own
            raise CheckpointError(f"{source} has no tokenizer that loads: {error}") from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise CheckpointError(f"the tokenizer of {source} has no token to pad with")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextmanager
def adapter_active(model: PreTrainedModel, adapter: Adapter) -> Iterator[None]:
    """This adapter alone is active inside the block; what was before, after it."""
    name = f"statistics-{uuid.uuid4().hex}"
    model.load_dare_adapter(adapter, name, activate=False)
    try:
        with model.dare_adapter(name):
            yield
    finally:
        model.delete_dare_adapter(name)


def _task_class(adapter: Adapter) -> Any:
    import transformers

    file = adapter.path / FINETUNED_CONFIG
    if not file.is_file():
        raise AdapterFormatError(
            f"{adapter.path}: no {FINETUNED_CONFIG}, so the class of its task is not known; load "
            "the model yourself and pass it as the base"
        )
    named = read_json(file, AdapterFormatError).get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    found = getattr(transformers, first, None) if isinstance(first, str) else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise AdapterFormatError(
            f"{file}: architectures is {named!r:.80}, no class of transformers"
        )
    return found


@contextmanager
def _silent() -> Iterator[None]:
    """Without transformers' bars, and its report of a head that the adapter is about to bring."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
