"""What is hooked where requests come in: reasons reach clients, bad adapters never reach a step."""

from __future__ import annotations

import functools
from http import HTTPStatus
from typing import Any

from dare_adapters.errors import DareError
from dare_vllm.per_request.loading import parts_of
from dare_vllm.per_request.refusal import reason_of
from dare_vllm.per_request.resolver import LOADED, REASONS

__all__ = ["hook_frontend"]


def hook_frontend() -> None:
    """Replace the functions that :data:`hooks.HOOKS` lists for servers and offline engines."""
    _hook_add_lora()
    _hook_serving_models()
    _hook_offline()


def _hook_add_lora() -> None:
    """A refusal comes out of the engine as what it is, not as a failed call."""
    from vllm.v1.engine.async_llm import AsyncLLM

    stock = AsyncLLM.add_lora

    @functools.wraps(stock)
    async def add_lora(self: Any, lora_request: Any) -> bool:
        try:
            return bool(await stock(self, lora_request))
        except Exception as error:
            reason = reason_of(error)
            if reason is None:
                raise
            reasons = REASONS.get()
            if reasons is not None:
                reasons.append(reason)
            raise DareError(reason) from error

    AsyncLLM.add_lora = add_lora


def _hook_serving_models() -> None:
    """vLLM answers 500 when an adapter cannot be loaded, and keeps resolvers' reasons to itself."""
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.serve import create_error_response
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse

    stock_load = OpenAIServingModels.load_lora_adapter
    stock_resolve = OpenAIServingModels.resolve_lora

    def refused(reason: str) -> Any:
        return create_error_response(reason, "BadRequestError", HTTPStatus.BAD_REQUEST)

    @functools.wraps(stock_load)
    async def load_lora_adapter(self: Any, request: Any, base_model_name: str | None = None) -> Any:
        result = await stock_load(self, request, base_model_name)
        failed = isinstance(result, ErrorResponse)
        reason = reason_of(Exception(result.error.message)) if failed else None
        return result if reason is None else refused(reason)

    @functools.wraps(stock_resolve)
    async def resolve_lora(self: Any, lora_name: str) -> Any:
        reasons: list[str] = []
        loaded, told = LOADED.set(self.lora_requests), REASONS.set(reasons)
        try:
            result = await stock_resolve(self, lora_name)
        finally:
            LOADED.reset(loaded)
            REASONS.reset(told)
        return refused(reasons[-1]) if isinstance(result, ErrorResponse) and reasons else result

    OpenAIServingModels.load_lora_adapter = load_lora_adapter
    OpenAIServingModels.resolve_lora = resolve_lora


def _hook_offline() -> None:
    """`LLM.generate` loads an adapter inside the first step that needs it: here, before that."""
    from vllm.v1.engine.llm_engine import LLMEngine

    stock = LLMEngine.add_request

    @functools.wraps(stock)
    def add_request(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        # add_request(request_id, prompt, params, arrival_time, lora_request, …)
        lora_request = kwargs.get("lora_request", args[1] if len(args) > 1 else None)
        lora_request = lora_request or getattr(prompt, "lora_request", None)
        if lora_request is not None:
            seen = self.__dict__.setdefault("_dare_seen", set())
            key = lora_request.lora_int_id, lora_request.lora_path
            if key not in seen:
                if _may_be_ours(lora_request.lora_path):
                    self.add_lora(lora_request)
                seen.add(key)
        return stock(self, request_id, prompt, params, *args, **kwargs)

    LLMEngine.add_request = add_request


def _may_be_ours(path: str) -> bool:
    try:
        return parts_of(path) is not None
    except DareError:
        return True  # whoever loads it says what is wrong
