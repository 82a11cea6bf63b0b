"""An adapter for each request: stock LoRA requests of vLLM whose path is a DARE adapter.

vLLM's own machinery does the rest: `--enable-lora`, `--lora-modules`, `/v1/load_lora_adapter`,
resolvers, scheduling by slots, the prefix cache's keys. See docs/vllm_per_request.md.
"""

from __future__ import annotations

from dare_vllm.per_request.loading import mix_path

__all__ = ["install", "mix_path"]

_installed = False


def install() -> None:
    """Hook vLLM in this process; calling it again does nothing."""
    global _installed  # noqa: PLW0603 (vLLM calls this once or more in each process)
    if _installed:
        return
    from dare_vllm.per_request.cpu_lora import hook_cpu_lora
    from dare_vllm.per_request.frontend import hook_frontend
    from dare_vllm.per_request.residency import export_metrics
    from dare_vllm.per_request.resolver import register_resolver
    from dare_vllm.per_request.token_check import hook_token_check
    from dare_vllm.per_request.worker import hook_worker

    hook_worker()
    hook_cpu_lora()
    hook_frontend()
    hook_token_check()
    register_resolver()
    export_metrics()
    _installed = True
