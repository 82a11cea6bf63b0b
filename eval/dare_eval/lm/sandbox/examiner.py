"""The process of a program's tests: they run here, and only single values come from the program."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from contextlib import suppress
from types import CodeType
from typing import Any

from dare_eval.lm.sandbox.wire import Channel, ChannelClosedError, decode, encode

__all__ = ["examine"]


def examine(channel: Channel, code: str, preamble: str, from_program: list[str]) -> str | None:
    """Run tests against the program at the other end.

    Args:
        channel: to :func:`dare_eval.lm.sandbox.program.serve`, before it runs anything.
        code: the tests. A name in them that neither they, `preamble` nor Python define is the
            program's.
        preamble: trusted code whose names the tests may use.
        from_program: names that are the program's though `preamble` or Python has them too.

    Returns:
        None if every test passed, else why not.
    """
    program = _Program(channel)
    try:
        program.answer()  # to being run
        namespace: dict[str, object] = {"__name__": "tests"}
        exec(compile(preamble, "<preamble>", "exec"), namespace)
        tests = compile(code, "<tests>", "exec")
        used = _names(tests)
        for name in used & set(from_program):
            namespace[name] = program.ask("name", name)
        for name in used - set(from_program) - set(dir(builtins)) - set(namespace):
            with suppress(AttributeError):  # perhaps the tests define it; else using it fails
                namespace[name] = program.ask("name", name)
        exec(tests, namespace)
    except ChannelClosedError:
        return "the program ended before its tests did"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:300].rstrip(": ")
    return None


class _Program:
    """Questions and answers."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def ask(self, operation: str, *arguments: object, **keywords: object) -> Any:
        self._channel.send(
            [
                operation,
                [encode(argument, self._handle) for argument in arguments],
                [[name, encode(value, self._handle)] for name, value in keywords.items()],
            ]
        )
        return self.answer()

    def answer(self) -> Any:
        match self._channel.receive():
            case ["value", value]:
                return decode(value, lambda handle: _Remote(self, handle))
            case ["raised", str(name), str(text)]:
                kind = getattr(builtins, name, None)
                if isinstance(kind, type) and issubclass(kind, Exception):
                    raise _like(kind, text)
                raise RuntimeError(f"{name}: {text}")
        raise ChannelClosedError("no answer")

    def _handle(self, value: object) -> object:
        if isinstance(value, _Remote):
            return object.__getattribute__(value, "_handle")
        raise TypeError(f"a test cannot give a {type(value).__name__} to the program")


class _Remote:
    """A function or an object of the program, by its number there.

    It equals nothing but what the program's own objects say they equal: a result that claims to be
    equal to everything is not equal to a test's value.
    """

    _program: _Program
    _handle: object

    def __init__(self, program: _Program, handle: object) -> None:
        object.__setattr__(self, "_program", program)
        object.__setattr__(self, "_handle", handle)

    def __call__(self, *arguments: object, **keywords: object) -> Any:
        return self._program.ask("call", self, *arguments, **keywords)

    def __getattr__(self, name: str) -> Any:
        return self._program.ask("getattr", self, name)

    def __setattr__(self, name: str, value: object) -> None:
        self._program.ask("setattr", self, name, value)

    def __getitem__(self, key: object) -> Any:
        return self._program.ask("getitem", self, key)

    def __contains__(self, value: object) -> bool:
        return bool(self._program.ask("contains", self, value))

    def __iter__(self) -> Iterator[Any]:
        return iter(self._program.ask("list", self))

    def __len__(self) -> int:
        return int(self._program.ask("len", self))

    def __bool__(self) -> bool:
        return self._program.ask("bool", self) is True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Remote) and self._program.ask("eq", self, other) is True

    def __lt__(self, other: object) -> bool:
        return isinstance(other, _Remote) and self._program.ask("lt", self, other) is True

    def __hash__(self) -> int:
        return hash(self._handle)


def _like(kind: type[Exception], text: str) -> Exception:
    try:
        return kind(text)
    except TypeError:  # UnicodeDecodeError wants five arguments
        return RuntimeError(f"{kind.__name__}: {text}")


def _names(code: CodeType) -> set[str]:
    """Every global or attribute name in code and in the functions that it defines."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, inner))
