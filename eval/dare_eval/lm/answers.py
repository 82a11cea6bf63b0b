"""Reading a final answer out of what a model wrote, and comparing it with the reference.

The paper's code takes what follows "The answer is: ". Its number parser reads 1,234,567 as 1234 and
5.4 as 5; here a number is read whole, and exactly.
"""

from __future__ import annotations

import re
from fractions import Fraction

__all__ = ["after_marker", "last_boxed", "read_number", "same_expression", "unwrapped"]

_MARKER = re.compile(r"the answer is\s*:\s*", re.IGNORECASE)

_PLAIN = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
_DECIMAL = rf"{_PLAIN}(?:[eE][+-]?[0-9]{{1,3}}(?![0-9A-Za-z]))?"
_NUMBER = re.compile(
    rf"""(?P<sign>(?<![\w.])[-+])?
    (?: (?:(?P<whole>[0-9]+)\s*)?
        \\frac\s*(?:\{{\s*(?P<over>[-+]?{_PLAIN})\s*\}}|(?P<over1>[0-9]))
              \s*(?:\{{\s*(?P<under>[-+]?{_PLAIN})\s*\}}|(?P<under1>[0-9]))
      | (?P<mixed>[0-9]+)\s+(?P<top>[0-9]+)/(?P<bottom>[0-9]+)
      | (?P<number>{_DECIMAL})(?:\s*/\s*(?P<divisor>{_DECIMAL}))?
    )""",
    re.VERBOSE,
)
_LONGEST = 400  # characters of a number


def after_marker(completion: str) -> str | None:
    """What follows the last "The answer is:"; None if a completion does not say it."""
    parts = _MARKER.split(completion)
    return parts[-1] if len(parts) > 1 else None


def read_number(text: str, *, last: bool = False, whole: bool = False) -> Fraction | None:
    r"""The first number in a text, exactly.

    Integers, thousands (1,234,567), decimals (5.4), fractions (3/4, \frac{3}{4}, \frac12), mixed
    numbers (1 1/2) and powers of ten (1.5e3), with signs and currencies around them. Percent signs
    and units are left aside.

    Args:
        text: a final answer, plain or in LaTeX.
        last: the last number instead.
        whole: only if the text is nothing but that number.

    Returns:
        None if there is none, and for a division by zero.
    """
    plain = _plain(text)
    if whole:
        match = _NUMBER.fullmatch(plain.strip().rstrip(".").strip())
    elif last:
        match = next(iter([*_NUMBER.finditer(plain)][::-1]), None)
    else:
        match = _NUMBER.search(plain)
    return None if match is None or len(match[0]) > _LONGEST else _value(match)


def last_boxed(text: str) -> str | None:
    r"""What the last \boxed{…}, \fbox{…} or "\boxed …" of a text holds."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    rest = text[start:].partition("box")[2].removeprefix("ed").lstrip()
    if not rest.startswith("{"):
        return re.split(r"[\s$]", rest, maxsplit=1)[0] or None
    depth = 0
    for position, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:position]
    return None


def unwrapped(answer: str) -> str:
    r"""A final answer without the sentence around it: full stop, $…$, \(…\), \boxed{…}."""
    text = re.split(r"\.\s*\n|\n\s*\n", answer.strip(), maxsplit=1)[0].strip()
    while True:
        before = text
        text = text.removesuffix(".").strip()
        for left, right in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
            inner = text[len(left) : -len(right)]
            is_wrapped = len(text) > len(left + right) and text.startswith(left)
            if is_wrapped and text.endswith(right) and left not in inner:
                text = inner.strip()
        if text.startswith(("\\boxed", "\\fbox")) and text.endswith("}"):
            text = last_boxed(text) or text
        if text == before:
            return text


def same_expression(answer: str, reference: str) -> bool:
    r"""Whether two answers of MATH are one.

    Equal by the rules of Hendrycks et al. (2021), as the harness has them, or both nothing but a
    number, and the same: 1,234 and 1234, 0.75 and \frac34.
    """
    from lm_eval.tasks.hendrycks_math.utils import is_equiv

    answer, reference = unwrapped(answer), unwrapped(reference)
    if is_equiv(answer, reference):
        return True
    number = read_number(answer, whole=True)
    return number is not None and number == read_number(reference, whole=True)


def _plain(text: str) -> str:
    """Without what may stand around and inside a number in LaTeX or in a sentence."""
    text = text.replace("\u2212", "-").replace("\u2013", "-").replace("\\!", "")
    text = re.sub(r"\\[dt]frac", r"\\frac", text).replace("{,}", ",")
    text = re.sub(r"(?<=[0-9])\\,(?=[0-9])", "", text)
    text = re.sub(r"\\?[$€£]|\\?%|\\text\{\s*dollars?\s*\}", "", text)
    return re.sub(r"([-+])\s+(?=[0-9.\\])", r"\1", text) if text[:1] in "-+" else text


def _value(match: re.Match[str]) -> Fraction | None:
    found = match.groupdict()

    def of(*names: str) -> Fraction:
        text = next(found[name] for name in names if found[name] is not None)
        return Fraction(text.replace(",", ""))

    try:
        if found["number"] is not None:
            value = of("number") / (of("divisor") if found["divisor"] is not None else 1)
        elif found["mixed"] is not None:
            value = of("mixed") + of("top") / of("bottom")
        else:
            value = of("over", "over1") / of("under", "under1")
            if found["whole"] is not None:
                value += of("whole")
    except ZeroDivisionError:
        return None
    return -value if found["sign"] == "-" else value
