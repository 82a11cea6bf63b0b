"""A base under one mixture of adapters after another, in transformers or in vLLM."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

from dare_eval.lm.harness import register
from dare_eval.lm.mixture import Mixture

__all__ = ["BACKENDS", "Decoder"]

BACKENDS = {"transformers": "dare", "vllm": "dare-vllm"}
"""Names of the harness's models."""


class Decoder:
    """Loads a base once, when it is first needed, and then only changes what it wears.

    Args:
        base: directory or hub id.
        backend: of BACKENDS.
        arguments: of the harness model.
    """

    def __init__(self, base: str, backend: str, arguments: Mapping[str, Any]) -> None:
        self.base, self.backend, self.arguments = base, backend, dict(arguments)
        self._model: Any = None
        self._tokenizer: str | None = None
        self._worn: Mixture | None = None

    def wearing(self, mixture: Mixture) -> Any:
        """The harness model with these adapters and no others."""
        tokenizer = mixture.tokenizer()
        if self._model is None or tokenizer != self._tokenizer:
            self.close()
            from lm_eval.api.registry import get_model

            register()
            own = {} if tokenizer is None else {"tokenizer": tokenizer}
            model = get_model(BACKENDS[self.backend])
            self._model = model(base=self.base, **{**own, **self.arguments})
            self._tokenizer = tokenizer
            self._worn = Mixture()
        if mixture != self._worn:
            self._worn = None  # unknown, should the next line fail
            self._model.set_mixture(mixture)
            self._worn = mixture
        return self._model

    def close(self) -> None:
        """Free the memory."""
        self._model = self._worn = None
        gc.collect()
