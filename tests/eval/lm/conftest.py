"""Decoders and small benchmarks, made once a session."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tests.eval.lm.decoders import Decoders, make_decoders


@pytest.fixture(scope="session")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> Decoders:
    return make_decoders(tmp_path_factory.mktemp("decoders"))


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Problems of every benchmark, three each, in the layout of the real files."""
    root = tmp_path_factory.mktemp("data")
    for name, rows in BENCHMARKS.items():
        path = root / name
        path.parent.mkdir(exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if path.suffix == ".gz":
            path.write_bytes(gzip.compress(text.encode()))
        else:
            path.write_text(text, encoding="utf-8")
    return root


BENCHMARKS: dict[str, list[dict[str, Any]]] = {
    "gsm8k/test.jsonl": [
        {"question": f"What is {n} and {n}?", "answer": f"Twice.\n#### {2 * n:,}"}
        for n in (2, 7, 617283)
    ],
    "math/test.jsonl": [
        {
            "problem": f"Halve ${n}$.",
            "solution": rf"It is $\boxed{{\frac{{{n}}}{{2}}}}$.",
            "level": "Level 1",
            "type": "Algebra",
        }
        for n in (1, 3, 5)
    ],
    "humaneval/HumanEval.jsonl.gz": [
        {
            "task_id": f"HumanEval/{n}",
            "prompt": f'def add_{n}(x: int) -> int:\n    """ Add {n}. """\n',
            "canonical_solution": f"    return x + {n}\n",
            "test": f"def check(candidate):\n    assert candidate(1) == {n + 1}\n",
            "entry_point": f"add_{n}",
        }
        for n in range(3)
    ],
    "mbpp/mergelm_test.jsonl": [
        {
            "task_id": 11 + n,
            "text": f"Write a function to multiply by {n}.",
            "code": f"def times_{n}(x):\r\n\treturn x * {n}",
            "test_list": [f"assert times_{n}(2) == {2 * n}", f"assert times_{n}(-1) == {-n}"],
            "test_setup_code": "",
        }
        for n in range(2, 5)
    ],
    "alpaca_eval/instructions.jsonl": [
        {"idx": n, "dataset": "helpful_base", "instruction": f"Say {n}."} for n in range(3)
    ],
}
