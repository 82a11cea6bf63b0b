"""Versions of what an adapter was made with."""

from __future__ import annotations

from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

from dare_adapters._version import __version__

__all__ = ["library_versions"]


def library_versions() -> dict[str, str]:
    """This library's version and those of the libraries that its results depend on."""
    return {"dare-adapters": __version__, **_dependencies()}


@lru_cache(maxsize=1)
def _dependencies() -> dict[str, str]:
    found = {}
    for name in ("torch", "transformers", "numpy", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
