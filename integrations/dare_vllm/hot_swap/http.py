"""Swaps over HTTP: `GET` and `POST /v1/dare/mixture` of vLLM's OpenAI server.

An entry point of the group `vllm.endpoint_plugins`: there only where VLLM_PLUGINS names "dare",
and behind the server's API key where it has one. Who may post here chooses which directories of
the server are read.
"""

from __future__ import annotations

import asyncio
import time
from argparse import Namespace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from dare_adapters.errors import DareError
from dare_vllm.hot_swap.metrics import record_failure, record_swap
from dare_vllm.hot_swap.steps import (
    EngineLostError,
    Pause,
    ResetCaches,
    Resume,
    Rpc,
    SwapFailedError,
    swap_steps,
)

__all__ = ["PATH", "MixtureEndpoint", "endpoint"]

PATH = "/v1/dare/mixture"
IN_FLIGHT = ("wait", "abort")


class MixtureEndpoint:
    """An endpoint plugin of vLLM (`vllm.plugins.endpoint_plugins.interface.EndpointPlugin`)."""

    name = "dare"
    required_tasks = None

    def __init__(self) -> None:
        self._engine: Any = None
        self._busy = asyncio.Lock()

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes."""
        app.add_api_route(PATH, self.get, methods=["GET"])
        app.add_api_route(PATH, self.post, methods=["POST"])

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Remember the engine; None on a server that only renders."""
        self._engine = engine_client

    async def get(self) -> JSONResponse:
        """The mixture that the engine has."""
        if self._engine is None:
            return _error(501, DareError("this server has no engine"))
        found = (await self._engine.collective_rpc("dare_mixture"))[0]
        return JSONResponse(found)

    async def post(self, request: Request) -> JSONResponse:
        """Swap; the body has a mixture's fields, `route` and `in_flight` ("wait" or "abort").

        400: the mixture cannot be had, and the message says why; nothing was changed. 409: another
        swap is on. 500: writing failed; the message says whether the old mixture is back.
        """
        if self._engine is None:
            return _error(501, DareError("this server has no engine"))
        try:
            body = await request.json()
        except ValueError as error:
            return _error(400, DareError(f"the body is not JSON ({error})"))
        if not isinstance(body, dict):
            return _error(400, DareError("the body must be a JSON object"))
        route, in_flight = body.pop("route", "auto"), body.pop("in_flight", "wait")
        if in_flight not in IN_FLIGHT or not isinstance(route, str):
            return _error(
                400,
                DareError(f"in_flight is {in_flight!r:.40}; there are {', '.join(IN_FLIGHT)}"),
            )
        if self._busy.locked():
            return _error(409, DareError("another swap is on; try again when it is done"))
        # A client that hangs up must not leave the engine paused.
        return await asyncio.shield(self._swap(body, route, in_flight))

    async def _swap(self, body: dict[str, Any], route: str, in_flight: str) -> JSONResponse:
        start = time.perf_counter()
        try:
            async with self._busy:
                done = await self._run(body, route, in_flight)
        except (EngineLostError, SwapFailedError) as error:
            record_failure(route, "failed")
            return _error(500, error)
        except (DareError, ValueError) as error:
            record_failure(route, "refused")
            return _error(400, error)
        total = time.perf_counter() - start
        record_swap(done["route"], len(body.get("adapters", [])), done["seconds"], total)
        return JSONResponse({**done, "total_seconds": total})

    async def _run(self, body: dict[str, Any], route: str, in_flight: str) -> dict[str, Any]:
        steps = swap_steps(body, route, in_flight)
        answer: Any = None
        error: BaseException | None = None
        while True:
            try:
                step = steps.throw(error) if error is not None else steps.send(answer)
            except StopIteration as done:
                result: dict[str, Any] = done.value
                return result
            answer, error = None, None
            try:
                answer = await self._do(step)
            except Exception as failure:
                error = failure

    async def _do(self, step: object) -> Any:
        if isinstance(step, Rpc):
            return await self._engine.collective_rpc(step.method, args=step.arguments)
        if isinstance(step, Pause):
            await self._engine.pause_generation(mode=step.in_flight, clear_cache=True)
            await self._engine.engine_core.call_utility_async("dare_abort_unfinished")
        elif isinstance(step, ResetCaches):
            if not await self._engine.reset_prefix_cache(reset_connector=True):
                raise DareError("vLLM did not empty the prefix cache; nothing was changed")
        elif isinstance(step, Resume):
            await self._engine.resume_generation()
        return None


def endpoint() -> MixtureEndpoint:
    """The factory that the entry point names."""
    return MixtureEndpoint()


def _error(status: int, error: Exception) -> JSONResponse:
    return JSONResponse(
        {"error": {"message": str(error), "type": type(error).__name__, "code": status}}, status
    )
