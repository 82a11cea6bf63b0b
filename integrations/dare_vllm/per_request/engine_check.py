"""What an engine's configuration must not have, if it is to serve adapters per request."""

from __future__ import annotations

from typing import Any

__all__ = ["engine_obstacles"]


def engine_obstacles(config: Any = None) -> str:
    """What changes by request cannot be added under, and what to set instead; empty: nothing.

    Stock LoRA is served all the same: only DARE adapters are refused, when they are loaded, so
    that an engine with one in `--lora-modules` does not start.

    Args:
        config: vLLM's `VllmConfig`; default: of the engine that is being made.
    """
    if config is None:
        from vllm.config import get_current_vllm_config

        config = get_current_vllm_config()
    found = []
    compilation = config.compilation_config
    modes = (getattr(compilation, name, None) for name in ("mode", "cudagraph_mode"))
    if any(getattr(mode, "name", "NONE") != "NONE" for mode in modes):
        found.append(
            "the model is compiled, and would keep the adapters that it was compiled or captured "
            "with: start the engine with --enforce-eager"
        )
    if getattr(config.parallel_config, "enable_dbo", False):
        found.append("batches are split in two, of which vLLM tells no slots: drop --enable-dbo")
    if getattr(getattr(compilation, "pass_config", None), "enable_sp", False):
        found.append("tokens are shared out among ranks: switch sequence parallelism off")
    return "; ".join(found)
