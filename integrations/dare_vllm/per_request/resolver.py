"""Finds the adapter of a name that nobody loaded: in a directory, on the hub, or as a mix.

A resolver of vLLM's (`LoRAResolverRegistry`), asked when a request names an unknown model and
`VLLM_ALLOW_RUNTIME_LORA_UPDATING` is set. Names come from clients: none leaves the directory, and
none is fetched from the hub that no pattern allows.
"""

from __future__ import annotations

import asyncio
import fnmatch
import os
import re
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from dare_adapters.adapter import download_adapter
from dare_adapters.errors import DareError
from dare_vllm.per_request.loading import mix_path, parts_of
from dare_vllm.per_request.mix_names import parse_mix

__all__ = ["ADAPTERS", "HUB", "LOADED", "REASONS", "find_adapter", "register_resolver"]

ADAPTERS = "DARE_VLLM_ADAPTERS"
"""Environment variable: a directory whose subdirectories are adapters."""
HUB = "DARE_VLLM_HUB"
"""Environment variable: comma-separated patterns of hub ids that may be fetched (`acme/*`)."""

LOADED: ContextVar[Mapping[str, Any] | None] = ContextVar("LOADED", default=None)
"""The requests of loaded adapters by name, while vLLM resolves another."""
REASONS: ContextVar[list[str] | None] = ContextVar("REASONS", default=None)
"""Why what is being resolved cannot be, for the answer to the client."""

_NAME = re.compile(r"[\w.-]+(?:/[\w.-]+)?")


def register_resolver() -> None:
    """Enter the resolver in vLLM's registry."""
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    class DareResolver(LoRAResolver):  # type: ignore[misc]
        """See the module."""

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
            try:
                path = await asyncio.to_thread(find_adapter, lora_name, LOADED.get() or {})
            except DareError as error:
                reasons = REASONS.get()
                if reasons is not None:
                    reasons.append(str(error))
                return None
            # vLLM numbers it.
            return None if path is None else LoRARequest(lora_name, 1, path)

    LoRAResolverRegistry.register_resolver("DARE", DareResolver())


def find_adapter(name: str, loaded: Mapping[str, Any]) -> str | None:
    """The path of an adapter or of a mix; None: there is none of that name.

    Args:
        name: what a request has for `model`.
        loaded: requests of adapters that are loaded, by name.

    Raises:
        DareError: it is a mix of what is no DARE adapter, or is not there.
    """
    mix = parse_mix(name)
    if mix is None:
        return _find_one(name)
    parts = []
    for part, weight in mix:
        path = loaded[part].lora_path if part in loaded else _find_one(part)
        if path is None:
            raise DareError(
                f"the mix {name!r} names {part!r}, which is neither loaded nor to be found; "
                f"loaded: {', '.join(sorted(loaded)) or 'none'}"
            )
        inner = parts_of(path)
        if inner is None:
            raise DareError(f"the mix {name!r} names {part!r}, which is no DARE adapter")
        parts += [(own, own_weight * weight) for own, own_weight in inner]
    return mix_path(parts)


def _find_one(name: str) -> str | None:
    if not _NAME.fullmatch(name) or ".." in name:
        return None
    directory = os.environ.get(ADAPTERS)
    if directory:
        path = Path(directory, name)
        inside = Path(os.path.realpath(path)).is_relative_to(os.path.realpath(directory))
        if inside and path.is_dir() and parts_of(str(path.absolute())) is not None:
            return str(path.absolute())
    allowed = [pattern.strip() for pattern in os.environ.get(HUB, "").split(",")]
    if any(pattern and fnmatch.fnmatchcase(name, pattern) for pattern in allowed):
        path = download_adapter(name)
        if parts_of(str(path)) is not None:
            return str(path)
    return None
