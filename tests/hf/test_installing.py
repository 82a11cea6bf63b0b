"""What importing the library does, and the errors that it raises."""

from __future__ import annotations

import subprocess
import sys

from transformers import PreTrainedModel

import dare_adapters
from dare_adapters.errors import (
    AdapterExistsError,
    AdapterFormatError,
    AdapterNotFoundError,
    ArchitectureMismatchError,
    BaseMismatchError,
    DareError,
)


def test_importing_the_library_imports_none_of_the_heavy_optional_ones():
    program = (
        "import sys, dare_adapters; "
        "print([m for m in ('vllm', 'datasets', 'evaluate', 'peft') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_installing_the_methods_twice_changes_nothing():
    call = PreTrainedModel.__call__
    dare_adapters.hf.install()
    assert PreTrainedModel.__call__ is call


def test_every_error_is_a_dare_error_with_its_builtin_kin():
    assert issubclass(AdapterNotFoundError, FileNotFoundError)
    assert issubclass(AdapterExistsError, FileExistsError)
    for error in (AdapterFormatError, ArchitectureMismatchError, BaseMismatchError):
        assert issubclass(error, DareError)
