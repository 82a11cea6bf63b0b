"""A swap as a sequence of requests to an engine, the same offline and over HTTP.

prepare (checked, nothing changed) -> pause -> commit, or roll back -> reset caches -> resume
"""

from __future__ import annotations

import uuid
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import dare_adapters.errors
from dare_adapters.errors import DareError

__all__ = [
    "EngineLostError",
    "Pause",
    "ResetCaches",
    "Resume",
    "Rpc",
    "SwapFailedError",
    "swap_steps",
]


class SwapFailedError(DareError):
    """A swap failed after it had begun; the engine has the old mixture again."""


class EngineLostError(DareError):
    """A swap failed, and so did bringing back the old mixture: the engine must be restarted."""


@dataclass(frozen=True)
class Rpc:
    """Call a method on every worker; the answers come back."""

    method: str
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Pause:
    """Let requests in flight finish, or abort them, and begin no others."""

    in_flight: str


@dataclass(frozen=True)
class ResetCaches:
    """Forget what was computed with the old weights."""


@dataclass(frozen=True)
class Resume:
    """Begin requests again."""


Step = Rpc | Pause | ResetCaches | Resume


def swap_steps(
    config: dict[str, Any], route: str, in_flight: str
) -> Generator[Step, Any, dict[str, Any]]:
    """Yields steps, and is sent their results.

    Args:
        config: of the mixture.
        route: "auto", "reload" or "sparse".
        in_flight: "wait" or "abort".

    Returns:
        `route`, `seconds` (of the slowest worker's writing) and `entries` written.

    Raises:
        DareError: the mixture cannot be had; nothing was changed.
        SwapFailedError: writing failed, and was undone.
        EngineLostError: undoing failed too; the engine stays paused.
    """
    token = uuid.uuid4().hex
    _raise_first((yield Rpc("dare_prepare", (token, config, route))))
    failure: DareError | None = None
    try:
        yield Pause(in_flight)
        yield ResetCaches()  # nothing runs that could fill them again before the weights change
        written: Sequence[dict[str, Any]] = yield Rpc("dare_commit", (token,))
        failed = _first(written)
        if failed is not None:
            undone = _first((yield Rpc("dare_rollback", (token,))))
            if undone is not None:
                raise EngineLostError(
                    f"the swap failed ({failed['message']}), and the old mixture could not be "
                    f"brought back ({undone['message']}): restart the engine"
                )
            failure = SwapFailedError(
                f"the swap failed and the old mixture is back: {failed['error']}: "
                f"{failed['message']}"
            )
    except EngineLostError:
        raise
    except BaseException:
        yield Resume()
        raise
    yield Resume()
    if failure is not None:
        raise failure
    return {
        "route": written[0]["route"],
        "seconds": max(answer["seconds"] for answer in written),
        "entries": written[0]["entries"],
    }


def _first(answers: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    return next((answer for answer in answers if "error" in answer), None)


def _raise_first(answers: Sequence[dict[str, Any]]) -> None:
    failed = _first(answers)
    if failed is None:
        return
    kind = getattr(dare_adapters.errors, failed["error"], None)
    if isinstance(kind, type) and issubclass(kind, DareError):
        raise kind(failed["message"])
    if failed["error"] == "ValueError":
        raise ValueError(failed["message"])
    raise DareError(f"{failed['error']}: {failed['message']}")
