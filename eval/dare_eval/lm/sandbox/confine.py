"""What a process gives up, for good, before it runs code from outside."""

from __future__ import annotations

import os
import resource
import sys
import sysconfig

from dare_eval.lm.sandbox.landlock import allow_reading_only
from dare_eval.lm.sandbox.seccomp import forbid_calls
from dare_eval.lm.sandbox.system import ConfinementError, drop_capabilities, prctl, unshare

__all__ = ["confine", "die_with_parent", "separate_namespaces"]

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _SIGKILL = 1, 38, 9
_NEW_USER, _NEW_IPC, _NEW_NET = 0x10000000, 0x08000000, 0x40000000

# Shared libraries and the tables that Python's standard library reads.
_SYSTEM = (
    *("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/local/lib"),
    *("/nix/store", "/gnu/store", "/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo"),
    *("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"),
)


def die_with_parent() -> None:
    """Be killed when the parent ends, however it ends."""
    prctl(_PR_SET_PDEATHSIG, _SIGKILL)


def separate_namespaces() -> bool:
    """Leave the machine's network interfaces behind, if the kernel lets this user do so.

    A second wall: :func:`confine` forbids sockets anyhow.
    """
    return unshare(_NEW_NET | _NEW_IPC) or unshare(_NEW_USER | _NEW_NET | _NEW_IPC)


def confine(cpu_seconds: int, memory_bytes: int) -> None:
    """Give up everything but computing.

    Args:
        cpu_seconds: of processor time, whole.
        memory_bytes: of address space.

    Raises:
        ConfinementError: a protection cannot be had; the message names it.
    """
    limits = {
        resource.RLIMIT_AS: (memory_bytes, memory_bytes),
        resource.RLIMIT_CPU: (cpu_seconds, cpu_seconds + 1),  # a signal, then the end
        resource.RLIMIT_FSIZE: (0, 0),
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_NOFILE: (64, 64),
        resource.RLIMIT_MEMLOCK: (0, 0),
        resource.RLIMIT_NPROC: (0, 0),  # does not hold for root: seccomp forbids forks for all
    }
    for limit, values in limits.items():
        try:
            resource.setrlimit(limit, values)
        except (OSError, ValueError) as error:
            raise ConfinementError(f"resource limit {limit} cannot be set: {error}") from error
    if prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise ConfinementError("the kernel has no no_new_privs")
    allow_reading_only([*_python(), *_SYSTEM])
    drop_capabilities()
    forbid_calls()


def _python() -> list[str]:
    """Where this Python, its standard library and its packages are."""
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    places = {sysconfig.get_path(name) for name in names}
    libraries = {os.path.join(prefix, "lib") for prefix in (sys.prefix, sys.base_prefix)}
    return sorted(os.path.realpath(place) for place in places | libraries)
