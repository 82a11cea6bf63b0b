"""Tokens that only some adapters have: nobody else may name them, and no step meets them.

vLLM accepts every token of the vocabulary that the model is built for, spare rows included. Here,
where requests come in, those are refused that the request's own adapter does not fill.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from dare_adapters.errors import DareError
from dare_adapters.open_source import open_source
from dare_vllm.at_load.spare_rows import spare_rows_in
from dare_vllm.per_request.loading import parts_of

__all__ = ["added_rows_at", "hook_token_check"]


def hook_token_check() -> None:
    """Replace the function through which every request comes in."""
    from vllm.v1.engine.input_processor import InputProcessor

    stock = InputProcessor.process_inputs

    @functools.wraps(stock)
    def process_inputs(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        # process_inputs(request_id, prompt, params, supported_tasks, arrival_time, lora_request, …)
        made = stock(self, request_id, prompt, params, *args, **kwargs)
        spare = spare_rows_in(self.vllm_config.load_config)
        if spare:
            total = self.model_config.get_vocab_size()
            _check_tokens(made, total - spare, total)
        return made

    InputProcessor.process_inputs = process_inputs


def added_rows_at(path: str) -> int:
    """How many tokens an adapter or a mix has that its base does not; 0 of a LoRA.

    Args:
        path: of a LoRARequest.
    """
    from vllm.lora.utils import get_adapter_absolute_path

    try:
        parts = parts_of(path) or []
        sources = [open_source(get_adapter_absolute_path(own), verify=False) for own, _ in parts]
    except (DareError, OSError):
        return 0  # whoever loads it says what is wrong
    return max((source.added_row_count(name) for source in sources for name in source), default=0)


def _check_tokens(request: Any, own: int, total: int) -> None:
    """Compare what a request names with what it may.

    Raises:
        VLLMValidationError: a token that its adapter does not have.
    """
    spare = {token for token in _tokens(request) if own <= token < total}
    if not spare:
        return
    lora = request.lora_request
    added = 0 if lora is None else _added_rows_of(lora)
    if max(spare) >= own + added:
        from vllm.exceptions import VLLMValidationError

        who = "the base" if lora is None else f"adapter {lora.lora_name!r}"
        raise VLLMValidationError(
            f"token {max(spare)} is out of vocabulary: {who} has {own + added} tokens; those "
            "beyond are of other adapters"
        )


def _added_rows_of(lora_request: Any) -> int:
    """The same of a request's adapter, its config read once."""
    if lora_request.load_inplace:  # its path may hold another each time
        return added_rows_at(lora_request.lora_path)
    return _remembered(lora_request.lora_path, lora_request.lora_int_id)


@functools.lru_cache(1024)
def _remembered(path: str, number: int) -> int:
    """A number stands for one loading of a path."""
    return added_rows_at(path)


def _tokens(request: Any) -> Iterator[int]:
    yield from request.prompt_token_ids or ()
    params = request.sampling_params
    for field in ("allowed_token_ids", "logit_bias", "logprob_token_ids"):
        yield from getattr(params, field, None) or ()
