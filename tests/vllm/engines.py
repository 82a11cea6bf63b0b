"""A vLLM engine in this process, and what a transformers model says to the same tokens."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

__all__ = ["Answer", "Engine", "assert_says_the_same", "assert_scores_the_same"]

PROMPTS = [[1, 5, 9, 33, 12], [1, 70, 71, 72, 3, 4, 8, 91], [1, 14]]


@dataclass(frozen=True)
class Answer:
    """Greedy tokens, and the log-probability that each of the likeliest tokens had at each step."""

    tokens: list[int]
    logprobs: list[dict[int, float]]


class Engine:
    """One LLM; the same settings as all tests use.

    Attributes:
        llm: vLLM's object.
        at_start: every parameter as it was loaded; none where ranks are processes of their own.
    """

    def __init__(self, base: Path, **settings: Any) -> None:
        from vllm import LLM

        self.llm = LLM(
            str(base),
            **{
                "dtype": "float32",
                "enforce_eager": True,
                "max_model_len": 256,
                "max_num_seqs": 8,
                "max_num_batched_tokens": 512,
                "skip_tokenizer_init": True,
                "num_gpu_blocks_override": 64,
                **settings,
            },
        )
        apart = settings.get("distributed_executor_backend") == "mp"
        self.at_start = {} if apart else self.weights()

    def greedy(
        self, prompts: Sequence[Sequence[int]] = tuple(PROMPTS), tokens: int = 8, **how: Any
    ) -> list[Answer]:
        """Continue token ids, all prompts in one batch."""
        from vllm import SamplingParams

        parameters = SamplingParams(
            temperature=0, max_tokens=tokens, logprobs=5, ignore_eos=True, detokenize=False
        )
        outputs = self.llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            parameters,
            use_tqdm=False,
            **how,
        )
        return [
            Answer(
                list(output.outputs[0].token_ids),
                [
                    {token: value.logprob for token, value in step.items()}
                    for step in output.outputs[0].logprobs
                ],
            )
            for output in outputs
        ]

    def prompt_logprobs(
        self, prompts: Sequence[Sequence[int]], **how: Any
    ) -> list[list[dict[int, float]]]:
        """For each token of each prompt but the first, its log-probability and the likeliest's."""
        from vllm import SamplingParams

        outputs = self.llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=3, detokenize=False),
            use_tqdm=False,
            **how,
        )
        return [
            [
                {token: value.logprob for token, value in place.items()}
                for place in output.prompt_logprobs[1:]
            ]
            for output in outputs
        ]

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of every parameter, fused and padded as vLLM has them."""

        def copied(model: torch.nn.Module) -> dict[str, torch.Tensor]:
            return {
                name: weight.detach().clone()
                for name, weight in model.named_parameters(remove_duplicate=False)
            }

        found: dict[str, torch.Tensor] = self.llm.apply_model(copied)[0]
        return found

    def close(self) -> None:
        """Give the memory back."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()


def assert_says_the_same(
    answers: Sequence[Answer],
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]] = tuple(PROMPTS),
    tolerance: float = 1e-4,
) -> None:
    """Every greedy token is the model's own, every log-probability within the tolerance."""
    for answer, prompt in zip(answers, prompts, strict=True):
        ids = torch.tensor([[*prompt, *answer.tokens]])
        with torch.no_grad():
            logits = model(ids).logits[0].float()
        expected = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
        assert answer.tokens == expected.argmax(-1).tolist()
        for step, found in zip(expected, answer.logprobs, strict=True):
            for token, logprob in found.items():
                assert abs(float(step[token]) - logprob) < tolerance


def assert_scores_the_same(
    scores: Sequence[dict[int, float]],
    model: PreTrainedModel,
    prompt: Sequence[int],
    tolerance: float = 1e-4,
) -> None:
    """Every log-probability of a prompt's tokens is the model's, each token's own among them."""
    with torch.no_grad():
        logits = model(torch.tensor([list(prompt)])).logits[0].float()
    for expected, found, own in zip(
        torch.log_softmax(logits, -1)[:-1], scores, prompt[1:], strict=True
    ):
        assert own in found
        for token, logprob in found.items():
            assert abs(float(expected[token]) - logprob) < tolerance
