"""Way 1: a mixture that is added to the base while it loads (`load_format="dare"`)."""

from __future__ import annotations

__all__ = ["LOAD_FORMAT", "install"]

LOAD_FORMAT = "dare"


def install() -> None:
    """Tell vLLM of the load format."""
    from vllm.model_executor.model_loader import register_model_loader

    from dare_vllm.at_load.loader import DareModelLoader

    register_model_loader(LOAD_FORMAT)(DareModelLoader)
