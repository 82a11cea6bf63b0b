"""Way 2: another mixture in a running engine, between requests."""

from __future__ import annotations

from typing import Any

__all__ = ["install"]


def install() -> None:
    """Give every worker, and the engine's core, what a swap asks of them."""
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.worker.worker_base import WorkerBase

    from dare_vllm.hot_swap.core import abort_unfinished

    for name, function in _RPC.items():
        setattr(WorkerBase, name, function)
    EngineCore.dare_abort_unfinished = abort_unfinished


def _prepare(worker: Any, token: str, config: dict[str, Any], route: str) -> dict[str, Any]:
    return _answer(worker, "prepare", token, config, route)


def _commit(worker: Any, token: str) -> dict[str, Any]:
    return _answer(worker, "commit", token)


def _rollback(worker: Any, token: str) -> dict[str, Any]:
    return _answer(worker, "rollback", token)


def _mixture(worker: Any) -> dict[str, Any]:
    return _answer(worker, "mixture")


def _answer(worker: Any, method: str, *arguments: Any) -> dict[str, Any]:
    # Imported late: only a worker needs the model's code.
    from dare_vllm.hot_swap.worker import answer

    return answer(worker, method, *arguments)


# Names that `collective_rpc` calls.
_RPC = {
    "dare_prepare": _prepare,
    "dare_commit": _commit,
    "dare_rollback": _rollback,
    "dare_mixture": _mixture,
}
