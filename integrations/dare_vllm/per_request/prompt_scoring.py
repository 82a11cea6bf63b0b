"""Log-probabilities of prompts: logits of a step's tokens, not of those that are sampled from.

vLLM asks the head for them with slices of the step's hidden states, and tells nobody whose they
are; a stock LoRA of the head has the rows of the samples then.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from dare_vllm.per_request.slots import RowSlots

__all__ = ["hook_prompt_scoring"]

# (module, class, function): each takes the hidden states of a whole step.
SCORERS = (
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "_get_prompt_logprobs_dict"),
    ("vllm.v1.worker.gpu.sample.prompt_logprob", "PromptLogprobsWorker", "compute_prompt_logprobs"),
    (
        "vllm.v1.worker.gpu.sample.prompt_logprob",
        "PromptLogprobsWorker",
        "compute_prompt_token_id_logprobs",
    ),
)


def hook_prompt_scoring(rows: RowSlots) -> None:
    """Tell a model's tables while prompts are scored, in whichever runner this process has."""
    for module, owner, name in SCORERS:
        if module in sys.modules:
            _hook(getattr(sys.modules[module], owner), name, rows)


def _hook(owner: Any, name: str, rows: RowSlots) -> None:
    stock = getattr(owner, name)
    stock = getattr(stock, "_dare_stock", stock)

    @functools.wraps(stock)
    def score(self: Any, *args: Any, **kwargs: Any) -> Any:
        hidden = kwargs.get("hidden_states")
        if hidden is None:
            hidden = next(one for one in args if hasattr(one, "data_ptr"))
        with rows.scoring_prompts(hidden):
            return stock(self, *args, **kwargs)

    score._dare_stock = stock  # type: ignore[attr-defined]
    setattr(owner, name, score)
