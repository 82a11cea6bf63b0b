"""The harness model `dare-vllm`: a base in vLLM, and adapters that are added to it at load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.models.vllm_causallms import VLLM

import dare_vllm
from dare_eval.lm.mixture import Mixture

__all__ = ["DareVLLM"]


class DareVLLM(VLLM):  # type: ignore[misc]
    """`--model dare-vllm`, with the arguments of :class:`.transformers_model.DareLM`.

    Args:
        base: directory or hub id.
        adapter: of one adapter or mix, or of several.
        weights: one for each adapter.
        combination_type: how several are made one.
        **others: options of the combination type, `prune`, `drop_rate`, `mask`, `mask_seed`, and
            all arguments of the harness's `vllm`, among them those of `vllm.LLM`.
    """

    def __init__(
        self,
        base: str,
        adapter: str | Sequence[str] | None = None,
        weights: str | float | Sequence[float] | None = None,
        combination_type: str = "linear",
        **others: Any,
    ) -> None:
        mixture = Mixture.from_arguments(adapter, weights, combination_type, others)
        others.setdefault("tokenizer", mixture.tokenizer())
        others.pop("device", None)
        dare_vllm.register()
        super().__init__(
            pretrained=str(base),
            load_format="dare",
            model_loader_extra_config=mixture.to_config(),
            **others,
        )

    def set_mixture(self, mixture: Mixture) -> None:
        """Make the engine's weights those of the base with these adapters and no others."""
        config = mixture.to_config()
        dare_vllm.set_mixture(self.model, config.pop("adapters"), **config)
