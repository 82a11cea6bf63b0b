"""The numbers of system calls are Linux's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dare_eval.lm.sandbox.seccomp import CALLS

HEADERS = [  # column of CALLS, where a Linux with its headers has the table
    (0, "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    (0, "/usr/include/asm/unistd_64.h"),
    (1, "/usr/include/asm-generic/unistd.h"),
]


@pytest.mark.parametrize(("column", "header"), HEADERS)
def test_numbers_are_those_of_linux_headers(column: int, header: str) -> None:
    if not Path(header).exists():
        pytest.skip(f"{header} is absent")
    defined = re.findall(r"#define\s+__NR(?:3264)?_(\w+)\s+(\d+)", Path(header).read_text())
    numbers = {name: int(number) for name, number in defined}
    wrong = {
        name: (given[column], numbers[name])
        for name, given in CALLS.items()
        if name in numbers and given[column] != numbers[name]
    }
    missing = {name for name, given in CALLS.items() if given[column] and name not in numbers}
    assert not wrong
    # Older headers lack newer calls; what they all have is not missing.
    assert not {name for name in missing if (CALLS[name][column] or 0) < 424}
