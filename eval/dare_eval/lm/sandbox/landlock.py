"""Which files a generated program may read, and that it may change none: Landlock (Linux 5.13).

Landlock needs no privileges, holds for good, and also keeps a process from the memory of processes
outside (landlock(7), https://docs.kernel.org/userspace-api/landlock.html).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable

from dare_eval.lm.sandbox.system import ConfinementError, syscall

__all__ = ["allow_reading_only"]

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # of every architecture
_ASK_VERSION, _PATH_BENEATH = 1, 1

_EXECUTE, _READ_FILE, _READ_DIRECTORY = 1 << 0, 1 << 2, 1 << 3
# What each version of the interface can restrict; a kernel refuses bits that it does not know.
_FILES = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
_NETWORK = {4: 0b11}  # TCP: bind, connect
_SCOPES = {6: 0b11}  # abstract Unix sockets and signals of processes outside


def allow_reading_only(paths: Iterable[str]) -> None:
    """Let this process read these files and directories, and nothing else of any file system.

    Raises:
        ConfinementError: the kernel has no Landlock.
    """
    version = syscall(_CREATE_RULESET, None, 0, _ASK_VERSION)
    if version < 1:
        raise ConfinementError("the kernel has no Landlock (Linux 5.13, CONFIG_SECURITY_LANDLOCK)")
    newest = [_at(version, table) for table in (_FILES, _NETWORK, _SCOPES)]
    attributes = struct.pack("QQQ", *newest)
    size = 8 if version < 4 else 16 if version < 6 else 24
    rules = syscall(_CREATE_RULESET, attributes, size, 0)
    if rules < 0:
        raise ConfinementError("Landlock accepts no rules")
    for path in paths:
        _allow(rules, path)
    if syscall(_RESTRICT_SELF, rules, 0):
        raise ConfinementError("Landlock's rules cannot be put in force")
    os.close(rules)


def _at(version: int, table: dict[int, int]) -> int:
    return max((bits for since, bits in table.items() if since <= version), default=0)


def _allow(rules: int, path: str) -> None:
    try:
        beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # what is not there needs no rule
    access = _READ_FILE | _EXECUTE | (_READ_DIRECTORY if os.path.isdir(path) else 0)
    refused = syscall(_ADD_RULE, rules, _PATH_BENEATH, struct.pack("=Qi", access, beneath), 0)
    os.close(beneath)
    if refused:
        raise ConfinementError(f"Landlock accepts no rule for {path}")
