"""What a swap asks of several workers, and in which order, whatever they answer. No vLLM."""

from __future__ import annotations

from typing import Any

import pytest

from dare_adapters.errors import AdapterNotFoundError, DareError
from dare_vllm.hot_swap.steps import (
    EngineLostError,
    Pause,
    ResetCaches,
    Resume,
    Rpc,
    SwapFailedError,
    swap_steps,
)

FINE: dict[str, Any] = {}
BROKEN = {"error": "OSError", "message": "the disk is gone"}
DONE = {"route": "sparse", "seconds": 0.5, "entries": 7}


class Workers:
    """Two workers that answer as they are told to, and what was asked of them."""

    def __init__(self, **answers: list[dict[str, Any]]) -> None:
        self.answers = {"dare_prepare": [FINE, FINE], **answers}
        self.asked: list[str] = []

    def run(self) -> dict[str, Any]:
        """A swap, to its end."""
        steps = swap_steps({"adapters": []}, "auto", "wait")
        answer: Any = None
        while True:
            try:
                step = steps.send(answer)
            except StopIteration as done:
                result: dict[str, Any] = done.value
                return result
            self.asked.append(step.method if isinstance(step, Rpc) else type(step).__name__)
            answer = self.answers[step.method] if isinstance(step, Rpc) else None


def test_the_caches_are_emptied_while_nothing_runs_and_before_anything_changes():
    slow = {**DONE, "seconds": 2.0}
    workers = Workers(dare_commit=[DONE, slow])
    assert workers.run() == {"route": "sparse", "seconds": 2.0, "entries": 7}
    assert workers.asked == ["dare_prepare", "Pause", "ResetCaches", "dare_commit", "Resume"]


def test_what_one_worker_refuses_is_raised_before_the_engine_is_paused():
    refused = {"error": "AdapterNotFoundError", "message": "nowhere"}
    workers = Workers(dare_prepare=[FINE, refused])
    with pytest.raises(AdapterNotFoundError, match="nowhere"):
        workers.run()
    assert workers.asked == ["dare_prepare"]


def test_an_error_that_is_none_of_ours_keeps_its_name():
    with pytest.raises(DareError, match="OSError: the disk is gone"):
        Workers(dare_prepare=[BROKEN, FINE]).run()


def test_where_one_worker_fails_all_go_back_and_the_engine_goes_on():
    workers = Workers(dare_commit=[DONE, BROKEN], dare_rollback=[FINE, FINE])
    with pytest.raises(SwapFailedError, match="the old mixture is back: OSError: the disk is gone"):
        workers.run()
    assert workers.asked[-3:] == ["dare_commit", "dare_rollback", "Resume"]


def test_an_engine_whose_weights_are_lost_is_not_resumed():
    workers = Workers(dare_commit=[DONE, BROKEN], dare_rollback=[FINE, BROKEN])
    with pytest.raises(EngineLostError, match="restart the engine"):
        workers.run()
    assert workers.asked[-1] == "dare_rollback"


@pytest.mark.parametrize("failing", [Pause, ResetCaches])
def test_an_engine_that_cannot_pause_is_resumed_and_has_changed_nothing(failing: type):
    steps = swap_steps({"adapters": []}, "auto", "wait")
    step = steps.send(None)
    assert isinstance(step, Rpc)
    step = steps.send([FINE])
    while not isinstance(step, failing):
        step = steps.send(None)
    step = steps.throw(DareError("busy"))
    assert isinstance(step, Resume)
    with pytest.raises(DareError, match="busy"):
        steps.send(None)
