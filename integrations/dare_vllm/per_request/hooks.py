"""What this way of serving touches in vLLM, for the version guard."""

from __future__ import annotations

__all__ = ["HOOKS"]
HOOKS: list[object] = []
