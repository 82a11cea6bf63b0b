"""An engine of way 3, what can be asked of it, and what the answers must be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from tests.conftest import Pack
from tests.vllm.engines import PROMPTS, Engine, assert_says_the_same, assert_scores_the_same

__all__ = ["Served"]


@dataclass
class Served:
    """An engine, requests by name, and the models that hold the same merged weights."""

    engine: Engine
    pack: Pack
    requests: dict[str, Any]
    models: dict[str, PreTrainedModel]

    def prompts(self, name: str) -> list[list[int]]:
        """What is asked of a name."""
        return PROMPTS

    def check(self, names: list[str]) -> list[list[int]]:
        """Ask all prompts of each name, in one batch, and compare every answer."""
        jobs = self._jobs(names)
        answers = self.engine.greedy(
            [prompt for _, prompt in jobs], lora_request=[self.requests[name] for name, _ in jobs]
        )
        for (name, prompt), answer in zip(jobs, answers, strict=True):
            assert_says_the_same([answer], self.models[name], [prompt])
        return [answer.tokens for answer in answers]

    def check_scores(self) -> None:
        """Have all prompts of every name scored, in one batch, and compare every score."""
        jobs = self._jobs(list(self.requests))
        scores = self.engine.prompt_logprobs(
            [prompt for _, prompt in jobs], lora_request=[self.requests[name] for name, _ in jobs]
        )
        for (name, prompt), found in zip(jobs, scores, strict=True):
            assert_scores_the_same(found, self.models[name], prompt)

    def _jobs(self, names: list[str]) -> list[tuple[str, list[int]]]:
        return [(name, prompt) for name in names for prompt in self.prompts(name)]
