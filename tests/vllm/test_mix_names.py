"""Names of mixes, as clients write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dare_vllm.per_request.mix_names import MAX_TERMS, parse_mix

names = st.text("abcXYZ019._/-", min_size=1, max_size=12)
weights = st.decimals(-100, 100, places=3).map(float)


@given(st.lists(st.tuples(names, weights), min_size=1, max_size=MAX_TERMS))
def test_a_mix_is_read_as_it_is_written(parts: list[tuple[str, float]]) -> None:
    expected: dict[str, float] = {}
    for name, weight in parts:
        expected[name] = expected.get(name, 0.0) + weight
    written = "+".join(f"{name}*{weight}" for name, weight in parts)
    assert parse_mix(written) == list(expected.items())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("math*0.6+chat*0.4", [("math", 0.6), ("chat", 0.4)]),
        ("math+chat", [("math", 1.0), ("chat", 1.0)]),
        ("math*.5", [("math", 0.5)]),
        ("math*-0.5+acme/chat*2", [("math", -0.5), ("acme/chat", 2.0)]),
        ("math * 0.5", None),  # names have no spaces
        ("math", None),
        ("meta-llama/Llama-2-13b-hf", None),
        ("math*", None),
        ("*0.5", None),
        ("math**2", None),
        ("math*inf", None),
        ("math*nan", None),
        ("math*1e999", None),
        ("+", None),
        ("+".join(["a"] * (MAX_TERMS + 1)), None),
    ],
)
def test_only_sums_are_mixes(name: str, expected: list[tuple[str, float]] | None) -> None:
    assert parse_mix(name) == expected


@given(st.text(max_size=40))
def test_no_text_breaks_it(text: str) -> None:
    found = parse_mix(text)
    assert found is None or all(name for name, _ in found)
