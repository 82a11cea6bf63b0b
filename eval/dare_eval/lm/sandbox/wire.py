"""Values on the pipes between a program and its examiner: tagged JSON, so reading runs no code."""

from __future__ import annotations

import json
import operator
import os
import struct
from collections.abc import Callable, ItemsView, Iterable, KeysView
from decimal import Decimal
from fractions import Fraction
from numbers import Complex, Integral, Real
from typing import Any

__all__ = ["Channel", "ChannelClosedError", "decode", "encode"]

_LARGEST_MESSAGE = 64 << 20  # bytes
_EXACT_IN_JSON = 1 << 53


class ChannelClosedError(Exception):
    """The other process ended, or sent what is no message."""


class Channel:
    """Whole messages over two pipes.

    Args:
        reading, writing: descriptors.
    """

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing = reading, writing

    def send(self, message: object) -> None:
        """Write a message of JSON values."""
        text = json.dumps(message).encode()
        data = memoryview(struct.pack("<Q", len(text)) + text)
        while data:
            try:
                data = data[os.write(self._writing, data) :]
            except BrokenPipeError as error:
                raise ChannelClosedError("the other process ended") from error

    def receive(self) -> Any:
        """Read a message.

        Raises:
            ChannelClosedError: there is none, or it is longer than 64 MiB.
        """
        (length,) = struct.unpack("<Q", self._read(8))
        if length > _LARGEST_MESSAGE:
            raise ChannelClosedError(f"a message of {length} bytes")
        try:
            return json.loads(self._read(length))
        except (ValueError, RecursionError) as error:
            raise ChannelClosedError(f"no message: {error}") from error

    def _read(self, length: int) -> bytes:
        parts: list[bytes] = []
        while length:
            part = os.read(self._reading, min(length, 1 << 20))
            if not part:
                raise ChannelClosedError("the other process ended")
            parts.append(part)
            length -= len(part)
        return b"".join(parts)


def encode(value: object, opaque: Callable[[object], object]) -> Any:
    """A value as JSON: numbers exactly, containers by what they are equal to.

    Args:
        value: anything.
        opaque: gives the name of a value that is no plain data.
    """
    if value is None or isinstance(value, bool | str):
        return value if value is None or isinstance(value, bool) else str(value)
    for kinds, tag, content in _ENCODERS:
        if isinstance(value, kinds):
            return [tag, content(value, lambda part: encode(part, opaque))]
    number = _number(value)
    return ["opaque", opaque(value)] if number is None else number


def decode(message: Any, opaque: Callable[[Any], object]) -> Any:
    """The value of :func:`encode`'s JSON.

    Raises:
        ValueError, TypeError, LookupError: it is not of that form.
    """
    if message is None or isinstance(message, bool | str | int):
        return message
    tag, content = message
    if tag == "opaque":
        return opaque(content)
    return _DECODERS[tag](content, lambda part: decode(part, opaque))


def _each(values: Iterable[Any], code: Callable[[Any], Any]) -> list[Any]:
    return [code(value) for value in values]


_Encoder = tuple[tuple[type, ...], str, Callable[[Any, Callable[[Any], Any]], Any]]
_ENCODERS: tuple[_Encoder, ...] = (
    ((list,), "list", _each),
    ((tuple,), "tuple", _each),
    ((dict,), "dict", lambda value, code: [_each(pair, code) for pair in value.items()]),
    ((set, KeysView, ItemsView), "set", _each),
    ((frozenset,), "frozenset", _each),
    ((bytes, bytearray), "bytes", lambda value, _: value.hex()),
    ((range,), "range", lambda value, _: [value.start, value.stop, value.step]),
    ((Decimal,), "decimal", lambda value, _: str(value)),
)
_DECODERS: dict[str, Callable[[Any, Callable[[Any], Any]], Any]] = {
    "list": _each,
    "tuple": lambda content, code: tuple(_each(content, code)),
    "dict": lambda content, code: {code(key): code(value) for key, value in content},
    "set": lambda content, code: set(_each(content, code)),
    "frozenset": lambda content, code: frozenset(_each(content, code)),
    "bytes": lambda content, _: bytes.fromhex(content),
    "range": lambda content, _: range(*content),
    "decimal": lambda content, _: Decimal(content),
    "integer": lambda content, _: int(content, 16),
    "float": lambda content, _: float.fromhex(content),
    "complex": lambda content, _: complex(*map(float.fromhex, content)),
    "fraction": lambda content, _: Fraction(*(int(part, 16) for part in content)),
}


def _number(value: object) -> Any:
    """A number of any library's type, as JSON; None for anything else."""
    if type(value).__name__ in ("bool_", "bool"):  # NumPy's is no subclass of Python's
        return bool(value)
    if isinstance(value, Integral):
        whole = operator.index(value)
        return whole if abs(whole) < _EXACT_IN_JSON else ["integer", hex(whole)]
    if isinstance(value, Fraction):
        return ["fraction", [hex(value.numerator), hex(value.denominator)]]
    if isinstance(value, Real):
        return ["float", float(value).hex()]
    if isinstance(value, Complex):
        plain = complex(value)
        return ["complex", [plain.real.hex(), plain.imag.hex()]]
    return None
