"""The paper's zero-shot prompts (MergeLM, utils/evaluate_llms_utils.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["alpaca_eval", "gsm8k", "humaneval", "math", "mbpp"]

Document = Mapping[str, Any]

# Its tests are thousands of characters long; the paper's code names its signature instead.
_MBPP_LONG = 493
_MBPP_LONG_SIGNATURE = "calculate_polygons(startx, starty, endx, endy, radius)"


def gsm8k(document: Document) -> str:
    """Alpaca's prompt, ending in "Let's think step by step."."""
    return _step_by_step(document["question"])


def math(document: Document) -> str:
    """As :func:`gsm8k`."""
    return _step_by_step(document["problem"])


def humaneval(document: Document) -> str:
    """WizardCoder's prompt around HumanEval's, whose indentation becomes tabs."""
    return _script(document["prompt"])


def mbpp(document: Document) -> str:
    """WizardCoder's prompt around the task and its tests."""
    examples = document["test_list"]
    if document["task_id"] == _MBPP_LONG:
        examples = [_MBPP_LONG_SIGNATURE]
    return _script("\n".join([f"\n{document['text']}\nTest examples:", *examples]))


def alpaca_eval(document: Document) -> str:
    """WizardLM's prompt: a chat of one turn."""
    return (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. "
        f"USER: {document['instruction']} ASSISTANT:"
    )


def _step_by_step(instruction: str) -> str:
    return (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n### Response: Let's think step by step."
    )


def _script(problem: str) -> str:
    return (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n\n"
        "### Instruction:\nCreate a Python script for this problem:\n"
        + problem.replace("    ", "\t")
        + "\n\n### Response:"
    )
