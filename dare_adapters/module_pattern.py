"""Patterns of modules' names in an adapter's config, matched in bounded time.

A config comes from a stranger, and `re` can be kept busy for years by a pattern.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NoReturn

__all__ = ["MAX_NAME", "ModulePattern", "name_matcher"]

MAX_NAME, _MAX_NESTED = 512, 16


def name_matcher(pattern: str) -> Callable[[str], bool]:
    """Whether a module's name matches a pattern as PEFT's `get_pattern_key` says.

    Raises:
        ValueError: the pattern has more to it than these have.
    """
    if not re.fullmatch(r"\^?[\w.-]*", pattern):
        return ModulePattern(pattern).matches
    plain = re.compile(rf"(.*\.)?({pattern})$")  # with nothing in it that could take long
    return lambda name: plain.match(name) is not None


Positions = set[int]
_Step = Callable[[str, Positions], Positions]


class ModulePattern:
    """A regular expression, matched without backtracking: `re` can be kept busy for years.

    A step takes the positions that matching may have come to and gives those it may come to
    next, so that time is bounded by the pattern and the name.
    """

    def __init__(self, text: str) -> None:
        self._text, self._place, self._depth = text, 0, 0
        if len(text) > MAX_NAME:
            raise ValueError(f"a pattern of {len(text)} characters; {MAX_NAME} are read")
        self._step = self._alternatives()
        if self._place < len(text):
            self._give_up()

    def matches(self, name: str) -> bool:
        """Whether the end of a name, from its beginning or after a dot, matches."""
        starts = {0} | {place + 1 for place, letter in enumerate(name) if letter == "."}
        return len(name) in self._step(name, starts)

    def _give_up(self) -> NoReturn:
        raise ValueError(
            f"the pattern {self._text!r:.120} has at character {self._place} what this library "
            r"does not read; of regular expressions it reads . ^ $ | (…) […] * + ? {m,n} \d \w \s"
        )

    def _take(self, expression: str) -> re.Match[str] | None:
        found = re.compile(expression).match(self._text, self._place)
        self._place = found.end() if found else self._place
        return found

    def _alternatives(self) -> _Step:
        branches = [self._sequence()]
        while self._take(r"\|"):
            branches.append(self._sequence())
        return lambda name, places: set().union(*(step(name, places) for step in branches))

    def _sequence(self) -> _Step:
        steps = []
        while self._place < len(self._text) and self._text[self._place] not in "|)":
            steps.append(self._repeated(self._atom()))

        def run(name: str, places: Positions) -> Positions:
            for step in steps:
                places = step(name, places)
            return places

        return run

    def _atom(self) -> _Step:
        if self._take(r"\((\?:)?(?!\?)"):
            self._depth += 1
            inner = self._alternatives() if self._depth <= _MAX_NESTED else None
            if inner is None or not self._take(r"\)"):
                self._give_up()
            self._depth -= 1
            return inner
        if self._take(r"\^"):
            return lambda name, places: places & {0}
        if self._take(r"\$"):
            return lambda name, places: places & {len(name)}
        one = self._take(r"[^\\\[\](){}*+?|^$]|\\[dwsDWS]|\\[^\w]|\[\^?\]?(?:\\.|[^\]\\])*\]")
        if one is None:
            self._give_up()
        try:
            letter = re.compile(one[0])
        except re.error:
            self._give_up()
        return lambda name, places: {
            place + 1 for place in places if place < len(name) and letter.match(name[place])
        }

    def _repeated(self, step: _Step) -> _Step:
        found = self._take(r"(?:([*+?])|\{(?=[\d,])(\d{1,4})?(,)?(\d{1,4})?\})\??(?![*+?{])")
        if found is None:
            return step
        sign, least, comma, most = found.groups()
        low = 1 if sign == "+" else int(least or 0)
        high = 1 if sign == "?" else low if least and not comma else int(most) if most else None

        def run(name: str, places: Positions) -> Positions:
            for _ in range(low):
                places, before = step(name, places), places
                if places == before:
                    break
            reached, new, times = places, places, low
            while new and (high is None or times < high):
                new = step(name, new) - reached
                reached, times = reached | new, times + 1
            return reached

        return run
