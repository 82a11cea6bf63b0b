"""Programs are taken out of what models write around them."""

from __future__ import annotations

import ast
import textwrap

import pytest

from dare_eval.lm.programs import (
    code_in,
    humaneval_checks,
    humaneval_program,
    mbpp_checks,
    mbpp_program,
)
from dare_eval.lm.sandbox.run import run_tests

PROMPT = 'from typing import List\n\ndef total(xs: List[int]) -> int:\n    """ Sum. """\n'
HUMANEVAL = {
    "prompt": PROMPT,
    "entry_point": "total",
    "test": "def check(f):\n    assert f([1, 2]) == 3\n    assert f([]) == 0",
}
BODY = "    result = 0\n    for x in xs:\n        result += x\n    return result\n"
WHOLE = PROMPT + BODY
MBPP = {
    "text": "Sum.",
    "code": "def sum(xs):\n    return 0",
    "test_list": ["assert sum([1, 2]) == 3"],
    "test_setup_code": "",
}


@pytest.mark.parametrize(
    "completion",
    [
        BODY,
        BODY.lstrip(),  # stripped, as chat models' answers are
        textwrap.dedent(BODY),
        BODY.replace("    ", "\t"),
        BODY.replace("\n", "\r\n"),
        "    return sum(xs)",
        "return sum(xs)",
        "for x in xs:\n        return sum(xs)\n    return 0",
        "for x in xs:\n    return sum(xs)\nreturn 0",
        f"```python\n{WHOLE}```",
        f"Here you are:\n\n```python\n{WHOLE}\n```\nIt adds `xs`.\n```\nnot code\n```",
        f"```\n{WHOLE}\n```",
        f"```python\n{WHOLE}",  # cut off before the fence
        f"{WHOLE}\n# Example usage\nprint(total([1",
        f'{WHOLE}\nif __name__ == "__main__":\n    total()\n    raise SystemExit',
        f"The solution is:\n{WHOLE}\n\nThe answer is: 3",
        f"The answer is:\n{WHOLE}",
        f"{WHOLE}\nprint('The answer is:', total([]))",
    ],
)
def test_a_right_function_passes_however_it_is_wrapped(completion: str) -> None:
    program = humaneval_program(HUMANEVAL, completion)
    ast.parse(program)
    outcome = run_tests(program, humaneval_checks(HUMANEVAL))
    assert outcome.passed, (outcome.reason, program)


@pytest.mark.parametrize("completion", ["", "    return 0", "I do not know.", "```python\n```"])
def test_a_wrong_function_does_not(completion: str) -> None:
    program = humaneval_program(HUMANEVAL, completion)
    assert not run_tests(program, humaneval_checks(HUMANEVAL)).passed


def test_helpers_of_the_prompt_are_the_prompts() -> None:
    """A program that redefines what it is checked with is checked with the original."""
    document = {
        "prompt": "def double(x):\n    return 2 * x\n\ndef half(x):\n    '''Undo double.'''\n",
        "entry_point": "half",
        "test": "def check(candidate):\n    assert candidate(double(3)) == 3",
    }
    cheat = "def double(x):\n    return x\n\ndef half(x):\n    return x"
    assert not run_tests(humaneval_program(document, cheat), humaneval_checks(document)).passed
    right = "    return x // 2"
    assert run_tests(humaneval_program(document, right), humaneval_checks(document)).passed


def test_mbpps_function_may_have_the_name_of_a_builtin_one() -> None:
    right = "def sum(xs):\n    t = 0\n    for x in xs: t += x\n    return t"
    assert run_tests(mbpp_program(MBPP, right), mbpp_checks(MBPP)).passed
    assert not run_tests(mbpp_program(MBPP, "def sum(xs): return 0"), mbpp_checks(MBPP)).passed
    assert not run_tests(mbpp_program(MBPP, "pass"), mbpp_checks(MBPP)).passed


def test_objects_of_the_programs_own_classes_can_be_made_and_compared_by_tests() -> None:
    """As in MBPP's problems with pairs and trees."""
    document = {
        "text": "",
        "code": "class Node:\n    pass\ndef depth(node):\n    pass",
        "test_setup_code": "root = Node(1)\nroot.left = Node(2)",
        "test_list": ["assert depth(root) == 2", "assert depth(Node(1)) == 1"],
    }
    program = """
class Node:
    def __init__(self, value):
        self.value, self.left = value, None
def depth(node):
    return 1 + depth(node.left) if node else 0
"""
    outcome = run_tests(mbpp_program(document, program), mbpp_checks(document))
    assert outcome.passed, outcome.reason


def test_code_is_left_alone_where_there_is_nothing_around_it() -> None:
    assert code_in(BODY) == BODY.rstrip()
