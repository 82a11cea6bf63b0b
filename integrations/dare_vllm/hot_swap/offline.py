"""`set_mixture` and `get_mixture`: the mixture of a `vllm.LLM` in this program."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dare_adapters.errors import DareError
from dare_vllm.hot_swap.steps import Pause, ResetCaches, Rpc, swap_steps

if TYPE_CHECKING:
    from vllm import LLM

__all__ = ["get_mixture", "set_mixture"]


def set_mixture(
    llm: LLM,
    adapters: Sequence[str | Path | Mapping[str, Any]],
    *,
    combination_type: str = "linear",
    route: str = "auto",
    check_base: bool = True,
    **how: Any,
) -> dict[str, Any]:
    """Make a running engine's weights those of its base with these adapters, and no others.

    Either all workers have the new mixture after it, or all still have the old one. The prefix
    cache is emptied.

    Args:
        llm: of the base, loaded in any way that keeps checkpoint weights.
        adapters: directories or hub ids of DARE adapters, mixes or LoRA adapters, or mappings with
            `path`, `weight` and `revision`; an empty list: the base alone.
        combination_type: `dare_adapters.method_names()`.
        route: "reload" writes every weight anew, "sparse" only the entries that the old or the new
            mixture touches; "auto": "reload" where the model allows it. The result is the same, bit
            for bit.
        check_base: compare the base with the adapters' witness.
        **how: `seed`, `mask`, `prune`, `drop_rate`, and options of the combination type.

    Returns:
        `route`, `seconds` (of writing), `entries` written, and `total_seconds` with all checks.

    Raises:
        DareError: the mixture cannot be had; nothing was changed. Its subclasses say why.
        SwapFailedError: writing failed, and was undone.
        EngineLostError: undoing failed too.
        ValueError: a route that there is not.
    """
    config = {
        "adapters": [str(item) if isinstance(item, Path) else item for item in adapters],
        "combination_type": combination_type,
        "check_base": check_base,
        **how,
    }
    start = time.perf_counter()
    steps = swap_steps(config, route, "wait")
    answer: Any = None
    error: BaseException | None = None
    while True:
        try:
            step = steps.throw(error) if error is not None else steps.send(answer)
        except StopIteration as done:
            return {**done.value, "total_seconds": time.perf_counter() - start}
        answer, error = None, None
        try:
            answer = _do(llm, step)
        except Exception as failure:
            error = failure


def get_mixture(llm: LLM) -> dict[str, Any]:
    """The mixture that a running engine has, as `set_mixture` and the load config spell it."""
    found: dict[str, Any] = llm.collective_rpc("dare_mixture")[0]
    return found


def _do(llm: LLM, step: object) -> Any:
    if isinstance(step, Rpc):
        return llm.collective_rpc(step.method, args=step.arguments)
    if isinstance(step, Pause):
        # This program runs the engine: nothing proceeds while we are here.
        if llm.llm_engine.has_unfinished_requests():
            raise DareError(
                "the engine has unfinished requests, which would go on with other weights: finish "
                "or abort them before the swap"
            )
    elif isinstance(step, ResetCaches) and not llm.reset_prefix_cache(reset_connector=True):
        raise DareError("vLLM did not reset the prefix cache: requests still hold parts of it")
    return None
