"""Linux's calls that Python does not offer."""

from __future__ import annotations

import ctypes
from typing import Any

__all__ = ["ConfinementError", "drop_capabilities", "prctl", "syscall", "unshare"]

_libc: Any = ctypes.CDLL(None, use_errno=True)
_PR_CAP_AMBIENT, _CLEAR_ALL = 47, 4
_CAPABILITY_VERSION_3 = 0x20080522


class ConfinementError(Exception):
    """A protection cannot be had on this machine; the message names it."""


def prctl(option: int, *arguments: Any) -> int:
    """prctl(2): 0 or more when done, -1 when refused."""
    return int(_libc.prctl(option, *(_argument(a) for a in arguments)))


def syscall(number: int, *arguments: Any) -> int:
    """A system call by number, for what the C library does not wrap: -1 when refused."""
    return int(_libc.syscall(ctypes.c_long(number), *(_argument(a) for a in arguments)))


def unshare(flags: int) -> bool:
    """unshare(2): whether the kernel gave namespaces of one's own."""
    return int(_libc.unshare(flags)) == 0


def drop_capabilities() -> None:
    """Give up what root may do beyond the user with number 0 (capabilities(7))."""
    prctl(_PR_CAP_AMBIENT, _CLEAR_ALL, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    if _libc.capset(header, (ctypes.c_uint32 * 6)()):
        raise ConfinementError("capabilities cannot be given up")


def _argument(value: Any) -> Any:
    return ctypes.c_ulong(value) if isinstance(value, int) else value
