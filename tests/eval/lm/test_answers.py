"""Final answers are read as they were meant."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dare_eval.lm.answers import (
    after_marker,
    last_boxed,
    read_number,
    same_expression,
    unwrapped,
)
from tests.development_data import shared


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,234,567", 1234567),  # the paper's parser reads 1234
        ("5.4", Fraction(27, 5)),  # and 5
        ("3/4", Fraction(3, 4)),
        ("-7", -7),
        ("\N{MINUS SIGN}7", -7),
        ("- 7", -7),
        ("-$7", -7),
        (r"\frac12", Fraction(1, 2)),
        (r"\frac{1}{2}", Fraction(1, 2)),
        (r"$-\dfrac{3}{4}$", Fraction(-3, 4)),
        (r"1\frac12", Fraction(3, 2)),
        ("1 1/2 cups", Fraction(3, 2)),
        ("$1,234.50.", Fraction(2469, 2)),
        (r"\$18", 18),
        (r"1{,}234", 1234),
        (r"10\%", 10),
        (".5", Fraction(1, 2)),
        ("2e3", 2000),
        ("1.5E-1", Fraction(3, 20)),
        ("18 dollars a day", 18),
        ("x = 5", 5),
        ("5-6", 5),
        ("12,5", 12),
        ("5,", 5),
        ("12345678901234567890", 12345678901234567890),
        ("1/0", None),
        ("none", None),
        ("", None),
        ("9" * 1000, None),
        ("1e999999999999", 1),
    ],
)
def test_numbers_are_read_whole_and_exactly(text: str, number: Fraction | int | None) -> None:
    assert read_number(text) == number


@given(st.integers(-(10**30), 10**30))
def test_every_integer_is_read_with_and_without_separators(value: int) -> None:
    for text in (str(value), f"{value:,}", f"${value:,}$."):
        assert read_number(text) == value
        assert read_number(text, whole=True) == value


@given(st.decimals(-(10**12), 10**12, places=4), st.sampled_from([",", ""]))
def test_every_decimal_is_read(value: object, separator: str) -> None:
    text = format(value, f"{separator}f")
    assert read_number(f"It is {text} or so") == Fraction(str(value))


@given(st.integers(-999, 999), st.integers(1, 999))
def test_every_fraction_is_read(over: int, under: int) -> None:
    sign, size = "-" if over < 0 else "", abs(over)
    for text in (f"{over}/{under}", rf"{sign}\frac{{{size}}}{{{under}}}"):
        assert read_number(text) == Fraction(over, under)


@settings(deadline=None)  # the first example imports the harness
@given(st.text(max_size=60))
def test_any_text_is_read_without_an_error(text: str) -> None:
    read_number(text)
    read_number(text, last=True)
    read_number(text, whole=True)
    unwrapped(text)
    last_boxed(text)
    same_expression(text, "1")


def test_the_last_number_and_whole_numbers() -> None:
    assert read_number("3 cats, 4 dogs and 1,200 fish.", last=True) == 1200
    assert read_number("3 cats", whole=True) is None


def test_the_answer_follows_the_last_marker() -> None:
    assert after_marker("The answer is: 5. Wait. The answer is: 6") == "6"
    assert after_marker("so the answer is:\n6") == "6"
    assert after_marker("6") is None


@pytest.mark.parametrize(
    ("text", "held"),
    [
        (r"so $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"\fbox{3}", "3"),
        (r"$\boxed 5$", "5"),
        (r"\boxed{\text{(A)}}", r"\text{(A)}"),
        (r"\boxed{1", None),
        ("none", None),
    ],
)
def test_a_box_is_opened(text: str, held: str | None) -> None:
    assert last_boxed(text) == held


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        (r"$\frac12$.", r"\frac{1}{2}"),
        ("1/2", r"\frac{1}{2}"),
        ("0.5", r"\frac{1}{2}"),
        ("0.75", r"\frac34"),
        ("1,234,567", "1234567"),
        (r"\boxed{7}", "7"),
        (r"\(x^2 + 1\)", "x^2+1"),
        (r"5\text{ cm}", "5"),
        ("-7.", "-7"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
    ],
)
def test_equal_expressions_are_one(answer: str, reference: str) -> None:
    assert same_expression(answer, reference)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [("2", "3"), ("1,2", "12"), ("x", "y"), ("", "0"), ("1/3", "0.33"), ("-7", "7")],
)
def test_other_expressions_are_not(answer: str, reference: str) -> None:
    assert not same_expression(answer, reference)


def test_every_reference_of_gsm8k_is_a_number() -> None:
    """Read by Python's own parser, the separators taken out."""
    for line in shared("data", "gsm8k", "test.jsonl").read_text().splitlines():
        answer = json.loads(line)["answer"].split("####")[1].strip()
        assert read_number(answer, whole=True) == int(answer.replace(",", ""))


def test_boxes_of_math_are_those_that_the_harness_finds() -> None:
    from lm_eval.tasks.hendrycks_math.utils import last_boxed_only_string, remove_boxed

    for line in shared("data", "math", "test.jsonl").read_text().splitlines():
        solution = json.loads(line)["solution"]
        try:
            expected = remove_boxed(last_boxed_only_string(solution))
        except AssertionError:  # \fbox
            continue
        assert last_boxed(solution) == expected
