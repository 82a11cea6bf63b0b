"""The process between the scorer and a program: it makes the two others, waits, and ends them.

Run by :mod:`dare_eval.lm.sandbox.run` with the descriptors of two files, the program's and its
tests', and limits; it never reads the tests, nor does the program's process ever hold them.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from dare_eval.lm.sandbox.confine import confine, die_with_parent, separate_namespaces
from dare_eval.lm.sandbox.examiner import examine
from dare_eval.lm.sandbox.program import serve
from dare_eval.lm.sandbox.system import ConfinementError
from dare_eval.lm.sandbox.wire import Channel

__all__ = ["main"]


def main() -> None:
    """Print a verdict: {"passed": …, "reason": …}, or {"unavailable": what cannot be had}."""
    given = json.loads(sys.argv[1])
    die_with_parent()
    separate_namespaces()
    print(json.dumps(_judge(**given)), flush=True)


def _judge(
    program: int, tests: int, cpu_seconds: int, wall_seconds: float, memory_bytes: int
) -> dict[str, object]:
    deadline = time.monotonic() + wall_seconds
    questions, answers, verdicts = os.pipe(), os.pipe(), os.pipe()

    def run_program() -> None:
        source = _read(program)
        keep = (questions[0], answers[1], verdicts[1])
        _start(keep, limits=(cpu_seconds, memory_bytes))
        os.close(verdicts[1])  # was only to tell what cannot be had
        channel = Channel(questions[0], answers[1])
        channel.send("confined")
        serve(channel, source)

    def run_tests() -> None:
        wanted = json.loads(_read(tests))
        keep = (questions[1], answers[0], verdicts[1])
        _start(keep, limits=(cpu_seconds, memory_bytes))
        channel = Channel(answers[0], questions[1])
        if channel.receive() != "confined":
            raise ConfinementError("the program's process was not confined")
        failure = examine(channel, **wanted)
        _tell(verdicts[1], {"passed": failure is None, "reason": failure or "every test passed"})

    of_program = _child(run_program, verdicts[1])
    os.close(program)
    of_tests = _child(run_tests, verdicts[1])
    os.close(tests)
    for descriptor in (*questions, *answers, verdicts[1]):
        os.close(descriptor)
    try:
        verdict = _wait(verdicts[0], deadline)
    finally:
        for child in (of_program, of_tests):
            os.kill(child, signal.SIGKILL)
        statuses = [os.waitpid(child, 0)[1] for child in (of_program, of_tests)]
    if verdict is None:
        return {"passed": False, "reason": f"no answer within {wall_seconds:g} seconds"}
    if verdict.get("passed") is not True and signal.SIGXCPU in map(os.WTERMSIG, statuses):
        return {"passed": False, "reason": f"over {cpu_seconds} seconds of processor time"}
    return verdict


def _child(run: Callable[[], None], verdicts: int) -> int:
    """A process that runs a function; a protection that it cannot have is told to `verdicts`."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        die_with_parent()
        run()
        code = 0
    except ConfinementError as error:
        _tell(verdicts, {"unavailable": str(error)})
    finally:
        _end(code)


def _end(code: int) -> NoReturn:
    os._exit(code)


def _start(keep: tuple[int, ...], limits: tuple[int, int]) -> None:
    """Close every descriptor but some, and give up everything but computing."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nothing, standard)
    highest = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    low = 3
    for descriptor in sorted(keep):
        os.closerange(low, descriptor)
        low = descriptor + 1
    os.closerange(low, highest)
    confine(*limits)


def _read(descriptor: int) -> str:
    with os.fdopen(descriptor, "rb") as file:
        return file.read().decode("utf-8", "surrogatepass")


def _tell(descriptor: int, verdict: dict[str, object]) -> None:
    os.write(descriptor, json.dumps(verdict).encode() + b"\n")


def _wait(descriptor: int, deadline: float) -> dict[str, object] | None:
    """The first line that is told; None if there is none in time."""
    told = b""
    while not told.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([descriptor], [], [], left)[0]:
            return None
        part = os.read(descriptor, 1 << 16)
        if not part:
            return {"passed": False, "reason": "the tests ended without a verdict"}
        told += part
    verdict: dict[str, object] = json.loads(told.splitlines()[0])
    return verdict
