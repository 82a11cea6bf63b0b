"""From what a model wrote to a program that can run, and from a document to its tests."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dare_eval.lm.sandbox.run import Checks

__all__ = ["code_in", "humaneval_checks", "humaneval_program", "mbpp_checks", "mbpp_program"]

_FENCE = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\r?\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL | re.I)
_OPENING = re.compile(r"^The (?:solution|answer) is:", re.MULTILINE)
_INDENT = "    "

# Where the paper's code cuts a completion: what follows is no part of the program.
_ENDS = (
    'if __name__ == "__main__":',
    "if __name__ == '__main__':",
    "# Example usage",
    "# Test examples",
)


def code_in(completion: str) -> str:
    """The code of a completion, as the paper's code takes it out.

    What the first ```python block holds, or all if there is none; tabs are four spaces; nothing
    from a ``__main__`` guard, "# Example usage" or "# Test examples" on; of code-alpaca's answers
    what stands between a line's "The solution is:" or "The answer is:" and the next. Unlike there,
    the first line keeps its indentation, so that a function's body stays one, and a program that
    prints these words is left whole.
    """
    text = completion.replace("\r\n", "\n").replace("\r", "").replace("\t", _INDENT)
    if (block := _FENCE.search(text)) is not None:
        text = block[1]
    elif (opening := _OPENING.search(text)) is not None:
        text = text[opening.end() :].partition("\n\nThe answer is:")[0]
    for end in _ENDS:
        text = text.partition(end)[0]
    return text.strip("\n").rstrip()


def humaneval_program(document: Mapping[str, Any], completion: str) -> str:
    """HumanEval's program: the prompt, then a definition of its own or the prompt's body."""
    code = code_in(completion)
    defined = re.search(rf"^(?:async )?def\s+{re.escape(document['entry_point'])}\b", code, re.M)
    return f"{document['prompt']}\n{code if defined else _as_body(code)}\n"


def humaneval_checks(document: Mapping[str, Any]) -> Checks:
    """HumanEval's tests; helpers that the prompt defines are the prompt's."""
    name = document["entry_point"]
    return Checks(f"{document['test']}\ncheck({name})\n", document["prompt"], (name,))


def mbpp_program(document: Mapping[str, Any], completion: str) -> str:
    """MBPP's program: a completion's code, then what the benchmark sets up with it."""
    return f"{code_in(completion)}\n{document.get('test_setup_code') or ''}\n"


def mbpp_checks(document: Mapping[str, Any]) -> Checks:
    """MBPP's assertions; one problem's function is called `sum`, so the reference says which names
    are the program's rather than Python's."""
    defined = re.findall(r"^(?:def|class)\s+(\w+)", document["code"], re.M)
    return Checks("\n".join(document["test_list"]), from_program=tuple(defined))


def _as_body(code: str) -> str:
    """Code, indented as the body of a function.

    A body whose first line lost its indentation (a tokenizer's or a chat model's doing) gets it
    back; code without any is indented as a whole.
    """
    lines = code.split("\n")
    depths = [len(line) - len(line.lstrip()) for line in lines if line.strip()]
    if not depths or depths[0] >= len(_INDENT):
        return code
    # With a block opened in the first line, the next is deeper than the body by itself.
    least = 2 * len(_INDENT) if lines[0].rstrip().endswith(":") else len(_INDENT)
    if depths[1:] and min(depths[1:]) >= len(_INDENT) and depths[1] >= least:
        return "\n".join([_INDENT + lines[0].lstrip(), *lines[1:]])
    lines[0] = lines[0].lstrip()
    return "\n".join(_INDENT + line if line.strip() else line for line in lines)
