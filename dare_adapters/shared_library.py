"""The project's compiled loops, found beside their Python and loaded without it."""

from __future__ import annotations

import ctypes
import importlib.machinery
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["load_library"]


def load_library(beside: str, name: str, declare: Callable[[Any], None]) -> Any:
    """A library that was compiled (see setup.py), or None.

    None where there is none, where it is of another platform or an older version, and where
    DARE_ADAPTERS_COMPILED=0 forbids it.

    Args:
        beside: `__file__` of the module that uses it.
        declare: states the functions' types.
    """
    if os.environ.get("DARE_ADAPTERS_COMPILED") == "0":
        return None
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        file = Path(beside).with_name(f"{name}{suffix}")
        if file.is_file():
            try:
                library = ctypes.CDLL(str(file))
                declare(library)
                return library
            except (OSError, AttributeError):
                return None
    return None
