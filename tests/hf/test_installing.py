"""The methods are installed once, and the errors are what their names say."""

from __future__ import annotations

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


def test_installing_the_methods_twice_changes_nothing():
    call = PreTrainedModel.__call__
    dare_adapters.hf.install()
    assert PreTrainedModel.__call__ is call


def test_every_error_is_a_dare_error_with_its_builtin_kin():
    assert issubclass(AdapterNotFoundError, FileNotFoundError)
    assert issubclass(AdapterExistsError, FileExistsError)
    for error in (AdapterFormatError, ArchitectureMismatchError, BaseMismatchError):
        assert issubclass(error, DareError)
