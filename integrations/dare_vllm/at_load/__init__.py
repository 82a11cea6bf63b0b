"""Way 1: a mixture that is added to the base while it loads (`load_format="dare"`)."""

from __future__ import annotations

__all__ = ["install"]


def install() -> None:
    """Tell vLLM of the load format, and of rows that it keeps free."""
    from vllm.model_executor.model_loader import register_model_loader

    from dare_vllm.at_load.loader import DareModelLoader
    from dare_vllm.at_load.spare_rows import hook_vocabulary
    from dare_vllm.mixture import LOAD_FORMAT

    hook_vocabulary()
    register_model_loader(LOAD_FORMAT)(DareModelLoader)
