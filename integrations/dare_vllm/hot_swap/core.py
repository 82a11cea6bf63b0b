"""The engine core's part in a swap."""

from __future__ import annotations

import logging
from typing import Any

__all__ = ["abort_unfinished"]

logger = logging.getLogger("vllm.dare")


def abort_unfinished(core: Any) -> list[str]:
    """Abort every request that the old weights began and a drained pause left waiting.

    Pausing waits for what is running. A request that was preempted is not: it would be resumed
    after the swap, its first tokens from the old weights and the rest from the new ones.

    Returns:
        Their ids; clients see them finished by "abort".
    """
    from vllm.v1.request import RequestStatus

    scheduler = core.scheduler
    begun = [
        request.request_id
        for request in scheduler.requests.values()
        if request.num_output_tokens or request.num_computed_tokens
    ]
    if begun:
        aborted = scheduler.finish_requests(begun, RequestStatus.FINISHED_ABORTED)
        core._send_abort_outputs(aborted)
        logger.warning(
            "aborted %d requests that had been preempted halfway: a swap changes the weights",
            len(begun),
        )
    return begun
