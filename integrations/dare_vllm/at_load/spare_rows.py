"""Vocabulary rows that no checkpoint fills: room for those that adapters by request bring.

`model_loader_extra_config={"spare_rows": 8}` builds the model for a vocabulary of 8 rows more than
its config says. vLLM's own limits (layers, sampler, what clients may name) all follow from that
one number; the weights of these rows are zeros, and nobody is ever answered with their tokens but
requests whose adapter fills them (:mod:`dare_vllm.at_load.logit_mask`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dare_adapters.errors import CombinationError, UnsupportedParameterError
from dare_vllm.mixture import LOAD_FORMAT

__all__ = [
    "SPARE_ROWS",
    "hook_vocabulary",
    "keep_rows_free",
    "parse_spare_rows",
    "spare_rows_in",
    "spare_rows_of",
]

SPARE_ROWS = "spare_rows"
"""A number in `model_loader_extra_config`: how many vocabulary rows are kept free."""

_ATTRIBUTE = "dare_spare_rows"


def spare_rows_in(load_config: Any) -> int:
    """How many rows vLLM's load config, or its engine arguments, keep free.

    Raises:
        CombinationError: it is no number of rows.
    """
    if load_config.load_format != LOAD_FORMAT:
        return 0
    extra = load_config.model_loader_extra_config
    return parse_spare_rows(extra) if isinstance(extra, Mapping) else 0


def parse_spare_rows(extra: Mapping[str, Any]) -> int:
    """The same, of the fields of `model_loader_extra_config`."""
    count = extra.get(SPARE_ROWS, 0)
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise CombinationError(f"{SPARE_ROWS} is {count!r:.80}; it must be a number of rows")
    return count


def spare_rows_of(layer: Any) -> int:
    """How many of the last rows of an embedding or a head of vLLM's are kept free."""
    return int(getattr(layer, _ATTRIBUTE, 0))


def hook_vocabulary() -> None:
    """Let engines be built with spare rows, and checkpoints without them be loaded."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    stock_config = EngineArgs.create_model_config
    stock_loader = VocabParallelEmbedding.weight_loader

    @functools.wraps(stock_config)
    def create_model_config(self: Any) -> Any:
        model_config = stock_config(self)
        _enlarge(model_config, spare_rows_in(self))
        return model_config

    @functools.wraps(stock_loader)
    def weight_loader(self: Any, param: Any, loaded_weight: torch.Tensor) -> None:
        spare, axis = spare_rows_of(self), getattr(param, "output_dim", None)
        if not spare or axis is None or loaded_weight.shape[axis] == self.org_vocab_size:
            stock_loader(self, param, loaded_weight)
            return
        _load_held(self, param, loaded_weight, spare)

    EngineArgs.create_model_config = create_model_config
    VocabParallelEmbedding.weight_loader = weight_loader


def keep_rows_free(model: nn.Module, vocabulary: int, count: int) -> None:
    """Tell the layers of a model, before it is loaded, that their last rows are not the base's.

    Args:
        model: of vLLM's.
        vocabulary: rows that it is built for, the spare ones included.
        count: of spare rows.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding) and module.org_vocab_size == vocabulary:
            setattr(module, _ATTRIBUTE, count)


def _enlarge(model_config: Any, count: int) -> None:
    text = model_config.hf_text_config
    before = getattr(text, "vocab_size", None)
    if not count:
        return
    if not isinstance(before, int):
        raise UnsupportedParameterError(
            f"{model_config.model} has no vocab_size in its config: it cannot have {SPARE_ROWS}"
        )
    for config in {id(one): one for one in (model_config.hf_config, text)}.values():
        if getattr(config, "vocab_size", None) == before:
            config.vocab_size = before + count
    model_config.model_arch_config = model_config.get_model_arch_config()


def _load_held(layer: Any, param: Any, loaded: torch.Tensor, spare: int) -> None:
    """vLLM's own loader, for a tensor that lacks the spare rows: those become zeros."""
    rows = layer.org_vocab_size - spare
    if param.output_dim != 0 or getattr(param, "packed_dim", None) == 0 or len(loaded) != rows:
        raise UnsupportedParameterError(
            f"a vocabulary of {list(loaded.shape)} was read for {rows} rows and {spare} "
            f"{SPARE_ROWS}: embeddings and heads that are quantised, or of another size than the "
            "model's config says, cannot have any"
        )
    own = layer.shard_indices
    first, last = min(own.org_vocab_start_index, rows), min(own.org_vocab_end_index, rows)
    param[: last - first].data.copy_(loaded[first:last])
    param[last - first :].data.fill_(0)
