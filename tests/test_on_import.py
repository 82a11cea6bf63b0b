"""What fresh interpreters have after importing the library before, after and without others."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from typing import Any

import pytest

# Runs its arguments one after the other, and tells after each what there is.
PROGRAM = """
import json, sys
for step in sys.argv[1:]:
    exec(step)
    found = {"modules": sorted(name for name in sys.modules if name.count(".") < 2)}
    if models := sys.modules.get("transformers.modeling_utils"):
        found["method"] = hasattr(models.PreTrainedModel, "load_dare_adapter")
        loaders = models.__loader__, models.__spec__.loader
        found["loaders"] = [type(loader).__module__ for loader in loaders]
    if peft := sys.modules.get("peft"):
        found["member"] = "DARE" in [one.value for one in peft.PeftType] and peft.PeftType("DARE")
    print(json.dumps(found))
"""
OURS_FIRST = (
    "import dare_adapters",
    "import importlib.util as u; u.find_spec('peft')",
    "import peft",
)
THEIRS_FIRST = ("from transformers import PreTrainedModel; import peft", "import dare_adapters")
A_PART = ("import dare_adapters.tuner.config", "import peft")
WITHOUT_PEFT = (
    "import dare_adapters.cli_stats, dare_adapters.statistics",
    "import transformers; transformers.PreTrainedModel",
)


@functools.cache
def after(*steps: str) -> list[dict[str, Any]]:
    """What there is after each step, in an interpreter of their own."""
    command = [sys.executable, "-c", PROGRAM, *steps]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("first", [OURS_FIRST, WITHOUT_PEFT], ids=["package", "command"])
def test_importing_alone_imports_neither_models_nor_data_libraries(first: tuple[str, ...]) -> None:
    heavy = {"transformers", "peft", "vllm", "datasets", "evaluate", "pandas"}
    assert not heavy & set(after(*first)[0]["modules"])


@pytest.mark.parametrize(
    "steps", [OURS_FIRST, THEIRS_FIRST, A_PART, WITHOUT_PEFT],
    ids=["ours first", "theirs first", "a part of ours", "without PEFT"],
)  # fmt: skip
def test_models_get_their_methods_in_any_order(steps: tuple[str, ...]) -> None:
    assert after(*steps)[-1]["method"]


@pytest.mark.parametrize(
    "steps", [OURS_FIRST, THEIRS_FIRST, A_PART],
    ids=["ours first", "theirs first", "a part of ours"],
)  # fmt: skip
def test_peft_gets_its_member_in_any_order(steps: tuple[str, ...]) -> None:
    assert after(*steps)[-1]["member"] == "DARE"


def test_asking_whether_peft_could_be_imported_neither_imports_nor_forgets_it() -> None:
    _, asked, imported = after(*OURS_FIRST)
    assert "member" not in asked
    assert imported["member"] == "DARE"


@pytest.mark.parametrize("steps", [OURS_FIRST, WITHOUT_PEFT], ids=["through PEFT", "by itself"])
def test_the_awaited_module_keeps_its_own_loader(steps: tuple[str, ...]) -> None:
    assert not any(name.startswith("dare_adapters") for name in after(*steps)[-1]["loaders"])
