"""The methods arrive on models whether transformers is imported before or after."""

from __future__ import annotations

import subprocess
import sys

import pytest

CHECK = "import transformers; print(hasattr(transformers.PreTrainedModel, 'load_dare_adapter'))"


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_importing_the_library_does_not_import_the_modelling_code():
    code = "import sys, dare_adapters; print('transformers.modeling_utils' in sys.modules)"
    assert run(code) == "False"


@pytest.mark.parametrize(
    "first",
    ["import dare_adapters", "from transformers import PreTrainedModel; import dare_adapters"],
)
def test_models_get_their_methods_in_either_order(first: str):
    assert run(f"{first}; {CHECK}") == "True"


def test_the_awaited_module_keeps_its_own_loader():
    code = (
        "import dare_adapters, transformers.modeling_utils as m; "
        "print(type(m.__loader__).__module__, type(m.__spec__.loader).__module__)"
    )
    assert "dare_adapters" not in run(code)
