"""What a program answers reaches its tests unchanged, and nothing but plain data does."""

from __future__ import annotations

import json
from collections import Counter, OrderedDict, defaultdict, namedtuple
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dare_eval.lm.sandbox.wire import decode, encode

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.fractions()
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(SCALARS, inner, max_size=3)
    ),
    max_leaves=8,
)


def travel(value: object) -> Any:
    def opaque(value: object) -> object:
        raise AssertionError(f"{value!r} is plain data")

    return decode(json.loads(json.dumps(encode(value, opaque))), opaque)


@given(VALUES | st.sets(SCALARS) | st.frozensets(SCALARS))
def test_plain_data_arrives_equal_and_of_its_type(value: object) -> None:
    arrived = travel(value)
    assert arrived == value
    assert type(arrived) is type(value)
    assert repr(arrived) == repr(value) or isinstance(value, set | frozenset | dict | list | tuple)


@pytest.mark.parametrize(
    ("value", "equal"),
    [
        (Counter("aab"), {"a": 2, "b": 1}),
        (OrderedDict(a=1), {"a": 1}),
        (defaultdict(list, a=[1]), {"a": [1]}),
        (namedtuple("P", "x y")(1, 2), (1, 2)),
        ({"a": 1}.keys(), {"a"}),
        (np.int64(5), 5),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (np.str_("a"), "a"),
        (range(3), range(3)),
        (Fraction(1, 3), Fraction(1, 3)),
        (Decimal("1.10"), Decimal("1.1")),
        (bytearray(b"a"), b"a"),
        (1 - 2j, 1 - 2j),
        ("\udc80", "\udc80"),  # half a character
    ],
)
def test_other_libraries_types_arrive_as_what_they_equal(value: object, equal: object) -> None:
    assert travel(value) == equal


def test_numbers_longer_than_python_prints_arrive() -> None:
    assert travel(1 << 20000) == 1 << 20000


@pytest.mark.parametrize("value", [object(), len, iter([1]), np.ones(2), {"a": 1}.values(), type])
def test_other_objects_stay_where_they_are(value: object) -> None:
    assert encode(value, lambda _: 7) == ["opaque", 7]
    assert decode(["opaque", 7], lambda handle: handle + 1) == 8


@pytest.mark.parametrize(
    "message", [["list"], ["exec", "x"], [], 1.5, ["float", "x"], ["set", [["list", []]]], {"a": 1}]
)
def test_what_is_no_message_is_refused(message: object) -> None:
    with pytest.raises((ValueError, TypeError, LookupError)):
        decode(message, lambda handle: handle)
