"""The harness model `dare`: a base in transformers, and adapters that are put on it in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

import dare_adapters  # noqa: F401 (gives models their adapter methods)
from dare_eval.lm.mixture import Mixture

__all__ = ["DareLM"]

_NAME = "mixture"


class DareLM(HFLM):  # type: ignore[misc]
    """`--model dare --model_args base=…,adapter=A+B,weights=1.0+0.5,combination_type=dare_ties,…`.

    Args:
        base: directory or hub id.
        adapter: of one adapter or mix, or of several.
        weights: one for each adapter.
        combination_type: how several are made one.
        **others: options of the combination type, `prune`, `drop_rate`, `mask`, `mask_seed`, and
            all arguments of the harness's `hf`.
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
        others.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(pretrained=str(base), **others)
        self._worn = False
        self.set_mixture(mixture)

    def set_mixture(self, mixture: Mixture) -> None:
        """Make the weights those of the base with these adapters and no others."""
        if self._worn:
            self._model.delete_dare_adapter(_NAME)
            self._worn = False
        if mixture.adapters:
            self._model.load_dare_adapter(
                list(mixture.adapters),
                _NAME,
                weight=list(mixture.weights),
                combination_type=mixture.combination_type,
                **mixture.options,
            )
            self._worn = True
