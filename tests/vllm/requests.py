"""Requests for adapters, as vLLM takes them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

__all__ = ["request_for"]

_numbers = itertools.count(1)


def request_for(path: Path | str, name: str | None = None) -> Any:
    """A LoRARequest of its own number."""
    from vllm.lora.request import LoRARequest

    number = next(_numbers)
    return LoRARequest(name or f"adapter-{number}", number, str(path))
