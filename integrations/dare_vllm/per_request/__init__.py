"""An adapter for each request: stock LoRA requests of vLLM whose path is a DARE adapter."""

from __future__ import annotations

__all__ = ["install"]

_installed = False


def install() -> None:
    """Hook vLLM in this process; calling it again does nothing."""
    global _installed  # noqa: PLW0603 (vLLM calls this once or more in each process)
    if _installed:
        return
    _installed = True
    from dare_vllm.per_request.cpu_lora import hook_cpu_lora
    from dare_vllm.per_request.worker import hook_worker

    hook_worker()
    hook_cpu_lora()
