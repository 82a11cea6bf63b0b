"""Run a generated program against its tests, contained (see :mod:`dare_eval.lm.sandbox`)."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dare_eval.errors import SandboxUnavailableError

__all__ = ["Checks", "Limits", "Outcome", "require_sandbox", "run_tests"]

_ROOT = Path(__file__).resolve().parents[3]
_START = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); "
    "from dare_eval.lm.sandbox.supervisor import main; sys.path.pop(0); main()"
)


@dataclass(frozen=True)
class Limits:
    """What one process may use; a program and its tests are one each.

    Attributes:
        cpu_seconds: of processor time, whole. MBPP's slowest reference takes 5 on a slow core.
        wall_seconds: of the clock, for both together.
        memory_bytes: of address space.
    """

    cpu_seconds: int = 20
    wall_seconds: float = 60.0
    memory_bytes: int = 1 << 30


@dataclass(frozen=True)
class Checks:
    """What a program must pass.

    Attributes:
        code: Python whose assertions hold for a right program. Names that neither it nor
            `preamble` nor Python define are the program's.
        preamble: trusted code whose names `code` may use.
        from_program: names that are the program's though `preamble` or Python has them too.
    """

    code: str
    preamble: str = ""
    from_program: Sequence[str] = ()


@dataclass(frozen=True)
class Outcome:
    """Whether every test passed, and if not, why."""

    passed: bool
    reason: str


def run_tests(program: str, tests: Checks, limits: Limits | None = None) -> Outcome:
    """Run a program against its tests, each in a confined process of its own.

    Args:
        program: Python from anybody.
        tests: see :class:`Checks`; a hostile program cannot read them.
        limits: default 20 seconds of processor time, 60 of the clock, 1 GiB.

    Raises:
        SandboxUnavailableError: a protection cannot be had on this machine; nothing ran.
    """
    require_sandbox()
    return _run(program, tests, limits or Limits())


@functools.cache
def require_sandbox() -> None:
    """Try every protection, once in a process.

    Raises:
        SandboxUnavailableError: one cannot be had, or does not hold.
    """
    if sys.platform != "linux":
        raise SandboxUnavailableError(
            f"generated programs run on Linux only, where they can be contained, not {sys.platform}"
        )
    code = "assert not (possible := attempts()), f'possible: {sorted(possible)}'"
    outcome = _run(_ATTEMPTS, Checks(code), Limits(wall_seconds=60))
    if not outcome.passed:
        raise SandboxUnavailableError(
            f"generated programs cannot be contained on this machine: {outcome.reason}; nothing ran"
        )


def _run(program: str, tests: Checks, limits: Limits) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="dare-eval-") as directory:
        files = [Path(directory, name) for name in ("program", "tests")]
        files[0].write_bytes(program.encode("utf-8", "surrogatepass"))
        files[1].write_text(json.dumps(asdict(tests)), encoding="utf-8")
        empty = Path(directory, "empty")
        empty.mkdir()
        with files[0].open("rb") as source, files[1].open("rb") as wanted:
            given = {"program": source.fileno(), "tests": wanted.fileno(), **asdict(limits)}
            try:
                done = subprocess.run(
                    [sys.executable, "-s", "-B", "-c", _START, str(_ROOT), json.dumps(given)],
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    pass_fds=(source.fileno(), wanted.fileno()),
                    cwd=empty,
                    env=_ENVIRONMENT,
                    start_new_session=True,
                    # The supervisor keeps the time; this is for a supervisor that cannot.
                    timeout=limits.wall_seconds + 60,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                return Outcome(False, f"no end within {limits.wall_seconds:g} seconds")
    try:
        verdict = json.loads(done.stdout)
    except ValueError:
        told = done.stderr.decode(errors="replace").strip().splitlines() or ["nothing was said"]
        raise SandboxUnavailableError(
            f"the sandbox ended with {done.returncode}: {told[-1]}"
        ) from None
    if "unavailable" in verdict:
        raise SandboxUnavailableError(
            f"generated programs cannot be contained on this machine: {verdict['unavailable']}; "
            "nothing ran"
        )
    return Outcome(verdict["passed"] is True, str(verdict["reason"]))


# Nothing of the caller's environment; sets are in the same order in every run, and libraries that
# start threads on import start none.
_ENVIRONMENT = {
    "LC_ALL": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "HOME": "/nonexistent",
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
}

# Each must fail in a sandbox that holds.
_ATTEMPTS = """
import os, socket, subprocess, tempfile, threading

def attempts():
    return {name for name, attempt in {
        "a fork": os.fork,
        "a thread": lambda: threading.Thread(target=print).start(),
        "a program": lambda: subprocess.run(["/bin/true"]),
        "a socket": socket.socket,
        "a signal to the parent": lambda: os.kill(os.getppid(), 0),
        "a file for writing": lambda: open("file", "w"),
        "a directory": lambda: os.mkdir("/tmp/directory-of-a-generated-program"),
        "reading /etc": lambda: os.listdir("/etc"),
        "reading /proc": lambda: open(f"/proc/{os.getppid()}/environ").read(),
        "two gibibytes": lambda: bytearray(2 << 30),
    }.items() if succeeds(attempt)}

def succeeds(attempt):
    try:
        attempt()
    except (OSError, RuntimeError, MemoryError, subprocess.SubprocessError):
        return False
    return True
"""
