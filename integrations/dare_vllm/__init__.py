"""DARE adapters in unmodified vLLM: at load, swapped while it runs, and per request.

vLLM calls :func:`register` in each of its processes (entry point group `vllm.general_plugins`).
Importing this package imports nothing of vLLM.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dare_vllm.hot_swap.offline import get_mixture, set_mixture

__all__ = ["get_mixture", "register", "set_mixture"]

# Each way to serve adapters: a module with `install()`, and beside it `hooks` (see versions.py).
WAYS = ("at_load", "hot_swap", "per_request")

_installed = False


def register() -> None:
    """Teach this process's vLLM what an adapter is; calling it again does nothing.

    Raises:
        UnsupportedVersionError: a private function of vLLM that is hooked is not what it was in
            the versions that were tested; the message names it and them.
    """
    global _installed  # noqa: PLW0603 (vLLM calls this once or more in each process)
    if _installed:
        return
    from dare_vllm.versions import check_hooks

    for way in WAYS:
        check_hooks(importlib.import_module(f"{__name__}.{way}.hooks").HOOKS)
    for way in WAYS:
        importlib.import_module(f"{__name__}.{way}").install()
    _installed = True


def __getattr__(name: str) -> Any:
    """`set_mixture` and `get_mixture`, imported when they are first used."""
    if name in ("get_mixture", "set_mixture"):
        return getattr(importlib.import_module("dare_vllm.hot_swap.offline"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
