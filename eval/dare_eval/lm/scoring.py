"""What a completion is worth: the `process_results` and `doc_to_target` of the harness tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from dare_eval.lm.answers import after_marker, last_boxed, read_number, same_expression
from dare_eval.lm.programs import (
    humaneval_checks,
    humaneval_program,
    mbpp_checks,
    mbpp_program,
)
from dare_eval.lm.sandbox.run import run_tests

__all__ = [
    "alpaca_eval",
    "gsm8k",
    "gsm8k_target",
    "humaneval",
    "humaneval_target",
    "math",
    "math_target",
    "mbpp",
    "mbpp_target",
]

Document = Mapping[str, Any]
Scores = dict[str, float]


def gsm8k(document: Document, results: Sequence[str]) -> Scores:
    """Whether the number after "The answer is:" is the reference's.

    `flexible_match` also takes the number after "####" or, with neither, the last one written.
    """
    reference = read_number(gsm8k_target(document), whole=True)
    marked = after_marker(results[0])
    answer = None if marked is None else read_number(marked)
    loose = answer
    if marked is None:
        _, hashes, rest = results[0].rpartition("####")
        loose = read_number(rest if hashes else results[0], last=not hashes)
    return _scores(_is(answer, reference), _is(loose, reference))


def gsm8k_target(document: Document) -> str:
    """The reference's number."""
    return str(document["answer"]).rpartition("####")[2].strip()


def math(document: Document, results: Sequence[str]) -> Scores:
    r"""Whether the expression after "The answer is:" is that of the reference's \boxed.

    `flexible_match` also takes the last \boxed of a completion that does not say so.
    """
    reference = math_target(document)
    marked = after_marker(results[0])
    exact = marked is not None and same_expression(marked, reference)
    boxed = last_boxed(results[0]) if marked is None else None
    return _scores(exact, exact or (boxed is not None and same_expression(boxed, reference)))


def math_target(document: Document) -> str:
    """The reference's final answer."""
    boxed = last_boxed(str(document["solution"]))
    if boxed is None:
        raise ValueError(f"the solution of {document['problem']!r:.80} has no \\boxed answer")
    return boxed


def humaneval(document: Document, results: Sequence[str]) -> Scores:
    """Whether the program passes its tests, in the sandbox."""
    program = humaneval_program(document, results[0])
    return {"pass_at_1": float(run_tests(program, humaneval_checks(document)).passed)}


def humaneval_target(document: Document) -> str:
    """What the program is tested with."""
    return humaneval_checks(document).code


def mbpp(document: Document, results: Sequence[str]) -> Scores:
    """Whether the program passes its tests, in the sandbox."""
    program = mbpp_program(document, results[0])
    return {"pass_at_1": float(run_tests(program, mbpp_checks(document)).passed)}


def mbpp_target(document: Document) -> str:
    """What the program is tested with."""
    return mbpp_checks(document).code


def alpaca_eval(document: Document, results: Sequence[str]) -> Scores:
    """Whether there is an answer, and its length; which answer is better its own tool decides."""
    answer = results[0].strip()
    return {"answered": float(bool(answer)), "characters": float(len(answer))}


def _is(answer: Fraction | None, reference: Fraction | None) -> bool:
    return answer is not None and answer == reference


def _scores(exact: bool, loose: bool) -> Scores:
    return {"exact_match": float(exact), "flexible_match": float(loose)}
