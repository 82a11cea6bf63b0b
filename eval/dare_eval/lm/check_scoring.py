"""Proof that scoring is right, on the benchmarks themselves: no model is needed.

Fed its own reference answers a benchmark must score 1; fed each problem's neighbour's, no more than
two problems share an answer by chance.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm

from dare_eval.lm import documents, scoring
from dare_eval.lm.answers import read_number
from dare_eval.lm.sandbox.run import require_sandbox

__all__ = ["REFERENCES", "ScoringCheck", "check_scoring"]

Document = Mapping[str, Any]


@dataclass(frozen=True)
class ScoringCheck:
    """What scoring said of one benchmark.

    Attributes:
        task: its name.
        problems: how many.
        own: the share of problems whose own reference passes; right is 1.
        others: the share that pass with another problem's reference.
        chance: how often two problems of these have the same answer.
        failed: positions of the problems whose own reference did not pass.
    """

    task: str
    problems: int
    own: float
    others: float
    chance: float
    failed: tuple[int, ...]


def _gsm8k(document: Document) -> str:
    return f"{document['answer']}\nThe answer is: {scoring.gsm8k_target(document)}"


def _math(document: Document) -> str:
    return f"{document['solution']}\nThe answer is: {scoring.math_target(document)}"


@dataclass(frozen=True)
class _Reference:
    """How a benchmark answers itself: its documents, completion, answer's key, score, metric."""

    load: Callable[..., Mapping[str, Any]]
    completion: Callable[[Document], str]
    key: Callable[[Document], object]
    score: Callable[[Document, Sequence[str]], Mapping[str, float]]
    metric: str
    runs_code: bool = False


REFERENCES: dict[str, _Reference] = {
    "gsm8k": _Reference(
        documents.gsm8k,
        _gsm8k,
        lambda document: read_number(scoring.gsm8k_target(document)),
        scoring.gsm8k,
        "exact_match",
    ),
    "math": _Reference(documents.math, _math, scoring.math_target, scoring.math, "exact_match"),
    "humaneval": _Reference(
        documents.humaneval,
        lambda document: str(document["canonical_solution"]),
        lambda document: document["canonical_solution"],
        scoring.humaneval,
        "pass_at_1",
        runs_code=True,
    ),
    "mbpp": _Reference(
        documents.mbpp,
        lambda document: str(document["code"]),
        lambda document: document["code"],
        scoring.mbpp,
        "pass_at_1",
        runs_code=True,
    ),
}


def check_scoring(
    task: str, data_dir: str | None = None, limit: int | None = None, others: bool = True
) -> ScoringCheck:
    """Score a benchmark's reference answers as if a model had written them.

    Args:
        task: a name of REFERENCES.
        data_dir: see :mod:`dare_eval.lm.documents`.
        limit: of problems, drawn with a fixed seed; default all.
        others: also give each problem the answer of another.

    Raises:
        DataNotFoundError: the benchmark is not to be had.
        SandboxUnavailableError: it runs programs, and they cannot be contained here.
    """
    reference = REFERENCES[task]
    if reference.runs_code:
        require_sandbox()
    problems = list(reference.load(data_dir=data_dir)["test"])
    random.Random(0).shuffle(problems)
    problems = problems[:limit]
    completions = [reference.completion(problem) for problem in problems]

    def share(given: Sequence[str], what: str) -> list[bool]:
        pairs = tqdm(list(zip(problems, given, strict=True)), desc=f"{task}, {what}")
        return [reference.score(problem, [text])[reference.metric] == 1 for problem, text in pairs]

    own = share(completions, "own answers")
    # In shuffled order the next problem is any other.
    swapped = share([*completions[1:], completions[0]], "others' answers") if others else []
    counts = Counter(map(reference.key, problems)).values()
    count = len(problems)
    return ScoringCheck(
        task=task,
        problems=count,
        own=sum(own) / count,
        others=sum(swapped) / count,
        chance=sum(n * (n - 1) for n in counts) / max(count * (count - 1), 1),
        failed=tuple(number for number, right in enumerate(own) if not right),
    )
